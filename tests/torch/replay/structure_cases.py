"""Views, indexing, concatenation and padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.torch.replay.harness import Case, case

_S = (3, 4)
_MASK = torch.rand(_S, generator=torch.Generator().manual_seed(1)) < 0.4
_ROWS = torch.tensor([[2, 0, 2], [1, 4, 4]])


def in_place(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """Change a copy in place, because a leaf cannot be changed."""

    def changed(x: Tensor) -> Tensor:
        y = x * 1.5
        change(y)
        return y

    return changed


CASES: list[Case] = [
    case("View", lambda x: x.contiguous().view(2, 6), _S),
    case("View", lambda x: x.contiguous().view(-1), _S, label="flat"),
    case("UnsafeView", lambda x: torch.ops.aten._unsafe_view(x.contiguous(), [12]), _S),
    case("UnsafeView", lambda x: x.t().reshape(12), _S, label="reshape"),
    case("ReshapeAlias",
         lambda x: torch.ops.aten._reshape_alias(x.contiguous(), [2, 6], [6, 1]), _S),
    case("ReshapeCopy", lambda x: torch.ops.aten._reshape_copy(x, [2, 6]), _S),
    case("Unsqueeze", lambda x: x.unsqueeze(1), _S),
    case("UnsqueezeBackward1", in_place(lambda y: y.unsqueeze_(-1)), _S),
    case("Squeeze", lambda x: x.squeeze(), (1, 3, 1)),
    case("SqueezeBackward1", lambda x: x.squeeze(-1), (1, 3, 1)),
    case("SqueezeBackward2", lambda x: x.squeeze((0, 2)), (1, 3, 1)),
    case("SqueezeBackward3", in_place(lambda y: y.squeeze_()), (1, 3, 1)),
    case("SqueezeBackward4", in_place(lambda y: y.squeeze_(0)), (1, 3, 1)),
    case("SqueezeBackward5", in_place(lambda y: y.squeeze_((0, 2))), (1, 3, 1)),
    case("Alias", torch.ops.aten.alias, _S),
    case("Clone", torch.clone, _S),
    case("Clone", lambda x: x.t().contiguous(), _S, label="contiguous"),
    case("Clone", lambda x: x.contiguous(memory_format=torch.channels_last), (2, 3, 4, 5),
         label="channels last"),
    case("ToCopy", torch.ops.aten._to_copy, _S),
    case("T", lambda x: x.t(), _S),
    case("TBackward1", in_place(lambda y: y.t_()), _S),
    case("Transpose", lambda x: x.transpose(-1, 0), (2, 3, 4)),
    case("TransposeBackward1", in_place(lambda y: y.transpose_(0, -2)), (2, 3, 4)),
    case("Permute", lambda x: x.permute(2, 0, 1), (2, 3, 4)),
    case("Permute", lambda x: x.permute(-1, 0, -2), (2, 3, 4), label="negative"),
    case("Expand", lambda x: x.expand(5, -1, 4), (3, 1)),
    case("Expand", lambda x: x.expand(5, 2), (), label="number"),
    case("Repeat", lambda x: x.repeat(2, 3, 1), _S),
    case("Select", lambda x: x.select(-1, -2), _S),
    case("Slice", lambda x: x[:, 1:-1], _S),
    case("Slice", lambda x: x[..., -3::2], _S, label="step"),
    case("Slice", lambda x: x[-2:], _S, label="negative"),
    case("Unbind", lambda x: x.unbind(-1), _S),
    case("Unbind", lambda x: x.unbind(0)[1], _S, label="one of them"),
    case("Split", lambda x: x.split(3, -1), _S),
    case("Split", lambda x: x.chunk(2, 1)[0], _S, label="one of them"),
    case("UnsafeSplit", lambda x: torch.unsafe_split(x, 3, -1), _S),
    case("SplitWithSizes", lambda x: x.split([1, 3], -1), _S),
    case("UnsafeSplitWithSizes", lambda x: torch.unsafe_split_with_sizes(x, [1, 3], -1), _S),
    case("Cat", lambda a, b: torch.cat([a, b], -1), _S, (3, 2)),
    case("Cat", lambda a, b: torch.cat([a, b]), _S, _S, label="alike"),
    case("Cat", lambda a, b, c: torch.cat([a, b, c], -1), _S, (3, 2), (3, 1), label="three",
         falls_back=True),
    case("Cat", lambda a: torch.cat([a, a]), _S, label="itself"),
    case("Stack", lambda a, b: torch.stack([a, b], -1), _S, _S),
    case("Stack", lambda a, b, c: torch.stack([a, b, c], 1), _S, _S, _S, label="three"),
    case("Index", lambda x: x[torch.tensor([2, 0, 2])], _S),
    case("Index", lambda x: x[:, torch.tensor([3, 1])], _S, label="columns"),
    case("Index", lambda x: x[torch.tensor([2, 0]), torch.tensor([1, 1])], _S, label="pairs"),
    case("Index", lambda x: x[_MASK], _S, label="mask"),
    case("IndexSelect", lambda x: x.index_select(-1, torch.tensor([3, 0, 0])), _S),
    case("Gather", lambda x: x.gather(-1, torch.tensor([[0, 0], [2, 1], [3, 3]])), _S),
    case("Embedding", lambda w: F.embedding(_ROWS, w), (5, 3)),
    case("EmbeddingBag", lambda w: F.embedding_bag(_ROWS, w, mode="sum"), (5, 3)),
    case("EmbeddingBag", lambda w: F.embedding_bag(_ROWS, w, mode="mean", padding_idx=2), (5, 3),
         label="mean"),
    case("EmbeddingBag", lambda w: F.embedding_bag(
        _ROWS.flatten(), w, torch.tensor([0, 1, 4]), mode="mean"), (5, 3), label="offsets"),
    case("EmbeddingBag", lambda w: F.embedding_bag(
        _ROWS, w, mode="sum", per_sample_weights=_ROWS.double()), (5, 3), label="weighted"),
    case("MaskedFill", lambda x: x.masked_fill(_MASK, 2.0), _S),
    case("MaskedFill", lambda x: x.masked_fill(_MASK, 2.0), (1, 4), label="broadcast"),
    case("Where", lambda a, b: torch.where(_MASK, a, b), _S, _S),
    case("Where", lambda a, b: torch.where(_MASK, a, b), (3, 1), (), label="broadcast"),
    case("Where", lambda a: torch.where(_MASK, a, 2.0), _S, label="number"),
    case("Tril", lambda x: x.tril(-1), _S),
    case("Triu", lambda x: x.triu(1), _S),
    case("ConstantPadNd", lambda x: F.pad(x, (1, 2, 0, 1), value=3.0), _S),
    case("ConstantPadNd", lambda x: F.pad(x, (-1, 2)), _S, label="cropped"),
    case("Flip", lambda x: x.flip(0, -1), _S),
    case("UpsampleNearest2D", lambda x: F.interpolate(x, scale_factor=1.7), (1, 2, 3, 4)),
    case("UpsampleNearest2D", lambda x: F.interpolate(x, size=(5, 7)), (1, 2, 3, 4), label="size"),
    *(
        case("UpsampleBilinear2D",
             lambda x, a=a, k=k: F.interpolate(x, mode="bilinear", align_corners=a, **k),
             (1, 2, 3, 4), label=f"{a} {k}")
        for a in (False, True)
        for k in ({"scale_factor": 1.7}, {"size": (5, 7)})
    ),
]  # fmt: skip
