"""Operations that are left to their own double backward."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tests.torch.replay.harness import Case, case

_S = (3, 4)
_MASK = torch.rand(_S, generator=torch.Generator().manual_seed(1)) < 0.4
_PLACES = torch.tensor([[0, 2], [1, 3], [3, 0]])


CASES: list[Case] = [
    case("Addcdiv", lambda a, b, c: torch.addcdiv(a, b, c, value=1.7), _S, _S, _S,
         domain="positive"),
    case("Addcmul", lambda a, b, c: torch.addcmul(a, b, c, value=1.7), _S, (4,), (3, 1)),
    case("Addmv", lambda b, x, w: torch.addmv(b, x, w, alpha=1.7, beta=0.6), (3,), _S, (4,)),
    case("Atan2", torch.atan2, _S, _S, domain="apart"),
    case("Atan", torch.atan, _S),
    case("AvgPool3D", lambda x: F.avg_pool3d(x, 2), (1, 2, 4, 4, 4)),
    case("AdaptiveAvgPool3D", lambda x: F.adaptive_avg_pool3d(x, 2), (1, 2, 3, 4, 5)),
    case("Cosh", torch.cosh, _S),
    case("Cumprod", lambda x: x.cumprod(-1), _S),
    case("Cumsum", lambda x: x.cumsum(0), _S),
    case("Diagonal", lambda x: x.diagonal(1), _S),
    case("Dot", torch.dot, (5,), (5,)),
    case("Expm1", torch.expm1, _S),
    case("Glu", F.glu, _S),
    case("Glu", lambda x: F.glu(x, 0), (4, 3), label="first"),
    case("Im2Col", lambda x: F.unfold(x, 2, padding=1), (1, 2, 4, 4)),
    case("Col2Im", lambda x: F.fold(x, (4, 4), 2), (1, 8, 9)),
    case("IndexAdd", lambda x, y: x.index_add(1, torch.tensor([0, 3, 0]), y, alpha=1.7), _S,
         (3, 3)),
    case("Lerp", lambda a, b: torch.lerp(a, b, 0.3), _S, _S),
    case("LerpBackward1", torch.lerp, _S, (4,), (3, 1)),
    case("LinalgVectorNorm", torch.linalg.vector_norm, _S),
    case("LinalgVectorNorm", lambda x: x.norm(dim=-1, keepdim=True), _S, label="kept"),
    case("LinalgVectorNorm", lambda x: torch.linalg.vector_norm(x, 3, 0), _S, domain="apart",
         label="of order 3"),
    case("LinalgVectorNorm", lambda x: torch.linalg.vector_norm(x, 1, 0), _S, domain="apart",
         label="of order 1"),
    case("Log10", torch.log10, _S, domain="positive"),
    case("Log2", torch.log2, _S, domain="positive"),
    case("Logaddexp", torch.logaddexp, _S, (4,)),
    case("MaxPool3DWithIndices", lambda x: F.max_pool3d(x, 2), (1, 2, 4, 4, 4), domain="apart"),
    case("Maximum", torch.maximum, _S, (3, 4)),
    case("Minimum", torch.minimum, _S, (4,)),
    case("MaxBackward1", torch.max, _S, domain="apart"),
    case("MinBackward1", torch.min, _S, domain="apart"),
    case("Mish", F.mish, _S),
    case("Mv", torch.mv, _S, (4,)),
    case("PixelShuffle", lambda x: F.pixel_shuffle(x, 2), (1, 4, 2, 3)),
    case("PixelUnshuffle", lambda x: F.pixel_unshuffle(x, 2), (1, 2, 4, 6)),
    case("PowBackward1", lambda a, p: a**p, _S, (4,), domain="positive"),
    case("PowBackward2", lambda p: 1.7**p, _S),
    case("PreluKernel", F.prelu, _S, (4,), domain="apart"),
    case("Prod", torch.prod, _S),
    case("ProdBackward1", lambda x: x.prod(-1), _S),
    case("ReflectionPad1D", lambda x: F.pad(x, (1, 2), mode="reflect"), (1, 2, 4)),
    case("ReflectionPad2D", lambda x: F.pad(x, (1, 2, 1, 0), mode="reflect"), (1, 2, 3, 4)),
    case("ReplicationPad1D", lambda x: F.pad(x, (1, 2), mode="replicate"), (1, 2, 4)),
    case("ReplicationPad2D", lambda x: F.pad(x, (1, 2, 1, 0), mode="replicate"), (1, 2, 3, 4)),
    case("Roll", lambda x: x.roll((1, -1), (0, 1)), _S),
    case("ScatterAdd", lambda x, y: x.scatter_add(1, _PLACES, y), _S, (3, 2)),
    case("Scatter", lambda x, y: x.scatter(1, _PLACES, y), _S, (3, 2)),
    case("Sinh", torch.sinh, _S),
    case("Std", torch.std, _S),
    case("Std", lambda x: x.std(-1, keepdim=True, correction=0), _S, label="kept"),
    case("StdMean", lambda x: torch.std_mean(x, 0), _S),
    case("Take", lambda x: x.take(torch.tensor([0, 7, 7])), _S),
    case("Tan", torch.tan, _S, domain="unit"),
    case("Unfold", lambda x: x.unfold(1, 2, 1), _S),
    case("UpsampleBicubic2D", lambda x: F.interpolate(x, size=(5, 6), mode="bicubic"),
         (1, 2, 3, 4)),
    case("UpsampleLinear1D", lambda x: F.interpolate(x, size=7, mode="linear"), (1, 2, 4)),
    case("UpsampleNearest1D", lambda x: F.interpolate(x, size=7), (1, 2, 4)),
    case("Var", torch.var, _S),
    case("Var", lambda x: x.var(0, correction=0), _S, label="of a dimension"),
    case("VarMean", lambda x: torch.var_mean(x, -1, keepdim=True), _S),
    case("MaskedFillBackward1", lambda x, v: x.masked_fill(_MASK, v), _S, ()),
    case("EluBackward1", lambda x: F.elu_(x * x - 1, 0.8), _S),
]  # fmt: skip
