"""Linear operations that move elements: views, indexing, embeddings, concatenation, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdat_torch.curvature.replay.registry import Node, Tangent, linear

_BAG_MODES = {0: "sum", 1: "mean"}


@linear(
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ReshapeCopyBackward0",
    "UnsqueezeBackward0", "UnsqueezeBackward1", "SqueezeBackward0", "SqueezeBackward1",
    "SqueezeBackward2", "SqueezeBackward3", "SqueezeBackward4", "SqueezeBackward5",
)  # fmt: skip
def reshape(node: Node, dx: Tensor) -> Tensor:
    """The same elements in another shape."""
    return dx.reshape(node.shape())


@linear("AliasBackward0", "CloneBackward0")
def same(node: Node, dx: Tensor) -> Tensor:
    """The same elements."""
    return dx


@linear("ToCopyBackward0")
def to(node: Node, dx: Tensor) -> Tensor:
    """Another dtype or device."""
    like = node.metadata()
    return dx.to(dtype=like.dtype, device=like.device)


@linear("TBackward0", "TBackward1")
def t(node: Node, dx: Tensor) -> Tensor:
    """The transpose."""
    return dx.t()


@linear("TransposeBackward0", "TransposeBackward1")
def transpose(node: Node, dx: Tensor) -> Tensor:
    """Two dimensions swapped."""
    return dx.transpose(node.saved("dim0"), node.saved("dim1"))


@linear("PermuteBackward0")
def permute(node: Node, dx: Tensor) -> Tensor:
    """Dimensions in another order."""
    return dx.permute(node.saved("dims"))


@linear("ExpandBackward0")
def expand(node: Node, dx: Tensor) -> Tensor:
    """Repetition without a copy."""
    return dx.expand(node.shape())


@linear("RepeatBackward0")
def repeat(node: Node, dx: Tensor) -> Tensor:
    """Repetition."""
    return dx.repeat(node.saved("repeats"))


@linear("SelectBackward0")
def select(node: Node, dx: Tensor) -> Tensor:
    """One index of a dimension."""
    return dx.select(node.saved("dim"), node.saved("index"))


@linear("SliceBackward0")
def slice_(node: Node, dx: Tensor) -> Tensor:
    """A range of a dimension."""
    dim, step, length = node.saved("dim"), node.saved("step"), dx.shape[node.saved("dim")]
    start, end = node.saved("start"), node.saved("end")
    chosen = slice(0 if start is None else start, length if end is None else end, step)
    return dx[(slice(None),) * (dim % dx.dim()) + (chosen,)]


@linear("UnbindBackward0")
def unbind(node: Node, dx: Tensor) -> Sequence[Tensor]:
    """Each index of a dimension."""
    return dx.unbind(node.saved("dim"))


@linear("SplitBackward0", "UnsafeSplitBackward0")
def split(node: Node, dx: Tensor) -> Sequence[Tensor]:
    """Parts of equal size."""
    return torch.split(dx, node.saved("split_size"), node.saved("dim"))


@linear("SplitWithSizesBackward0", "UnsafeSplitWithSizesBackward0")
def split_with_sizes(node: Node, dx: Tensor) -> Sequence[Tensor]:
    """Parts of given sizes."""
    return torch.split(dx, list(node.saved("split_sizes")), node.saved("dim"))


@linear("CatBackward0")
def cat(node: Node, *parts: Tangent) -> Any:
    """Concatenation; the size of a constant part is not saved, but follows from the others."""
    dim = node.saved("dim")
    known = [part for part in parts if part is not None]
    if len(known) == len(parts):
        return torch.cat(known, dim)
    if len(parts) - len(known) > 1:
        return NotImplemented
    size = list(known[0].shape)
    size[dim] = node.shape()[dim] - sum(part.shape[dim] for part in known)
    zeros = known[0].new_zeros(size)
    return torch.cat([zeros if part is None else part for part in parts], dim)


@linear("StackBackward0")
def stack(node: Node, *parts: Tangent) -> Tensor:
    """Concatenation along a new dimension."""
    zero = torch.zeros_like(next(part for part in parts if part is not None))
    return torch.stack([zero if part is None else part for part in parts], node.saved("dim"))


@linear("IndexBackward0")
def index(node: Node, dx: Tensor) -> Tensor:
    """Elements at indices."""
    return dx[tuple(slice(None) if i is None else i for i in node.saved("indices"))]


@linear("IndexSelectBackward0")
def index_select(node: Node, dx: Tensor) -> Tensor:
    """Some indices of a dimension."""
    return dx.index_select(node.saved("dim"), node.saved("index"))


@linear("GatherBackward0")
def gather(node: Node, dx: Tensor) -> Tensor:
    """One element for each index."""
    return dx.gather(node.saved("dim"), node.saved("index"))


@linear("EmbeddingBackward0")
def embedding(node: Node, dx: Tensor) -> Tensor:
    """Rows of a table; the padding row is a constant."""
    rows = node.saved("indices")
    padding = node.saved("padding_idx")
    found = torch.nn.functional.embedding(rows, dx)
    return found if padding < 0 else found.masked_fill((rows == padding).unsqueeze(-1), 0)


@linear("EmbeddingBagBackward0")
def embedding_bag(node: Node, dx: Tensor, *weights: Tangent) -> Any:
    """Sums or means of rows of a table, also with constant weights; not maxima."""
    mode = node.saved("mode")
    if mode not in _BAG_MODES or any(weight is not None for weight in weights):
        return NotImplemented
    padding = node.saved("padding_idx")
    return torch.nn.functional.embedding_bag(
        node.saved("indices"), dx, node.saved("offsets"), mode=_BAG_MODES[mode],
        per_sample_weights=node.saved("per_sample_weights"),
        padding_idx=None if padding < 0 else padding,
    )  # fmt: skip


@linear("MaskedFillBackward0")
def masked_fill(node: Node, dx: Tensor) -> Tensor:
    """A constant number under a mask."""
    return dx.masked_fill(node.saved("mask"), 0)


@linear("WhereBackward0")
def where(node: Node, da: Tangent, db: Tangent) -> Tensor:
    """One of two, by a condition."""
    zero = node.zeros()
    return torch.where(
        node.saved("condition"), zero if da is None else da, zero if db is None else db
    )


@linear("TrilBackward0")
def tril(node: Node, dx: Tensor) -> Tensor:
    """The lower triangle."""
    return dx.tril(node.saved("diagonal"))


@linear("TriuBackward0")
def triu(node: Node, dx: Tensor) -> Tensor:
    """The upper triangle."""
    return dx.triu(node.saved("diagonal"))


@linear("ConstantPadNdBackward0")
def constant_pad(node: Node, dx: Tensor) -> Tensor:
    """Padding with a constant."""
    return torch.nn.functional.pad(dx, node.saved("pad"))


@linear("FlipBackward0")
def flip(node: Node, dx: Tensor) -> Tensor:
    """Dimensions reversed."""
    return dx.flip(node.saved("dims"))


@linear("UpsampleNearest2DBackward0")
def upsample_nearest(node: Node, dx: Tensor) -> Tensor:
    """Each pixel repeated."""
    return torch.ops.aten.upsample_nearest2d(  # type: ignore[no-any-return]
        dx, node.saved("output_size"), node.saved("scales_h"), node.saved("scales_w")
    )


@linear("UpsampleBilinear2DBackward0")
def upsample_bilinear(node: Node, dx: Tensor) -> Tensor:
    """Linear interpolation between pixels."""
    return torch.ops.aten.upsample_bilinear2d(  # type: ignore[no-any-return]
        dx,
        node.saved("output_size"),
        node.saved("align_corners"),
        node.saved("scales_h"),
        node.saved("scales_w"),
    )
