"""Who takes the next step."""

import itertools
from types import SimpleNamespace
from typing import Any

from ray_sd.generate import ImageRequest
from ray_sd.serve.order import Order, Ticket
from ray_sd.serve.turns import MOST_OWNERS, Picture, Turns


def picture(number: int, steps: int, owner: str = "", side: int = 8, guidance_scale: float = 1.0) -> Any:
    order = Order(ImageRequest("a", guidance_scale=guidance_scale), owner=owner)
    drawing = SimpleNamespace(
        remaining=steps,
        rows=1 if guidance_scale <= 1 else 2,
        shape=(4, side, side),
    )
    return Picture([Ticket(order, lambda event: None)], None, [], None, drawing, number)  # type: ignore[arg-type]  # a stand-in


def play(turns: Turns, pictures: list[Any], max_rows: int, steps: int) -> list[list[int]]:
    """Numbers of those that take each step; what is done leaves."""
    taken = []
    for _ in range(steps):
        chosen = turns.choose(pictures, max_rows)
        taken.append(sorted(one.number for one in chosen))
        for one in chosen:
            one.drawing.remaining -= 1
        pictures = [one for one in pictures if one.drawing.remaining]
        if not pictures:
            break
    return taken


def test_the_shortest_goes_first_and_the_longest_is_not_forgotten():
    turns = Turns("shortest", patience=3, own_area=64)
    short = [picture(number, 4) for number in range(1, 20)]
    taken = play(turns, [picture(0, 50), *short], max_rows=1, steps=40)
    assert taken[:3] == [[1], [1], [1]]
    waits = [step for step, numbers in enumerate(taken) if numbers == [0]]
    assert waits
    assert max(b - a for a, b in itertools.pairwise(waits)) <= 25


def test_owners_have_equal_shares():
    turns = Turns("fair", patience=1000, own_area=64)
    pictures = [picture(number, 100, owner="many") for number in range(9)] + [picture(9, 100, owner="one")]
    taken = play(turns, pictures, max_rows=1, steps=40)
    assert sum(numbers == [9] for numbers in taken) == 20


def test_owners_without_number_are_not_remembered():
    turns = Turns("fair", patience=1000, own_area=64)
    for number in range(MOST_OWNERS + 1):
        turns.choose([picture(number, 1, owner=f"owner {number}")], max_rows=1)
    assert turns.owed("owner 0") == 0
    assert turns.owed(f"owner {MOST_OWNERS}") == 1
    assert len(turns._owners) == MOST_OWNERS


def test_sizes_have_equal_work():
    turns = Turns("shortest", patience=1000, own_area=64)
    small = [picture(number, 1000) for number in range(4)]
    large = [picture(number, 1000, side=16) for number in range(4, 8)]
    taken = play(turns, small + large, max_rows=4, steps=100)
    work = [sum(4 if number >= 4 else 1 for number in numbers) for numbers in taken]
    of_large = sum(one for one, numbers in zip(work, taken, strict=True) if numbers[0] >= 4)
    assert 0.45 < of_large / sum(work) < 0.55
    assert max(len(numbers) for numbers in taken if numbers[0] >= 4) == 1


def test_guided_pictures_take_two_rows_and_none_is_left_out_for_being_large():
    turns = Turns("shortest", patience=1000, own_area=64)
    pictures = [picture(0, 9, guidance_scale=5.0), picture(1, 9, guidance_scale=5.0), picture(2, 9)]
    assert play(turns, pictures, max_rows=3, steps=1) == [[0, 2]]
    assert play(turns, [picture(0, 9, side=64, guidance_scale=5.0)], max_rows=1, steps=1) == [[0]]
