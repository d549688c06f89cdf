"""Whole networks, replayed against double backward of the same network.

The double backward runs attention by its math kernel; what it computes for single operations is
compared with differences of gradients in `test_rules`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cdat_torch.kernels import replayable
from tests.examples import examples
from tests.torch.replay.harness import names, norm, replay, vdot

Layer = Callable[[Tensor, Tensor], Tensor]


def twice(
    loss: Callable[[], Tensor], params: Sequence[Tensor], u: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return slope, curvature and a scale for their errors, by double backward."""
    with sdpa_kernel(SDPBackend.MATH), replayable():
        g = torch.autograd.grad(loss(), params, create_graph=True, allow_unused=True)
    moved = [(a, v) for a, v in zip(g, u, strict=True) if a is not None and a.requires_grad]
    product = torch.autograd.grad(
        [a for a, _ in moved], params, [v for _, v in moved], materialize_grads=True
    )
    g = [torch.zeros_like(p) if a is None else a.detach() for a, p in zip(g, params, strict=True)]
    return vdot(g, u), vdot(product, u), norm(u) * (norm(product) + norm(g))


ROWS, WIDTH = 6, 8
_CHOSEN = torch.tensor([3, 0, 0, 5, 2, 1])


def _square(w: Tensor) -> Tensor:
    return w.view(WIDTH, WIDTH)


def _heads(x: Tensor) -> Tensor:
    return x.view(1, ROWS, 2, WIDTH // 2).transpose(1, 2)


def _attend(x: Tensor, w: Tensor) -> Tensor:
    q, k = _heads(x @ _square(w)), _heads(x)
    y = F.scaled_dot_product_attention(q, k, _heads(x.tanh()), is_causal=True)
    return y.transpose(1, 2).reshape(ROWS, WIDTH)


def _recurrent(x: Tensor, w: Tensor) -> Tensor:
    state, found = torch.zeros_like(x[0]), []
    for row in x.unbind(0):
        state = torch.lerp(state, (row + _square(w) @ state).tanh(), w[:WIDTH].sigmoid())
        found.append(state)
    return torch.stack(found)


def _pooled(x: Tensor, w: Tensor) -> Tensor:
    image = F.pad(x.view(1, 2, ROWS, WIDTH // 2), (1, 1, 1, 1))
    y = F.max_pool2d(F.conv2d(image, w[:36].view(2, 2, 3, 3), w[36:38]).relu(), 2)
    return F.interpolate(y, scale_factor=2, mode="bilinear").reshape(ROWS, WIDTH)


LAYERS: dict[str, Layer] = {
    "linear": lambda x, w: F.linear(x, _square(w), w[:WIDTH]),
    "residual": lambda x, w: x + 0.5 * F.gelu(x @ _square(w)),
    "silu gate": lambda x, w: F.silu(x @ _square(w)) * x,
    "quotient": lambda x, w: x / (1 + (x @ _square(w)).square()),
    "layer norm": lambda x, w: F.layer_norm(x, (WIDTH,), w[:WIDTH], w[-WIDTH:]),
    "batch norm": lambda x, w: F.batch_norm(x, None, None, w[:WIDTH], w[-WIDTH:], training=True),
    "group norm": lambda x, w: F.group_norm(x, 2, w[:WIDTH], w[-WIDTH:]),
    "rms norm": lambda x, w: F.rms_norm(x, (WIDTH,), w[:WIDTH]),
    "unit length": lambda x, w: F.normalize(x * w[:WIDTH], dim=-1),
    "softmax": lambda x, w: (x * w[:WIDTH]).softmax(-1),
    "log softmax": lambda x, w: (x + w[:WIDTH]).log_softmax(0),
    "attention": _attend,
    "recurrence": _recurrent,
    "pooled convolution": _pooled,
    "convolution": lambda x, w: F.conv1d(x, w[:54].view(6, 3, 3), padding=1, groups=2),
    "embedding": lambda x, w: x + F.embedding(_CHOSEN, w.view(WIDTH, WIDTH)).sin(),
    "joined": lambda x, w: torch.cat([x.exp()[:, ::2], (x * w[:WIDTH])[:, 1::2]], -1),
    "chosen": lambda x, w: x[_CHOSEN].flip(-1) * w[:WIDTH] + x.sort(-1)[0],
    "extremes": lambda x, w: x.amax(-1, keepdim=True) * w[:WIDTH] - x.logsumexp(0),
    "statistics": lambda x, w: (x - x.mean(0)) * x.var(0).add(w[:WIDTH] ** 2 + 0.1).rsqrt(),
    "in place": lambda x, w: (x * w[:WIDTH]).add_(x).relu_(),
    "masked": lambda x, w: torch.where(x > 0, x.masked_fill(x > 1, 0.5), x.sin() * w[:WIDTH]),
}
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy": lambda y: F.cross_entropy(y, _CHOSEN, label_smoothing=0.1),
    "squares": lambda y: F.mse_loss(y, torch.ones_like(y)),
    "huber": lambda y: F.huber_loss(y, torch.ones_like(y)),
    "logits": lambda y: F.binary_cross_entropy_with_logits(y, torch.ones_like(y) / 3),
    "quartic": lambda y: (y**4).sum() ** 0.5,
}


@given(
    layers=st.lists(st.sampled_from(sorted(LAYERS)), min_size=2, max_size=6),
    loss=st.sampled_from(sorted(LOSSES)),
    tied=st.booleans(),
)
@examples(80)
def test_any_network(layers: list[str], loss: str, tied: bool) -> None:
    torch.manual_seed(len(layers))
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    new = lambda: (0.5 * torch.randn(WIDTH**2, dtype=torch.float64)).requires_grad_()
    params = [new()] if tied else [new() for _ in layers]

    def evaluate() -> Tensor:
        y = x
        for layer, w in zip(layers, params * len(layers) if tied else params, strict=False):
            y = LAYERS[layer](y, w)
        return LOSSES[loss](y)

    u = [torch.randn_like(p) for p in params]
    expected_slope, expected, scale = twice(evaluate, params, u)
    slope, curvature, _ = replay(evaluate(), params, u)
    assert abs(slope - expected_slope) <= 1e-8 * scale
    assert abs(curvature - expected) <= 1e-8 * scale


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second_order = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)), inplace=True)
        return F.relu(x + self.norms[1](self.second_order(y)))


class Attention(nn.Module):
    def __init__(self, width: int, *, causal: bool, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.causal, self.fused = causal, fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            if self.causal:
                later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, -torch.inf)
            y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, *, causal: bool, fused: bool) -> None:
        super().__init__()
        self.attention = Attention(width, causal=causal, fused=fused)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Language(nn.Module):
    """A GPT with tied embeddings."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 16), nn.Embedding(9, 16)
        self.blocks = nn.Sequential(*(Block(16, causal=True, fused=fused) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(y))).mean(1)


class Vision(nn.Module):
    """A ViT with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 5, 16))
        self.block, self.head = Block(16, causal=False, fused=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(len(x), -1, -1), y], 1) + self.places
        return self.head(self.block(y)[:, 0])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.norm = nn.ConvTranspose2d(8, 8, 2, 2), nn.GroupNorm(4, 8)
        self.joined, self.head = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = F.relu(self.norm(self.down(x)))
        low = F.relu(self.middle(F.max_pool2d(high, 2)))
        y = F.leaky_relu(self.joined(torch.cat([high, self.up(low)], 1)), 0.1)
        near, smooth = F.interpolate(low, scale_factor=2), F.avg_pool2d(y, 3, 1, 1)
        smoother = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(torch.cat([near, smooth, smoother], 1)).mean((2, 3))


class Excited(nn.Module):
    """An EfficientNet-like block: expansion, depthwise convolution, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(12, 12, 3, 2, 1, groups=12, bias=False), nn.BatchNorm2d(12), nn.SiLU()
        )
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1), nn.SiLU(), nn.Conv2d(4, 12, 1),
            nn.Sigmoid(),
        )  # fmt: skip
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        return self.head((y * self.excite(y)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.body, self.head = kind(6, 7, num_layers=2, batch_first=True), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        with replayable():
            return self.head(self.body(x)[0][:, -1])


def _resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), Residual(8), Residual(8)]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


_IMAGES, _TOKENS = (8, 3, 8, 8), torch.arange(72).view(8, 9) ** 2 % 11
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Tanh(), nn.Linear(32, 5)),
    "resnet": _resnet,
    "resnet in evaluation": lambda: _resnet().eval(),
    "gpt fused": lambda: Language(fused=True),
    "gpt math": lambda: Language(fused=False),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "vit": Vision,
    "unet": UNet,
    "efficientnet": Excited,
}


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    # the running statistics of batch normalisation change, but are not used in training
    return lambda: F.cross_entropy(model(x), y)


@pytest.mark.parametrize("kind", MODELS)
def test_whole_models(kind: str) -> None:
    torch.manual_seed(1)
    model = MODELS[kind]()
    shape = {"lstm": (8, 5, 6), "gru": (8, 5, 6)}.get(kind, _IMAGES)
    x, y = _TOKENS if "gpt" in kind else torch.randn(shape), torch.randint(0, 5, (8,))
    precise = copy.deepcopy(model).double()
    params, exact_params = list(model.parameters()), list(precise.parameters())
    single = _loss(model, x, y)
    double = _loss(precise, x.double() if x.is_floating_point() else x, y)
    assert ("ScaledDotProductFlashAttentionForCpuBackward0" in names(double())) == (
        kind in ("gpt fused", "vit")
    )

    ours, theirs = [], []
    for _ in range(16):
        u = [torch.randn_like(p) * p.detach().norm() / p.numel() ** 0.5 for p in params]
        wide = [t.double() for t in u]
        _, expected, scale = twice(double, exact_params, wide)
        slope, curvature, grads = replay(double(), exact_params, wide)
        assert abs(slope - vdot(grads, wide)) <= 1e-10 * scale
        assert abs(curvature - expected) <= 1e-10 * scale
        ours.append((replay(single(), params, u)[1] - expected) / scale)
        theirs.append((twice(single, params, u)[1] - expected) / scale)
    error, usual = norm(ours), norm(theirs)
    assert error <= 3 * usual
