"""The stacked bank of LoRAs, against the same updates fused into the weights."""

import pytest
import torch
from tiny_models import all_tensors, bytes_beside
from torch import nn

from ray_sd.generate.bank import LoraBank
from ray_sd.methods.low_rank import LowRank, Updates


class Part(nn.Module):
    """What a denoiser is made of: layers over tokens, over pictures, and over vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(6, 5)
        self.vectors = nn.Linear(4, 3)
        self.small = nn.Conv2d(2, 3, 1)
        self.large = nn.Conv2d(2, 4, 3, stride=2, padding=1)

    def forward(self, tokens: torch.Tensor, vectors: torch.Tensor, picture: torch.Tensor) -> list[torch.Tensor]:
        return [self.tokens(tokens), self.vectors(vectors), self.small(picture), self.large(picture)]


@pytest.fixture
def part() -> Part:
    torch.manual_seed(0)
    return Part().requires_grad_(False)


@pytest.fixture
def bank(part: Part) -> LoraBank:
    return LoraBank({("unet", name): layer for name, layer in part.named_children()})


def inputs(rows: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(8, *shape, generator=generator)[:rows] for shape in ((7, 6), (4,), (2, 8, 8)))


def lora(
    part: Part, rank: int, seed: int, layers: tuple[str, ...] = ("tokens", "vectors", "small", "large")
) -> Updates:
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name in layers:
        weight = getattr(part, name).weight
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)
        updates[name] = LowRank(down, up, alpha=3.0)
    return {"unet": updates}


def fused(part: Part, mix: list[tuple[Updates, float]], row: int) -> list[torch.Tensor]:
    copy = Part()
    copy.load_state_dict(part.state_dict())
    copy.requires_grad_(False)
    for updates, weight in mix:
        for name, update in updates["unet"].items():
            layer = getattr(copy, name)
            layer.weight.copy_(update.added_to(layer.weight, weight))
    return copy(*(values[row : row + 1] for values in inputs(row + 1)))


def test_rows_take_their_own_adapters_of_any_rank_and_layers(part: Part, bank: LoraBank):
    small, large, few = lora(part, 2, seed=1), lora(part, 11, seed=2), lora(part, 4, seed=3, layers=("tokens", "large"))
    for name, updates in {"small": small, "large": large, "few": few}.items():
        bank.add(name, updates)
    rows = [
        ((), []),
        ((("small", 1.0),), [(small, 1.0)]),
        ((("large", 0.5),), [(large, 0.5)]),
        ((("small", -0.3), ("few", 1.2), ("large", 1.0)), [(small, -0.3), (few, 1.2), (large, 1.0)]),
        ((("few", 0.0),), []),
    ]
    bank.choose("unet", [names for names, _ in rows])
    together = part(*inputs(len(rows)))
    for row, (_, mix) in enumerate(rows):
        for found, expected in zip(together, fused(part, mix, row), strict=True):
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_a_rows_result_does_not_depend_on_the_rows_beside_it(part: Part, bank: LoraBank):
    for seed, name in enumerate(("a", "b")):
        bank.add(name, lora(part, 4, seed))
    bank.choose("unet", [(("a", 1.0),), (("b", 1.0), ("a", 2.0))])
    beside = part(*inputs(2))
    bank.choose("unet", [(("a", 1.0),)])
    for found, expected in zip(part(*inputs(1)), beside, strict=True):
        # Of one row and of two, products are summed in other orders; what another row adds is of the size of the result.
        torch.testing.assert_close(found, expected[:1], rtol=1e-4, atol=1e-4)


def test_what_is_removed_leaves_the_layers_as_they_were(part: Part, bank: LoraBank):
    plain = part(*inputs(2))
    bank.add("a", lora(part, 4, seed=0))
    bank.choose("unet", [(("a", 1.0),), ()])
    assert not torch.equal(part(*inputs(2))[0], plain[0])
    bank.choose("unet", [(), ()])
    bank.remove("a")
    assert all(map(torch.equal, part(*inputs(2)), plain))
    assert not any(layer._forward_hooks for layer in part.children())
    assert bank.bytes == 0


def test_what_comes_after_what_was_removed_is_its_own(part: Part, bank: LoraBank):
    for round_number in range(20):
        bank.add("kept" if round_number == 0 else "new", lora(part, 11 - round_number % 3, seed=round_number))
        if round_number:
            bank.choose("unet", [(("new", 1.0),)])
            expected = fused(part, [(lora(part, 11 - round_number % 3, seed=round_number), 1.0)], 0)
            for found, one in zip(part(*inputs(1)), expected, strict=True):
                torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-4)
            bank.remove("new")


def test_rows_whose_adapters_change_other_layers_leave_each_others_alone(part: Part, bank: LoraBank):
    large, small = lora(part, 11, seed=1, layers=("tokens",)), lora(part, 4, seed=2, layers=("vectors",))
    bank.add("large", large)
    bank.add("small", small)
    bank.choose("unet", [(("large", 1.0),), (("small", 1.0),)])
    together = part(*inputs(2))
    for row, mix in enumerate(([(large, 1.0)], [(small, 1.0)])):
        for found, expected in zip(together, fused(part, mix, row), strict=True):
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_memory_is_what_is_foreseen_and_what_tensors_take(part: Part, bank: LoraBank):
    before = all_tensors()
    bank.add("first", lora(part, 3, seed=1, layers=("tokens",)))
    updates = lora(part, 5, seed=0)
    foreseen = bank.bytes + bank.bytes_of(updates)
    bank.add("a", updates)
    del updates
    # five ranks of each layer's inputs and outputs and one of zeros, and three more of one layer, in four bytes
    assert bank.bytes == foreseen == 4 * (6 * ((6 + 5) + (4 + 3) + (2 + 3) + (18 + 4)) + 3 * (6 + 5))
    assert bytes_beside(before) == bank.bytes
    bank.choose("unet", [(("a", 1.0),), (), (("first", 0.5),)])
    assert bank.copied_bytes == 4 * 3 * 5 * ((6 + 5) + (4 + 3) + (2 + 3) + (18 + 4))
    assert bank.bytes + bank.copied_bytes <= bytes_beside(before) <= bank.bytes + bank.copied_bytes + 1000  # numbers
    bank.remove("a")
    assert (bank.bytes, bank.copied_bytes) == (4 * 4 * (6 + 5), 0)
    assert bytes_beside(before) == bank.bytes


def test_copies_are_kept_only_where_there_is_room_and_rows_are_the_same_without(part: Part, bank: LoraBank):
    rows = [(("a", 1.0),), (("b", 0.5), ("a", 1.0)), ()]
    bank.add("a", lora(part, 4, seed=0))
    bank.add("b", lora(part, 6, seed=1, layers=("tokens", "large")))
    bank.choose("unet", rows)
    kept, wanted = part(*inputs(3)), bank.wanted_bytes
    assert bank.copied_bytes == wanted > 0
    bank.keep_within(bank.bytes + wanted)
    assert bank.copied_bytes == wanted
    bank.add("c", lora(part, 1, seed=2, layers=("vectors",)))
    assert (bank.copied_bytes, bank.wanted_bytes) == (0, wanted)
    assert all(map(torch.equal, part(*inputs(3)), kept))
    bank.choose("unet", rows[::-1])
    assert bank.copied_bytes == 0
    for found, expected in zip(part(*inputs(3)), kept, strict=True):
        assert not torch.equal(found, expected)
    bank.remove("c")
    bank.choose("unet", rows)
    assert bank.copied_bytes == wanted
    assert all(map(torch.equal, part(*inputs(3)), kept))
