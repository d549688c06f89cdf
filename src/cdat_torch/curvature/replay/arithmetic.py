"""Accurate inner products and scaled sums that need little memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 2**15
"""Elements that are summed in float32; the sums of chunks are added in float64.

Long float32 sums lose digits, and second-order terms cancel."""
HALF = (torch.bfloat16, torch.float16)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of ``a * b``, 0-d; in float64 if it is longer than a chunk."""
    if a.shape != b.shape:
        shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
        a, b = a.expand(shape), b.expand(shape)
    if a.dtype != b.dtype or a.dtype in HALF:
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.to(wide), b.to(wide)
    a, b = _alike(a, b)
    if a.numel() <= CHUNK or a.dtype == torch.float64 or a.device.type != "cpu":
        return torch.dot(a, b)
    parts = zip(torch.split(a, CHUNK), torch.split(b, CHUNK), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in parts]).sum(dtype=torch.float64)


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both flattened in the same order, without a copy if their layouts agree."""
    if a.dim() > 1 and not a.is_contiguous() and a.stride() == b.stride():
        strides = a.stride()
        order = sorted(range(a.dim()), key=lambda i: -strides[i])
        a, b = a.permute(order), b.permute(order)
    elif a.dim() == 2 and not b.is_contiguous() and b.t().is_contiguous():
        a, b = a.t(), b.t()
    return a.reshape(-1), b.reshape(-1)


def add_scaled(x: Tensor, factor: Tensor | float, y: Tensor) -> Tensor:
    """Return ``x + factor * y``, without a synchronisation; `balance` gives the factor."""
    if isinstance(factor, Tensor):
        return torch.addcmul(x, y, factor.to(x.dtype))
    return torch.add(x, y, alpha=factor)


def balance(x: Tensor, tangent: Tensor) -> Tensor | float:
    """Return an estimate of |x| / |x'|, finite and positive.

    On a CPU it is a number; on other devices, where reading it would synchronise, a 0-d tensor.
    """
    if x.device.type == "cpu":
        length, other = float(_length(x)), float(_length(tangent))
        ratio = length / other if other else 0.0
        return ratio if 0 < ratio < math.inf else 1.0
    quotient = _length(x) / _length(tangent)
    usable = torch.isfinite(quotient) & (quotient > 0)
    return torch.where(usable, quotient, torch.ones_like(quotient))


def _length(t: Tensor) -> Tensor:
    """Return the root mean square, estimated from a sample that covers as many rows as it can."""
    step, index = max(1, t.numel() // 4096), []
    for size in reversed(t.shape):
        skip = max(1, min(step, size))
        index.append(slice(None, None, skip))
        step = math.ceil(step / skip)
    sample = t[tuple(reversed(index))]
    wide = torch.float32 if t.dtype in HALF else t.dtype
    norm: Tensor = torch.linalg.vector_norm(sample, dtype=wide)
    return norm / math.sqrt(max(1, sample.numel()))
