"""Operations that are left to their own double backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.torch.replay.harness import Case, case

_S = (3, 4)
_MASK = torch.rand(_S, generator=torch.Generator().manual_seed(1)) < 0.4
_PLACES = torch.tensor([[0, 2], [1, 3], [3, 0]])

_CHOSEN = torch.tensor([0, 3, 9, 14])


def _regular(x: Tensor) -> Tensor:
    return x + 5 * torch.eye(3, dtype=x.dtype)


def _factor(x: Tensor) -> Tensor:
    return torch.linalg.cholesky(x @ x.mT + torch.eye(3, dtype=x.dtype))


def _written(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    z[:, 1:3] = y
    return z


def _scaled_in_place(x: Tensor) -> Tensor:
    z = x * 1
    z[:, 0].mul_(x[:, 1].sin())
    return z


# PyTorch 2.15 and later fill where a mask is True instead of putting at its indices.
_MASKED_IN_PLACE = "MaskedFill" if torch.__version__ >= (2, 15) else "IndexPut"


def _masked_in_place(x: Tensor) -> Tensor:
    z = x * 1
    z[_MASK] = 0.5
    return z


def _rrelu(x: Tensor) -> Tensor:
    torch.manual_seed(5)
    return F.rrelu(x, training=True)


CASES: list[Case] = [
    case("Addcdiv", lambda a, b, c: torch.addcdiv(a, b, c, value=1.7), _S, _S, _S,
         domain="positive"),
    case("Addcmul", lambda a, b, c: torch.addcmul(a, b, c, value=1.7), _S, (4,), (3, 1)),
    case("Addmv", lambda b, x, w: torch.addmv(b, x, w, alpha=1.7, beta=0.6), (3,), _S, (4,)),
    case("Atan2", torch.atan2, _S, _S, domain="apart"),
    case("Atan", torch.atan, _S),
    case("AvgPool3D", lambda x: F.avg_pool3d(x, 2), (1, 2, 4, 4, 4)),
    case("AdaptiveAvgPool3D", lambda x: F.adaptive_avg_pool3d(x, 2), (1, 2, 3, 4, 5)),
    case("Clamp", torch.clamp, _S, (4,), (), domain="apart"),
    case("Clamp", lambda x, low: torch.clamp(x, low), _S, (4,), domain="apart", label="below"),
    case("ClampMinBackward1", torch.clamp_min, _S, (4,), domain="apart"),
    case("ClampMaxBackward1", torch.clamp_max, _S, (4,), domain="apart"),
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
    case("Acos", torch.acos, _S, domain="unit"),
    case("Acosh", lambda x: torch.acosh(1 + x), _S, domain="positive"),
    case("AdaptiveMaxPool3D", lambda x: F.adaptive_max_pool3d(x, 2), (1, 2, 3, 4, 2),
         domain="apart"),
    case("Addbmm", lambda b, x, w: torch.addbmm(b, x, w, alpha=1.7, beta=0.6), (4,), (2, 3, 2),
         (2, 2, 4)),
    case("Addr", lambda b, x, w: torch.addr(b, x, w, alpha=1.7, beta=0.6), _S, (3,), (4,)),
    case("AffineGridGenerator", lambda t: F.affine_grid(t, (1, 1, 2, 3), align_corners=False),
         (1, 2, 3)),
    case("Aminmax", torch.aminmax, _S, domain="apart"),
    case("AsStrided", lambda x: x.contiguous().as_strided((3, 2), (2, 1)), _S),
    case("Asin", torch.asin, _S, domain="unit"),
    case("Asinh", torch.asinh, _S),
    case("Atanh", torch.atanh, _S, domain="unit"),
    case("BlockDiag", torch.block_diag, _S, (2, 2)),
    case("Ceil", torch.ceil, _S, domain="apart"),
    case("Celu", lambda x: F.celu(x, 0.7), _S, domain="apart"),
    case("ChannelShuffle", lambda x: F.channel_shuffle(x, 2), (1, 4, 3, 2)),
    case("CholeskyInverse", lambda x: torch.cholesky_inverse(_factor(x)), (3, 3)),
    case("CholeskySolve", lambda b, x: torch.cholesky_solve(b, _factor(x)), (3, 2), (3, 3)),
    case("torch::autograd::CopySlices", _written, _S, (3, 2)),
    case("torch::autograd::CopySlices", lambda x: _scaled_in_place(x), _S, label="view"),
    case("Copysign", torch.copysign, _S, (4,), domain="apart"),
    case("Cummax", lambda x: x.cummax(-1)[0], _S, domain="apart"),
    case("Cummin", lambda x: x.cummin(0)[0], _S, domain="apart"),
    case("Deg2Rad", torch.deg2rad, _S),
    case("DiagEmbed", torch.diag_embed, _S),
    case("DiagonalScatter", torch.diagonal_scatter, (3, 3), (3,)),
    case("Digamma", torch.digamma, _S, domain="positive"),
    case("Dist", lambda a, b: torch.dist(a, b), _S, (4,), domain="apart"),
    case("DivBackward2", lambda a, b: torch.div(a, b, rounding_mode="floor"), _S, (4,),
         domain="apart"),
    case("Erfc", torch.erfc, _S),
    case("Erfinv", torch.erfinv, _S, domain="unit"),
    case("Exp2", torch.exp2, _S),
    case("Floor", torch.floor, _S, domain="apart"),
    case("Fmax", torch.fmax, _S, (4,), domain="apart"),
    case("Fmin", torch.fmin, _S, (4,), domain="apart"),
    case("FmodBackward1", torch.fmod, _S, (4,), domain="apart"),
    case("Frac", torch.frac, _S, domain="apart"),
    case("FractionalMaxPool2D", lambda x: F.fractional_max_pool2d(
        x, 2, (2, 2), _random_samples=torch.full((1, 2, 2), 0.3, dtype=x.dtype)), (1, 2, 4, 5),
        domain="apart"),
    case("FractionalMaxPool3D", lambda x: F.fractional_max_pool3d(
        x, 2, (2, 2, 2), _random_samples=torch.full((1, 2, 3), 0.3, dtype=x.dtype)),
        (1, 2, 4, 4, 4), domain="apart"),
    case("GridSampler2D", lambda x, grid: F.grid_sample(x, grid.tanh(), align_corners=False),
         (1, 2, 4, 3), (1, 3, 2, 2)),
    case("Hardshrink", F.hardshrink, _S, domain="apart"),
    case("Hypot", torch.hypot, _S, (4,), domain="apart"),
    case("IndexCopy", lambda x, y: x.index_copy(1, torch.tensor([3, 0]), y), _S, (3, 2)),
    case("IndexFill", lambda x: x.index_fill(1, torch.tensor([3, 0]), 0.5), _S),
    case("IndexPut", lambda x, y: x.index_put((torch.tensor([2, 0]),), y), _S, (2, 4)),
    case("IndexPut", lambda x, y: x.index_put((torch.tensor([2, 2]),), y, accumulate=True), _S,
         (2, 4), label="accumulated"),
    case(_MASKED_IN_PLACE, lambda x: _masked_in_place(x), _S, label="masked in place"),
    case("Kthvalue", lambda x: x.kthvalue(2)[0], _S, domain="apart"),
    case("Lgamma", torch.lgamma, _S, domain="positive"),
    case("LinalgCholeskyEx", lambda x: _factor(x), (3, 3)),
    case("LinalgCross", torch.linalg.cross, (4, 3), (4, 3)),
    case("LinalgDet", torch.linalg.det, (3, 3)),
    case("LinalgEigh", lambda x: torch.linalg.eigvalsh(x + x.mT), (3, 3)),
    case("LinalgHouseholderProduct", torch.linalg.householder_product, (4, 2), (2,)),
    case("LinalgInvEx", lambda x: torch.linalg.inv(_regular(x)), (3, 3)),
    case("LinalgMatrixExp", torch.linalg.matrix_exp, (3, 3)),
    case("LinalgPinv", torch.linalg.pinv, (4, 3), domain="apart"),
    case("LinalgQr", lambda x: torch.linalg.qr(x), (4, 3), domain="apart"),
    case("LinalgSlogdet", lambda x: torch.linalg.slogdet(_regular(x))[1], (3, 3)),
    case("LinalgSolveEx", lambda a, b: torch.linalg.solve(_regular(a), b), (3, 3), (3, 2)),
    case("LinalgSolveTriangular", lambda a, b: torch.linalg.solve_triangular(
        _regular(a).tril(), b, upper=False), (3, 3), (3, 2)),
    case("LinalgSvd", torch.linalg.svdvals, _S, domain="apart"),
    case("Logaddexp2", torch.logaddexp2, _S, (4,)),
    case("Logcumsumexp", lambda x: x.logcumsumexp(0), _S),
    case("Logit", torch.logit, _S, domain="unit"),
    case("MaskedScatter", lambda x, y: x.masked_scatter(_MASK, y), _S, _S),
    case("MaskedSelect", lambda x: x.masked_select(_MASK), _S),
    case("MaxUnpool2D", lambda x: F.max_unpool2d(x, _CHOSEN.view(1, 1, 2, 2), 2), (1, 1, 2, 2)),
    case("MaxUnpool3D", lambda x: F.max_unpool3d(x, _CHOSEN.view(1, 1, 1, 2, 2), (1, 2, 2)),
         (1, 1, 1, 2, 2)),
    case("MedianBackward1", lambda x: x.median(-1)[0], _S, domain="apart"),
    case("NanToNum", torch.nan_to_num, _S),
    case("Nansum", torch.nansum, _S),
    case("NormBackward1", lambda x, y: F.pairwise_distance(x, y), _S, _S, domain="apart"),
    case("PackPaddedSequence", lambda x: torch.nn.utils.rnn.pack_padded_sequence(
        x, torch.tensor([3, 1]))[0], (3, 2, 2)),
    case("Rad2Deg", torch.rad2deg, _S),
    case("ReflectionPad3D", lambda x: F.pad(x, (1,) * 6, mode="reflect"), (1, 1, 2, 3, 2)),
    case("ReplicationPad3D", lambda x: F.pad(x, (1,) * 6, mode="replicate"), (1, 1, 2, 3, 2)),
    case("Remainder", lambda x: torch.remainder(x, 0.7), _S, domain="apart"),
    case("Rot90", torch.rot90, _S),
    case("Round", torch.round, _S, domain="apart"),
    case("RreluWithNoise", _rrelu, _S, domain="apart"),
    case("ScatterBackward1", lambda x: x.scatter(1, _PLACES, 0.5), _S),
    *(
        case("ScatterReduce", lambda x, y, r=r: x.scatter_reduce(1, _PLACES, y, r), _S, (3, 2),
             domain="apart", label=r)
        for r in ("sum", "mean", "amax")
    ),
    case("SelectScatter", lambda x, y: torch.select_scatter(x, y, 0, 1), _S, (4,)),
    case("Sign", torch.sign, _S, domain="apart"),
    case("Sinc", torch.sinc, _S, domain="apart"),
    case("SliceScatter", lambda x, y: torch.slice_scatter(x, y, 0, 0, 2), _S, (2, 4)),
    case("SoftMarginLoss", lambda x: F.soft_margin_loss(x, 1 - 2 * _MASK.double()), _S),
    case("Softshrink", F.softshrink, _S, domain="apart"),
    case("SparseAddmm", lambda x: torch.sparse.mm(torch.eye(3).double().to_sparse(), x), _S),
    case("SpecialEntr", torch.special.entr, _S, domain="positive"),
    case("SpecialLogNdtr", torch.special.log_ndtr, _S),
    case("Trace", torch.trace, (3, 3)),
    case("Trilinear", F.bilinear, (2, 3), (2, 4), (2, 3, 4)),
    case("Trunc", torch.trunc, _S, domain="apart"),
    case("UpsampleBilinear2DAa", lambda x: F.interpolate(
        x, size=(2, 3), mode="bilinear", antialias=True), (1, 1, 4, 5)),
    case("UpsampleNearest3D", lambda x: F.interpolate(x, scale_factor=2), (1, 1, 2, 2, 2)),
    case("UpsampleNearestExact2D", lambda x: F.interpolate(
        x, scale_factor=2, mode="nearest-exact"), (1, 1, 2, 3)),
    case("UpsampleTrilinear3D", lambda x: F.interpolate(
        x, scale_factor=2, mode="trilinear"), (1, 1, 2, 2, 2)),
    case("Vdot", torch.vdot, (5,), (5,)),
    case("Xlogy", torch.xlogy, _S, (4,), domain="positive"),
    case("EluBackward1", lambda x: F.elu_(x * x - 1, 0.8), _S),
]  # fmt: skip
