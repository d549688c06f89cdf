"""Losses that are one operation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.torch.replay.harness import Case, case

_S = (3, 4)
_CLASSES = torch.tensor([1, 3, 0])
_PIXELS = torch.tensor([[[1, 3], [0, 0]], [[2, 2], [3, 1]]])
_WEIGHT = torch.tensor([0.5, 2.0, 0.7, 1.3]).double()
_TARGET = torch.rand(_S, generator=torch.Generator().manual_seed(1)).double()
_REDUCTIONS = ("none", "mean", "sum")


def _bce(p: Tensor, **options: object) -> Tensor:
    return F.binary_cross_entropy(p, _TARGET, **options)  # type: ignore[arg-type]


def _logits(x: Tensor, **options: object) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, _TARGET, **options)  # type: ignore[arg-type]


CASES: list[Case] = [
    made
    for r in _REDUCTIONS
    for made in (
        case("NllLoss", lambda x, r=r: F.nll_loss(x, _CLASSES, reduction=r), _S, label=r),
        case("NllLoss", lambda x, r=r: F.nll_loss(x, _CLASSES, _WEIGHT, reduction=r), _S,
             label=f"{r} weight"),
        case("NllLoss", lambda x, r=r: F.nll_loss(x, _CLASSES, ignore_index=3, reduction=r), _S,
             label=f"{r} ignored"),
        case("NllLoss", lambda x, r=r: F.cross_entropy(x, _CLASSES, _WEIGHT, reduction=r,
             label_smoothing=0.1), _S, label=f"{r} smoothed"),
        case("NllLoss2D", lambda x, r=r: F.nll_loss(x, _PIXELS, reduction=r), (2, 4, 2, 2),
             label=r),
        case("NllLoss2D", lambda x, r=r: F.nll_loss(x, _PIXELS, _WEIGHT, ignore_index=0,
             reduction=r), (2, 4, 2, 2), label=f"{r} weight, ignored"),
        case("MseLoss", lambda x, t, r=r: F.mse_loss(x, t, reduction=r), _S, _S, label=r),
        case("SmoothL1Loss", lambda x, t, r=r: F.smooth_l1_loss(x, t, reduction=r, beta=0.7),
             _S, _S, label=r),
        case("HuberLoss", lambda x, t, r=r: F.huber_loss(x, t, reduction=r, delta=0.7), _S, _S,
             label=r),
        case("BinaryCrossEntropyWithLogits", lambda x, r=r: _logits(x, reduction=r), _S, label=r),
        case("BinaryCrossEntropyWithLogits",
             lambda x, r=r: _logits(x, weight=_WEIGHT, reduction=r), _S, label=f"{r} weight"),
        case("BinaryCrossEntropyWithLogits",
             lambda x, r=r: _logits(x, pos_weight=_WEIGHT, reduction=r), _S,
             label=f"{r} positives"),
        case("BinaryCrossEntropyWithLogits",
             lambda x, r=r: _logits(x, weight=_TARGET + 1, pos_weight=_WEIGHT, reduction=r), _S,
             label=f"{r} weight and positives"),
        case("BinaryCrossEntropy", lambda p, r=r: _bce(p, reduction=r), _S, domain="unit",
             label=r),
        case("BinaryCrossEntropy", lambda p, r=r: _bce(p, weight=_TARGET + 1, reduction=r), _S,
             domain="unit", label=f"{r} weight"),
    )
]  # fmt: skip
CASES += [
    case("NllLoss", lambda x: F.nll_loss(x, torch.tensor(2)), (4,), label="one example"),
    case(
        "SmoothL1Loss",
        lambda x: torch.ops.aten.smooth_l1_loss(x, _TARGET, 1, 0.0),
        _S,
        domain="apart",
        label="beta of 0",
    ),
]
