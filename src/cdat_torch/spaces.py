"""The inner-product space of lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cdat_torch.distributed.dtensor import local, match_placements, resolve_partial, sum_over_shards


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which scalars are kept on `device`: float64 where it exists."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class TensorListSpace:
    """Lists of tensors, such as the parameters of a model, with the Euclidean inner product.

    Inner products accumulate in float32 or wider within a tensor and in float64 over the tensors
    (float32 on devices without it). They live on the device of the first tensor; nothing is
    flattened and nothing waits for the device. The inner product of DTensors is that of the full
    tensors, so all processes of their mesh must call it.
    """

    def vdot(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        """Return the sum over the tensors of ``Re <x_i, y_i>`` as a 0-d tensor.

        Raises
        ------
        ValueError
            If the lists are empty or differ in length or shapes.
        """
        if not x:
            msg = "x must hold at least one tensor, got an empty sequence"
            raise ValueError(msg)
        device = x[0].device
        zero = torch.zeros((), dtype=scalar_dtype(device), device=device)
        parts, x = [], [resolve_partial(a) for a in x]
        for a, b in zip(x, y, strict=True):
            if a.shape != b.shape:
                msg = f"x and y must hold tensors of the same shape, got {a.shape} and {b.shape}"
                raise ValueError(msg)
            product = _widened(local(a)).conj() * _widened(local(match_placements(b, a)))
            # torch sums pairwise, so float32 suffices within a tensor; the totals are wider.
            parts.append((product.real if product.is_complex() else product).sum().to(zero))
        return sum_over_shards(parts, x)

    def scale(self, a: Any, x: Sequence[Tensor]) -> list[Tensor]:
        """Return ``a * x``, each tensor in its own dtype and device."""
        return [t * _factor(a, t) for t in x]

    def add_scale(self, x: Sequence[Tensor], a: Any, y: Sequence[Tensor]) -> list[Tensor]:
        """Return ``x + a * y``, each tensor in the dtype and device of x."""
        return [s + t * _factor(a, t) for s, t in zip(x, y, strict=True)]


def _widened(t: Tensor) -> Tensor:
    """Return half-precision tensors as float32, which their products need."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _factor(a: Any, like: Tensor) -> Any:
    """Move a 0-d factor to the device of `like`; a 0-d tensor does not change the dtype."""
    return a.to(like.device) if isinstance(a, Tensor) else a
