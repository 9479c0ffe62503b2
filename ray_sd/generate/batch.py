"""Drawings that take their steps together, each with its own settings; they join and leave between steps.

A step calls the U-Net once and multiplies the rows of all samplers' tables once. What it needs of its members is gathered when
they change, not at every step, and lies where the model is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ray_sd.errors import RequestError
from ray_sd.generate.adapters import Adapters
from ray_sd.generate.cross_attention import KeptTexts, keeping, let_keep
from ray_sd.generate.drawing import Drawing
from ray_sd.generate.text import stack
from ray_sd.models import DiffusionModel

CLEAN, LATENTS = 0, 1
"""Places in a drawing's state; after them comes what its sampler remembers."""
OUTPUT, NOISE = -2, -1
"""Places behind the state in the inputs of a step: what the U-Net said, and fresh noise."""


class Batch:
    """Drawings of one model and one shape of latents. For one thread at a time."""

    def __init__(self, model: DiffusionModel, adapters: Adapters | None = None) -> None:
        """adapters: those that drawings name."""
        self._model = model
        self._adapters = adapters
        let_keep(model.unet)
        self._states: dict[Drawing, Tensor] = {}  # [2 + M, …] of members that take no steps together
        self._together: _Together | None = None
        self._kept: KeptTexts | None = None

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, drawing: Drawing) -> bool:
        return drawing in self._states

    @property
    def drawings(self) -> list[Drawing]:
        """Those that have joined and not left, the first first."""
        return list(self._states)

    @torch.no_grad()
    def join(self, drawings: Sequence[Drawing]) -> None:
        """Let drawings take the next steps with the others; all have latents of one shape, and have taken none yet.

        Raises RequestError for adapters that are not there.
        """
        for drawing in drawings:
            if drawing.adapters and self._adapters is None:
                raise RequestError(f"no adapter '{drawing.adapters[0][0]}' is loaded", param="adapters")
            nothing = drawing.latents.new_zeros(drawing.table.remembered, *drawing.shape)
            self._states[drawing] = torch.cat([drawing.latents.expand(2, *drawing.shape), nothing])

    def leave(self, drawing: Drawing) -> None:
        """Take no step more with a drawing. What it looks like by now is lost."""
        self._part()
        del self._states[drawing]

    @torch.no_grad()
    def advance(self, drawings: Sequence[Drawing] | None = None) -> list[Drawing]:
        """Take one step of some members, or of all. Returns those that are done, which have left with their latents."""
        members = tuple(self._states if drawings is None else drawings)
        if self._together is None or self._together.members != members:
            self._part()
            self._together = self._gather(members)
        together = self._together
        if self._adapters is not None:
            self._adapters.choose("unet", [drawing.adapters for drawing in members for _ in range(drawing.rows)])
        state, inputs = together.state, together.inputs
        inputs[:, OUTPUT] = self._denoise(together)
        inputs[:, NOISE] = self._draw_noise(together)
        with torch.autocast(state.device.type, enabled=False):  # half of a number's digits are not enough
            state.copy_(torch.bmm(together.steps[together.places], inputs[:, LATENTS:].flatten(2)).view_as(state))
        together.places += 1
        for place, drawing in enumerate(members):
            drawing.step += 1
            if drawing.kept is not None:
                latents, noising = state[place, LATENTS], drawing.table.noising[drawing.step]
                state[place, LATENTS] = drawing.kept.restore(latents, noising.to(latents))
        done = [drawing for drawing in members if drawing.done]
        for drawing in done:
            drawing.latents = self._state(drawing)[LATENTS].clone()
            self.leave(drawing)
        return done

    def preview(self, drawings: Sequence[Drawing]) -> Tensor:
        """Latents [B, …] of members as their last step foresaw them: without the noise that is still in them."""
        return torch.stack([self._state(drawing)[CLEAN] for drawing in drawings])

    def _state(self, drawing: Drawing) -> Tensor:
        together = self._together
        if together is None or drawing not in together.members:
            return self._states[drawing]
        return together.state[together.members.index(drawing)]

    def _gather(self, members: tuple[Drawing, ...]) -> "_Together":
        device = self._model.device
        width = 2 + max(drawing.table.remembered for drawing in members)
        tables = list(dict.fromkeys(drawing.table for drawing in members))
        firsts = dict(zip(tables, _running_sums(map(len, tables)), strict=False))
        rows = [place for place, drawing in enumerate(members) for _ in range(drawing.rows)]
        lasts = _running_sums(drawing.rows for drawing in members)[1:]
        conditions = stack([drawing.conditions for drawing in members])
        texts = conditions.get("text_embeds")
        copies = [(drawing, copy) for drawing in members for copy in range(drawing.rows)]
        self._kept = None if texts is None else KeptTexts(texts, copies, self._kept)
        number = lambda values: torch.tensor(values, device=device)  # noqa: E731
        return _Together(
            members=members,
            inputs=torch.stack([_inputs(self._states[drawing], width) for drawing in members]),
            noise=torch.zeros(len(members), *members[0].shape, dtype=self._model.dtype),
            places=number([firsts[drawing.table] + drawing.step for drawing in members]),
            timesteps=torch.cat([table.timesteps for table in tables]).to(device),
            scales=torch.cat([table.scales for table in tables]).to(device).view(-1, *[1] * len(members[0].shape)),
            steps=torch.cat([_widened(table.steps, width) for table in tables]).to(device),
            rows=number(rows) if len(rows) > len(members) else None,
            without=number([last - drawing.rows for last, drawing in zip(lasts, members, strict=True)]),
            guided=number([last - 1 for last in lasts]),
            guidance=torch.stack([drawing.guidance for drawing in members]).to(device),
            conditions=conditions,
        )

    def _part(self) -> None:
        """Let members be gathered anew."""
        if self._together is not None:
            self._states |= zip(self._together.members, self._together.state, strict=True)
            self._together = None

    def _denoise(self, together: "_Together") -> Tensor:
        """What the U-Net says of each drawing, guided."""
        scaled = together.state[:, LATENTS] * together.scales[together.places]
        timesteps = together.timesteps[together.places]
        if together.rows is not None:
            scaled, timesteps = scaled[together.rows], timesteps[together.rows]
        with keeping(self._kept):
            said = self._model.denoise(scaled, timesteps, together.conditions).float()
        if together.rows is None:
            return said
        without = said[together.without]
        return without + together.guidance * (said[together.guided] - without)

    def _draw_noise(self, together: "_Together") -> Tensor:
        """[B, …], fresh for those whose samplers take it; what the others have is multiplied by nothing."""
        for place, drawing in enumerate(together.members):
            if drawing.table.draws[drawing.step]:
                together.noise[place].normal_(generator=drawing.generator)
        return together.noise


@dataclass
class _Together:
    """What steps of the same members need. R rows of the U-Net's batch, B members, S steps of all members' samplers."""

    members: tuple[Drawing, ...]
    inputs: Tensor  # [B, 4 + M, …], states and what changes them
    noise: Tensor  # [B, …], as diffusers' pipelines draw it: on the CPU, in the model's precision
    places: Tensor  # [B], of each member's next step among the S
    timesteps: Tensor  # [S]
    scales: Tensor  # [S, 1, …]
    steps: Tensor  # [S, 2 + M, 3 + M]
    rows: Tensor | None  # [R], the member of each row; None where each has one
    without: Tensor  # [B], the row without what guides it, or the only one
    guided: Tensor  # [B], the row with it, or the only one
    guidance: Tensor  # [B, …]
    conditions: dict[str, Tensor]  # [R, …]

    @property
    def state(self) -> Tensor:
        """[B, 2 + M, …]"""
        return self.inputs[:, :OUTPUT]


def _running_sums(counts: Iterable[int]) -> list[int]:
    return list(accumulate(counts, initial=0))


def _inputs(state: Tensor, width: int) -> Tensor:
    """[width + 2, …] from the state [2 + M, …] of a sampler that may remember less than others, or more before they left."""
    kept = state[:width]
    return torch.cat([kept, kept.new_zeros(width + 2 - len(kept), *kept.shape[1:])])


def _widened(steps: Tensor, width: int) -> Tensor:
    """Steps [T, 2 + M, 3 + M] of a sampler that may remember less than others: [T, width, width + 1]."""
    missing = width - steps.shape[1]
    remembering = steps.shape[2] - 2
    steps = torch.cat(
        [steps[:, :, :remembering], steps.new_zeros(*steps.shape[:2], missing), steps[:, :, remembering:]], 2
    )
    return torch.cat([steps, steps.new_zeros(len(steps), missing, steps.shape[2])], dim=1)
