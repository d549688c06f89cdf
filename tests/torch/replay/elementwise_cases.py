"""Functions of one number."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.torch.replay.harness import Case, case

_S = (3, 4)


def _mask(p: float = 0.4) -> Tensor:
    return torch.rand(_S, generator=torch.Generator().manual_seed(1)) < p


def _dropout(x: Tensor) -> Tensor:
    torch.manual_seed(5)
    return torch.native_dropout(x, 0.4, True)[0]


CASES: list[Case] = [
    case("Relu", F.relu, _S, domain="apart"),
    case("LeakyRelu", lambda x: F.leaky_relu(x, 0.2), _S, domain="apart"),
    case("LeakyReluBackward1", lambda x: F.leaky_relu_(x * x - 2, 0.2), _S),
    case("Threshold", lambda x: F.threshold(x, 0.3, 7.0), _S, domain="apart"),
    case("ThresholdBackward1", lambda x: F.threshold_(x * x - 2, 0.3, 7.0), _S),
    case("Hardtanh", lambda x: F.hardtanh(x, -1.0, 0.6), _S, domain="apart"),
    case("Hardtanh", F.relu6, _S, domain="apart", label="relu6"),
    case("Hardtanh", lambda x: F.hardtanh_(x * x - 1), _S, label="in place"),
    case("Hardsigmoid", F.hardsigmoid, _S, domain="apart"),
    case("Abs", torch.abs, _S, domain="apart"),
    case("ClampBackward1", lambda x: x.clamp(-0.9, 0.6), _S, domain="apart"),
    case("ClampBackward1", lambda x: x.clamp(min=0.1), _S, domain="apart", label="below"),
    case("ClampMin", lambda x: torch.clamp_min(x, 0.1), _S, domain="apart"),
    case("ClampMax", lambda x: torch.clamp_max(x, 0.1), _S, domain="apart"),
    case("Neg", torch.neg, _S),
    case("MulBackward1", lambda x: torch.ops.aten.mul.Scalar(x, -1.7), _S),
    case("DivBackward1", lambda x: torch.ops.aten.div.Scalar(x, -1.7), _S),
    case("NativeDropout", _dropout, _S),
    case("Exp", torch.exp, _S),
    case("Log", torch.log, _S, domain="positive"),
    case("Log1P", torch.log1p, _S, domain="positive"),
    case("Sqrt", torch.sqrt, _S, domain="positive"),
    case("Rsqrt", torch.rsqrt, _S, domain="positive"),
    case("Reciprocal", torch.reciprocal, _S, domain="apart"),
    case("Sin", torch.sin, _S),
    case("Cos", torch.cos, _S),
    case("Tanh", torch.tanh, _S),
    case("Sigmoid", torch.sigmoid, _S),
    case("LogSigmoid", F.logsigmoid, _S),
    case("Silu", F.silu, _S),
    case("Softplus", F.softplus, _S),
    case("Softplus", lambda x: F.softplus(x, 2.5, 1.0), _S, domain="apart", label="threshold"),
    case("Hardswish", F.hardswish, (4, 7), domain="apart"),
    case("Elu", F.elu, _S, domain="apart"),
    case("Elu", lambda x: F.elu(x, 0.4), _S, domain="apart", label="alpha"),
    case("Elu", F.selu, _S, domain="apart", label="selu"),
    case("Gelu", F.gelu, _S),
    case("Gelu", lambda x: F.gelu(x, approximate="tanh"), _S, label="tanh"),
    case("Gelu", F.gelu, (3, 2**14), label="larger than a chunk"),
    case("Erf", torch.erf, _S),
    *(
        case("Pow", lambda x, p=p: x**p, _S, domain=domain, label=f"{p}")
        for p, domain in [
            (1, "real"), (2, "real"), (3, "real"), (-1, "apart"), (-2, "apart"),
            (0.5, "positive"), (1.5, "positive"), (-0.3, "positive"),
        ]
    ),
    case("Pow", torch.square, _S, label="square"),
]  # fmt: skip
