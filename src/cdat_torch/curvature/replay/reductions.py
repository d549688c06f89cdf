"""Sums and differences, and reductions: sum, mean, maximum, sorting, pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cdat_torch.curvature.replay.registry import Node, Tangent, linear


@linear("AddBackward0", "SubBackward0")
def add(node: Node, da: Tangent, db: Tangent) -> Tensor:
    """A + alpha b, or a - alpha b."""
    alpha = node.saved("alpha") * (-1 if node.name.startswith("Sub") else 1)
    if db is None:
        assert da is not None
        return da.expand(node.shape())
    if da is None:
        return (db if alpha == 1 else db * alpha).expand(node.shape())
    return torch.add(da, db, alpha=alpha)


@linear("AddBackward1", "SubBackward1")
def add_constant(node: Node, da: Tensor) -> Tensor:
    """A plus a number."""
    return da


@linear("RsubBackward0")
def subtract_from(node: Node, da: Tangent, db: Tangent) -> Tensor:
    """B - alpha a."""
    alpha = node.saved("alpha")
    if da is None:
        assert db is not None
        return db.expand(node.shape())
    return (-alpha * da).expand(node.shape()) if db is None else torch.sub(db, da, alpha=alpha)


@linear("RsubBackward1")
def subtract_from_constant(node: Node, da: Tensor) -> Tensor:
    """A number minus alpha a."""
    tangent: Tensor = da * -node.saved("alpha")
    return tangent


@linear("SumBackward0")
def sum_all(node: Node, dx: Tensor) -> Tensor:
    """The sum of all elements."""
    return dx.sum(dtype=node.metadata().dtype)


@linear("SumBackward1")
def sum_some(node: Node, dx: Tensor) -> Tensor:
    """The sum over some dimensions."""
    dims = node.saved("dim")
    return dx.sum(dims or None, node.saved("keepdim"), dtype=node.metadata().dtype)


@linear("MeanBackward0")
def mean_all(node: Node, dx: Tensor) -> Tensor:
    """The mean of all elements."""
    return dx.mean(dtype=node.metadata().dtype)


@linear("MeanBackward1")
def mean_some(node: Node, dx: Tensor) -> Tensor:
    """The mean over some dimensions."""
    dims = node.saved("dim")
    return dx.mean(dims or None, node.saved("keepdim"), dtype=node.metadata().dtype)


@linear("AmaxBackward0", "AminBackward0")
def extreme(node: Node, dx: Tensor) -> Tensor:
    """The largest or smallest over some dimensions; ties share the derivative."""
    dims, keep = node.saved("dim") or tuple(range(dx.dim())), node.saved("keepdim")
    y = node.saved("result")
    if not keep:
        for dim in sorted(d % dx.dim() for d in dims):
            y = y.unsqueeze(dim)
    chosen = (node.saved("self") == y).to(dx.dtype)
    share = chosen / chosen.sum(dims, keepdim=True)
    tangent: Tensor = (share * dx).sum(dims, keepdim=keep)
    return tangent


@linear("MaxBackward0", "MinBackward0")
def extreme_along(node: Node, dx: Tensor) -> Tensor:
    """The largest or smallest of one dimension, with its index."""
    dim, keep = node.saved("dim"), node.saved("keepdim")
    chosen = node.saved("indices")
    if dx.dim() == 0:
        return dx
    found = dx.gather(dim, chosen if keep else chosen.unsqueeze(dim))
    return found if keep else found.squeeze(dim)


@linear("SortBackward0", "SortBackward1", "TopkBackward0")
def sort(node: Node, dx: Tensor) -> Tensor:
    """Elements in order."""
    return dx.gather(node.saved("dim"), node.saved("indices"))


@linear("MaxPool2DWithIndicesBackward0", "AdaptiveMaxPool2DBackward0")
def max_pool(node: Node, dx: Tensor) -> Tensor:
    """The largest of each window."""
    chosen = node.saved("result1")
    return dx.flatten(-2).gather(-1, chosen.flatten(-2)).view(node.shape())


@linear("AvgPool2DBackward0")
def avg_pool(node: Node, dx: Tensor) -> Tensor:
    """The mean of each window."""
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
             "divisor_override")  # fmt: skip
    arguments: Any = [node.saved(name) for name in names]
    return torch.nn.functional.avg_pool2d(dx, *arguments)


@linear("AdaptiveAvgPool2DBackward0")
def adaptive_avg_pool(node: Node, dx: Tensor) -> Tensor:
    """The mean of each window, for a given number of windows."""
    return torch.nn.functional.adaptive_avg_pool2d(dx, (node.shape()[-2], node.shape()[-1]))
