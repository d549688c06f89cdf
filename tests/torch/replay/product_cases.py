"""Matrix products, convolutions, quotients, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.torch.replay.harness import Case, case

_S = (3, 4)
_LENGTH = 150  # more than one block of rows
_ATTENTION = "ScaledDotProductFlashAttentionForCpu"


def _bias(length: int) -> Tensor:
    return torch.randn(length, length, generator=torch.Generator().manual_seed(2)).double()


def _attend(**options: Any) -> Any:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def _masked_by(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


def _qkv(length: int, heads: int = 2, batch: int = 1) -> tuple[tuple[int, ...], ...]:
    return ((batch, heads, length, 3),) * 3


CASES: list[Case] = [
    case("Mm", torch.mm, _S, (4, 5)),
    case("Mm", torch.mm, (3, 3), (3, 3), label="square"),
    case("Mm", lambda x, w: x @ w.t(), _S, (5, 4), label="transposed"),
    case("Mm", lambda x, w: F.linear(x, w), (2, 3, 4), (5, 4), label="linear"),
    case("Bmm", torch.bmm, (2, 3, 4), (2, 4, 5)),
    case("Bmm", lambda x, w: x @ w, (2, 3, 4), (2, 1, 4, 5), label="broadcast"),
    case("Bmm", lambda a, b: torch.einsum("bij,bkj->bik", a, b), (2, 3, 3), (2, 3, 3),
         label="einsum"),
    *(
        case("Addmm", lambda b, x, w, k=k: torch.addmm(b, x, w, **k), shape, _S, (4, 5),
             label=f"{shape} {k}")
        for shape in ((5,), (3, 5), (3, 1), ())
        for k in ({}, {"alpha": -1.7}, {"beta": 0.6, "alpha": 1.3})
    ),
    case("Addmm", lambda x, w, b: F.linear(x, w, b), _S, (5, 4), (5,), label="linear"),
    *(
        case("Baddbmm", lambda b, x, w, k=k: torch.baddbmm(b, x, w, **k), shape, (2, 3, 4),
             (2, 4, 5), label=f"{shape} {k}")
        for shape in ((5,), (2, 3, 5))
        for k in ({}, {"beta": 0.6, "alpha": -1.7})
    ),
    *(
        case("Convolution", lambda x, w, b, f=f, k=k: f(x, w, b, **k), x, w, b, label=label)
        for label, f, x, w, b, k in (
            ("1d", F.conv1d, (2, 3, 7), (4, 3, 3), (4,), {"padding": 1}),
            ("2d", F.conv2d, (2, 3, 6, 5), (4, 3, 3, 2), (4,), {"stride": 2, "padding": (1, 0)}),
            ("3d", F.conv3d, (1, 2, 3, 4, 3), (2, 2, 2, 2, 2), (2,), {}),
            ("dilated", F.conv2d, (1, 2, 6, 6), (3, 2, 2, 2), (3,), {"dilation": 2}),
            ("in groups", F.conv2d, (1, 4, 4, 4), (6, 2, 3, 3), (6,), {"groups": 2}),
            ("depthwise", F.conv2d, (2, 4, 4, 4), (4, 1, 3, 3), (4,), {"groups": 4, "padding": 1}),
            ("transposed", F.conv_transpose2d, (1, 3, 3, 4), (3, 2, 2, 2), (2,), {"stride": 2}),
            ("transposed in groups", F.conv_transpose1d, (2, 4, 5), (4, 2, 3), (4,),
             {"stride": 2, "groups": 2, "output_padding": 1, "padding": 1, "dilation": 2}),
            ("not batched", F.conv2d, (3, 5, 5), (2, 3, 3, 3), (2,), {}),
        )
    ),
    case("Convolution", lambda x, w: F.conv2d(x, w), (2, 3, 4, 4), (2, 3, 2, 2), label="no bias"),
    case("Convolution", lambda x, w: F.conv2d(x.contiguous(memory_format=torch.channels_last), w),
         (2, 3, 4, 4), (2, 3, 3, 3), label="channels last"),
    case("Mul", lambda a, b: a * b, _S, _S),
    case("Mul", lambda a, b: a * b, (3, 1), (4,), label="broadcast"),
    case("Mul", lambda a, b: a * b, (), _S, label="with a number"),
    case("Mul", lambda a: a * 2.5, _S, label="number"),
    case("Div", lambda a, b: a / b, _S, _S, domain="apart"),
    case("Div", lambda a, b: a / b, (3, 1), (4,), domain="apart", label="broadcast"),
    case("Div", lambda a, b: a / b, _S, (), domain="positive", label="by a number"),
    case("Div", lambda a: a / 2.5, _S, label="number"),
    case(_ATTENTION, _attend(), *_qkv(_LENGTH)),
    case(_ATTENTION, _attend(is_causal=True), *_qkv(_LENGTH), label="causal"),
    case(_ATTENTION, _attend(attn_mask=_bias(_LENGTH)), *_qkv(_LENGTH), label="bias"),
    case(_ATTENTION, _attend(attn_mask=_bias(_LENGTH) > -1), *_qkv(_LENGTH), label="mask"),
    case(_ATTENTION, _attend(scale=0.9), *_qkv(5, batch=2), label="scale"),
    case(_ATTENTION, _attend(), (2, 2, 4, 3), (2, 2, 7, 3), (2, 2, 7, 3), label="across"),
    case(_ATTENTION, _attend(is_causal=True), (2, 2, _LENGTH, 3), (2, 2, 140, 3), (2, 2, 140, 3),
         label="across, causal"),
    case(_ATTENTION, _attend(enable_gqa=True, is_causal=True), (1, 4, _LENGTH, 3),
         (1, 2, _LENGTH, 3), (1, 2, _LENGTH, 3), label="grouped"),
    case(_ATTENTION, _attend(is_causal=True, attn_mask=None), *_qkv(45, batch=40),
         label="in parts of the batch"),
    case(_ATTENTION, _attend(enable_gqa=True), (2, 6, 5, 3), (2, 2, 5, 3), (2, 2, 5, 3),
         label="grouped, short"),
]  # fmt: skip
