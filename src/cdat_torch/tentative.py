"""A step of the base optimizer that may turn out to be none.

The measurement needs the direction of the step, and only the measurement tells whether the step
counts. Until then the state of the base must not be lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_torch.base_state import SavedState, copied
from cdat_torch.direction import (
    base_direction,
    step_at,
    steps_by_entry,
    steps_by_parameter,
    steps_in_proportion,
)
from cdat_torch.sharding import is_sharded

_SMALL = 2**18
"""Numbers below which a division of the parameters saves little."""
_PARTS = 8


def tentative_step(
    base: Optimizer, params: Sequence[Tensor], *, read: bool = False
) -> RehearsedStep | HeldStep:
    """Return the step of the base on `params`: its direction, and how to `undo` or `conclude` it.

    One of the two is to be called. With `read` the state of the base is that of the step meanwhile.
    """
    if read or not steps_by_parameter(base):
        return HeldStep(base, params)
    return RehearsedStep(base, params)


class HeldStep:
    """The base steps, and a copy of its whole state is held; for optimizers of unknown kind."""

    def __init__(self, base: Optimizer, params: Sequence[Tensor]) -> None:
        self._saved = SavedState(base)
        try:
            self.direction = base_direction(base, params)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put the state back."""
        self._saved.restore()

    def conclude(self, rate: Tensor, *, skip: Tensor) -> bool:
        """Put the state back where `skip` holds; return False, since no parameter has moved."""
        del rate
        self._saved.restore_where(skip)
        return False


class RehearsedStep:
    """The base steps on copies of its state, which are dropped; `conclude` lets it step for good.

    That is one step of the base more, in the place of a second state that lives as long as the
    measurement. The parameters take turns in parts, so that only a part is copied at a time; on a
    CPU these are so small that they stay in its cache.
    """

    def __init__(self, base: Optimizer, params: Sequence[Tensor]) -> None:
        self._base = base
        self._with_state: list[Tensor] = []
        self.direction = [torch.zeros_like(p) for p in params]
        groups = {p: i for i, group in enumerate(base.param_groups) for p in group["params"]}
        pieces = [
            piece
            for p, u in zip(params, self.direction, strict=True)
            for piece in _pieces(base, p, u, groups[p])
        ]
        on_cpu = all(p.device.type == "cpu" for p in params)
        for part in _parts(pieces, _SMALL if on_cpu else None):
            self._rehearse(part)

    def _rehearse(self, part: Sequence[_Piece]) -> None:
        rehearsing = {piece.stand_in(): piece for piece in part}
        with _on_copies(self._base, rehearsing):
            base_direction(self._base, list(rehearsing), zeros=[piece.direction for piece in part])
            self._with_state += [
                piece.param
                for t, piece in rehearsing.items()
                if t in self._base.state and piece.is_first
            ]

    def undo(self) -> None:
        """Do nothing: the state is that from before the step."""

    def conclude(self, rate: Tensor, *, skip: Tensor) -> bool:
        """Take the step except where `skip` holds, without waiting for a device if possible.

        Return whether the parameters have moved as well, at `rate`. Otherwise they are left to the
        caller, and only the state has.
        """
        known = skip.device.type == "cpu"
        if known and bool(skip):
            return False
        if known and steps_in_proportion(self._base):
            step_at(self._base, float(rate))
            return True
        for part in _parts(self._with_state):
            saved = None if known else SavedState(self._base, part)
            base_direction(self._base, part)
            if saved is not None:
                saved.restore_where(skip)
        return False


class _Piece(NamedTuple):
    """A parameter, or successive entries of it, with the direction there (zero at first)."""

    param: Tensor
    direction: Tensor
    group: int
    entries: slice | None = None

    @property
    def is_first(self) -> bool:
        """Whether no other piece of the same parameter comes before."""
        return self.entries is None or self.entries.start == 0

    def numel(self) -> int:
        """Return how many numbers there are."""
        return self.direction.numel()

    def stand_in(self) -> Tensor:
        """Return what the base finds in the place of the parameter, with its gradient."""
        if self.entries is None:
            return self.param
        assert self.param.grad is not None
        part = self.param.detach().view(-1)[self.entries]
        part.grad = self.param.grad.view(-1)[self.entries]
        return part

    def copied(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of the state that the base keeps of the parameter, as far as it is here."""
        if self.entries is None:
            return copied(state)
        here = {
            name: value.view(-1)[self.entries]
            if isinstance(value, Tensor) and value.shape == self.param.shape
            else value
            for name, value in state.items()
        }
        return copied(here)


def _pieces(base: Optimizer, p: Tensor, direction: Tensor, group: int) -> list[_Piece]:
    """Divide a parameter of a CPU into pieces that fit its cache, if the base allows for it."""
    divisible = p.device.type == "cpu" and steps_by_entry(base) and p.numel() > _SMALL
    if not divisible or not _all_in_order(base, p):
        return [_Piece(p, direction, group)]
    slices = [slice(start, start + _SMALL) for start in range(0, p.numel(), _SMALL)]
    return [_Piece(p, direction.view(-1)[entries], group, entries) for entries in slices]


def _all_in_order(base: Optimizer, p: Tensor) -> bool:
    """Return whether the entries of a parameter and of all that belongs to it lie side by side."""
    tensors = [t for t in (p, p.grad, *base.state.get(p, {}).values()) if isinstance(t, Tensor)]
    return all(
        t.layout is torch.strided and t.is_contiguous() and not is_sharded(t) for t in tensors
    )


def _parts(pieces: Sequence[Any], enough: int | None = None) -> list[list[Any]]:
    """Divide tensors or pieces into successive parts of about a size, by default an eighth."""
    enough = enough or max(_SMALL, sum(p.numel() for p in pieces) // _PARTS)
    parts: list[list[Any]] = []
    size = enough
    for piece in pieces:
        if size + piece.numel() > enough:
            parts.append([])
            size = 0
        parts[-1].append(piece)
        size += piece.numel()
    return parts


@contextmanager
def _on_copies(base: Optimizer, rehearsing: Mapping[Tensor, _Piece]) -> Iterator[None]:
    """Let `base` find the stand-ins and copies of the state; afterwards the originals again."""
    known = {t: piece for t, piece in rehearsing.items() if piece.param in base.state}
    copies = {t: piece.copied(base.state[piece.param]) for t, piece in known.items()}
    originals = {piece.param: base.state[piece.param] for piece in known.values()}
    fused = _may_be_fused(base, rehearsing)
    groups = [dict(group) for group in base.param_groups]
    try:
        for i, group in enumerate(base.param_groups):
            group["params"] = [t for t, piece in rehearsing.items() if piece.group == i]
            if fused:
                group.update(fused=True, foreach=False)
        base.state.update(copies)
        yield
    finally:
        for group, original in zip(base.param_groups, groups, strict=True):
            group.update(original)
        for t in rehearsing:
            base.state.pop(t, None)
        base.state.update(originals)


def _may_be_fused(base: Optimizer, rehearsing: Mapping[Tensor, _Piece]) -> bool:
    """Return whether the base can take a third of the time, for a difference by rounding.

    That is Adam's fused kernel for the CPU, which takes entries in the order of the memory.
    """
    return (
        type(base) in (torch.optim.Adam, torch.optim.AdamW)
        and not any(group["capturable"] or group["differentiable"] for group in base.param_groups)
        and all(
            piece.param.device.type == "cpu"
            and piece.param.dtype in (torch.float32, torch.float64)
            and _all_in_order(base, piece.param)
            for piece in rehearsing.values()
        )
    )
