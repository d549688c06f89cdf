"""Inner products and scaled sums, accurate and without surplus memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Long float32 sums lose digits, and second-order terms cancel: the parts are summed in float64.
CHUNK = 2**15
HALF = (torch.bfloat16, torch.float16)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of ``a * b``, 0-d; float64 for what is longer than a chunk."""
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
    """Return both flattened in the same order, without a copy if they are laid out alike."""
    if a.dim() > 1 and not a.is_contiguous() and a.stride() == b.stride():
        strides = a.stride()
        order = sorted(range(a.dim()), key=lambda i: -strides[i])
        a, b = a.permute(order), b.permute(order)
    elif a.dim() == 2 and not b.is_contiguous() and b.t().is_contiguous():
        a, b = a.t(), b.t()
    return a.reshape(-1), b.reshape(-1)


def add_scaled(x: Tensor, factor: Tensor, y: Tensor) -> Tensor:
    """Return ``x + factor * y`` for a 0-d factor, without waiting for a device."""
    if factor.device.type == "cpu":
        return torch.add(x, y, alpha=float(factor))
    return torch.addcmul(x, y, factor.to(x.dtype))


def balance(x: Tensor, tangent: Tensor) -> Tensor:
    """Return about the length of `x` over that of its tangent, 0-d, finite and positive."""
    ratio = _length(x) / _length(tangent)
    usable = torch.isfinite(ratio) & (ratio > 0)
    return torch.where(usable, ratio, torch.ones_like(ratio))


def _length(t: Tensor) -> Tensor:
    flat = (t if t.is_contiguous() else t.reshape(-1)).reshape(-1)
    sample: Tensor = flat[:: max(1, math.ceil(flat.numel() / 4096))]
    norm: Tensor = torch.linalg.vector_norm(
        sample, dtype=torch.promote_types(t.dtype, torch.float32)
    )
    return norm
