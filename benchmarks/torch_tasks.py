"""The models and batches on which steps under PyTorch are compared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class Task(NamedTuple):
    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def params(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def to(self, device: str) -> Task:
        return Task(self.model.to(device), self.x.to(device), self.y.to(device))


def mlp(batch: int = 512) -> Task:
    """784-1024-1024-10 with ReLU, batch 512."""
    sizes = (784, 1024, 1024, 10)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return Task(nn.Sequential(*layers[:-1]), torch.randn(batch, 784), torch.randint(10, (batch,)))


def mlp_small() -> Task:
    """784-1024-1024-10 with ReLU, batch 64."""
    return mlp(batch=64)


class Residual(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.short = (
            nn.Identity() if stride == 1 else nn.Conv2d(before, after, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


def resnet() -> Task:
    """ResNet-20 with BatchNorm in training mode, batch 64 of 32x32 images."""
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = [Residual(a, b) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    model = nn.Sequential(*stem, *blocks, *head)
    return Task(model, torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norms[0](x)).reshape(shape).permute(2, 0, 3, 1, 4)
        with nullcontext() if self.fused else sdpa_kernel(SDPBackend.MATH):
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int,
        heads: int,
        depth: int,
        *,
        fused: bool,
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, fused=fused) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, x: Tensor) -> Tensor:
        there = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.blocks(self.tokens(x) + there)).flatten(0, 1)


def gpt(*, fused: bool = True) -> Task:
    """GPT of 4 layers, width 256, 4 heads, vocabulary 256; batch 8, context 64."""
    model = Transformer(vocabulary=256, length=64, width=256, heads=4, depth=4, fused=fused)
    return Task(model, torch.randint(256, (8, 64)), torch.randint(256, (8 * 64,)))


def gpt_math() -> Task:
    """The same GPT with attention of single operations."""
    return gpt(fused=False)


TASKS: dict[str, Callable[[], Task]] = {
    "mlp": mlp,
    "mlp_small": mlp_small,
    "resnet": resnet,
    "gpt": gpt,
    "gpt_math": gpt_math,
}
