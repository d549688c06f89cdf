"""Sums, means, maxima, pools, softmax and normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.torch.replay.harness import Case, case

_S = (3, 4)
_MEAN, _VAR = torch.linspace(-1, 1, 4).double(), torch.linspace(0.5, 2, 4).double()
_DEAD = torch.zeros(_S).masked_fill(torch.tensor([[True], [False], [False]]), -torch.inf)


_MASK_OF_CHANNELS = torch.tensor([1.0, 0.0, 1.0, 0.0])


def _batch_norm(**options: Any) -> Any:
    def normalised(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        buffers = (_MEAN.clone(), _VAR.clone()) if options.get("buffers", True) else (None, None)
        return F.batch_norm(x, *buffers, w, b, options.get("training", True), eps=1e-2)

    return normalised


def _bias_alone(x: Tensor, b: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, None, b, training=True)


CASES: list[Case] = [
    case("Add", lambda a, b: a + b, _S, _S),
    case("Add", lambda a, b: a + b, (3, 1), (4,), label="broadcast"),
    case("Add", lambda a, b: torch.add(a, b, alpha=-1.7), _S, (), label="alpha"),
    case("Add", lambda a: a + 2.5, _S, label="number"),
    case("AddBackward1", lambda a: torch.ops.aten.add.Scalar(a, 2.5, 2), _S),
    case("Sub", lambda a, b: a - b, _S, _S),
    case("Sub", lambda a, b: a - b, (4,), (3, 1), label="broadcast"),
    case("Sub", lambda a, b: torch.sub(a, b, alpha=-1.7), (), _S, label="alpha"),
    case("SubBackward1", lambda a: torch.ops.aten.sub.Scalar(a, 2.5, 2), _S),
    case("Rsub", lambda a, b: torch.rsub(a, b), _S, _S),
    case("Rsub", lambda a, b: torch.rsub(a, b, alpha=-1.7), (3, 1), (4,), label="alpha"),
    case("RsubBackward1", lambda a: 2.5 - a, _S),
    case("RsubBackward1", lambda a: torch.rsub(a, 2.5, alpha=3), _S, label="alpha"),
    case("Sum", torch.sum, _S),
    case("SumBackward1", lambda x: x.sum(-1), _S),
    case("SumBackward1", lambda x: x.sum((0, 2), keepdim=True), (2, 3, 4), label="kept"),
    case("SumBackward1", lambda x: x.sum((), keepdim=True), _S, label="no dimension, kept"),
    case("Mean", torch.mean, _S),
    case("MeanBackward1", lambda x: x.mean(0), _S),
    case("MeanBackward1", lambda x: x.mean((0, -1), keepdim=True), (2, 3, 4), label="kept"),
    case("MeanBackward1", lambda x: x.mean((), keepdim=True), _S, label="no dimension, kept"),
    *(
        case(name, lambda x, f=f, d=d, k=k: f(x, d, keepdim=k), (2, 3, 4), domain="apart",
             label=f"{d} {k}")
        for name, f in (("Amax", torch.amax), ("Amin", torch.amin))
        for d, k in ((-1, False), ((0, -1), False), ((0, 2), True), ((), False))
    ),
    case("Amax", lambda x: x.repeat(2, 1).amax(0), _S, domain="apart", label="equal ones"),
    *(
        case(name, lambda x, f=f, k=k: f(x, 0, keepdim=k)[0], _S, domain="apart", label=f"{k}")
        for name, f in (("Max", torch.max), ("Min", torch.min))
        for k in (False, True)
    ),
    case("Max", lambda x: x.max(0)[0], (), domain="apart", label="number"),
    case("Sort", lambda x: x.sort(0, descending=True)[0], _S, domain="apart"),
    case("SortBackward1", lambda x: torch.sort(x, stable=True, dim=0)[0], _S, domain="apart"),
    case("Topk", lambda x: x.topk(2, -1)[0], _S, domain="apart"),
    case("Topk", lambda x: x.topk(2, 0, largest=False)[0], _S, domain="apart", label="smallest"),
    case("MaxPool2DWithIndices", lambda x: F.max_pool2d(x, 2), (2, 2, 4, 5), domain="apart"),
    case("MaxPool2DWithIndices", lambda x: F.max_pool2d(x, 3, 2, 1, 1, True), (2, 4, 5),
         domain="apart", label="overlapping"),
    case("MaxPool2DWithIndices", lambda x: F.max_pool1d(x, 2), (2, 2, 5), domain="apart",
         label="one dimension"),
    case("AdaptiveMaxPool2D", lambda x: F.adaptive_max_pool2d(x, (2, 3)), (2, 2, 4, 5),
         domain="apart"),
    case("AvgPool2D", lambda x: F.avg_pool2d(x, 2), (2, 2, 4, 5)),
    case("AvgPool2D", lambda x: F.avg_pool2d(x, (3, 2), 2, 1, True, False), (2, 4, 5),
         label="without padding"),
    case("AvgPool2D", lambda x: F.avg_pool2d(x, 2, divisor_override=3), (1, 2, 4, 5),
         label="divisor"),
    case("AvgPool2D", lambda x: F.avg_pool1d(x, 2), (2, 2, 5), label="one dimension"),
    case("AdaptiveAvgPool2D", lambda x: F.adaptive_avg_pool2d(x, (2, 3)), (2, 2, 4, 5)),
    case("Softmax", lambda x: x.softmax(-1), _S),
    case("Softmax", lambda x: x.softmax(1), (2, 3, 4), label="middle"),
    case("SafeSoftmax", lambda x: torch._safe_softmax(x, -1), _S),
    case("SafeSoftmax", lambda x: torch._safe_softmax(x + _DEAD, -1), _S, label="masked row"),
    case("LogSoftmax", lambda x: x.log_softmax(-1), _S),
    case("LogSoftmax", lambda x: x.log_softmax(0), (2, 3, 4), label="first"),
    case("Logsumexp", lambda x: x.logsumexp(-1), _S),
    case("Logsumexp", lambda x: x.logsumexp((0, 2)), (2, 3, 4), label="several"),
    case("Logsumexp", lambda x: x.logsumexp((0, -1), keepdim=True), (2, 3, 4), label="kept"),
    case("NativeLayerNorm", lambda x, w, b: F.layer_norm(x, (4,), w, b), (2, 3, 4), (4,), (4,)),
    case("NativeLayerNorm", lambda x: F.layer_norm(x, (3, 4)), (2, 3, 4), label="not affine"),
    case("NativeLayerNorm", lambda x, w: F.layer_norm(x, (3, 4), w, eps=0.1), (2, 3, 4), (3, 4),
         label="no bias"),
    case("NativeLayerNorm", lambda x, b: F.layer_norm(x, (4,), None, b), (2, 3, 4), (4,),
         label="no weight"),
    case("NativeGroupNorm", lambda x, w, b: F.group_norm(x, 2, w, b), (2, 4, 3, 2), (4,), (4,)),
    case("NativeGroupNorm", lambda x: F.group_norm(x, 1), (2, 4, 3), label="not affine"),
    case("NativeGroupNorm", lambda x, w: F.group_norm(x, 2, w, eps=0.1), (3, 4), (4,),
         label="no bias"),
    case("NativeBatchNorm", _batch_norm(), (5, 4), (4,), (4,)),
    case("NativeBatchNorm", _batch_norm(), (3, 4, 2, 3), (4,), (4,), label="images"),
    case("NativeBatchNorm", _batch_norm(), (3, 4, 2), label="not affine"),
    case("NativeBatchNorm", _batch_norm(buffers=False), (3, 4, 2), (4,), (4,), label="no buffers"),
    case("NativeBatchNorm", _batch_norm(), (3, 4, 2), (4,), label="no bias"),
    case("NativeBatchNorm", _bias_alone, (3, 4, 2), (4,), label="no weight"),
    case("NativeBatchNorm", lambda x, w, b: _batch_norm()(x, w * _MASK_OF_CHANNELS, b), (3, 4, 2),
         (4,), (4,), label="weights of zero"),
    case("NativeBatchNorm", _batch_norm(training=False), (3, 4, 2), (4,), (4,), label="eval"),
    case("NativeBatchNorm", _batch_norm(training=False), (3, 4), label="eval, not affine"),
    case("NativeBatchNorm", F.instance_norm, (2, 4, 3), label="instance norm"),
    *(
        case("WeightNormInterface", lambda v, g, d=d: torch._weight_norm(v, g, d), shape, size,
             label=f"{d}")
        for shape, size, d in (
            ((3, 4), (3, 1), 0), ((3, 4), (1, 4), 1), ((3, 2, 4), (3, 1, 1), 0),
            ((3, 2, 4), (1, 1, 4), 2),
        )
    ),
]  # fmt: skip
