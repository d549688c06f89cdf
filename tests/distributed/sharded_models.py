"""One small transformer, distributed over processes in every way that PyTorch offers."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

WIDTH, VOCABULARY = 8, 5


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        heads = lambda t: t.view(*t.shape[:2], -1, 2).transpose(1, 2)
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.between = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.before(x))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """The vocabulary is odd, so two processes hold shards of unequal size."""

    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Embedding(VOCABULARY, WIDTH), Block()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.unused = nn.Parameter(torch.ones(3))
        self.embed.weight.requires_grad_(False)

    def forward(self, x):
        return self.head(self.norm(self.block(self.embed(x))))


def problem():
    torch.manual_seed(0)
    model = Transformer().double()
    return model, torch.randint(VOCABULARY, (8, 6)), torch.randint(VOCABULARY, (8, 6))


def loss_of(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


# Replicated tensors enter the parallel layers.
TENSOR = {
    **{f"block.attention.{name}": ColwiseParallel for name in "qkv"},
    "block.attention.out": RowwiseParallel,
    "block.up": ColwiseParallel,
    "block.down": RowwiseParallel,
}


def tensor_plan():
    return {name: style() for name, style in TENSOR.items()}


def sequence_plan():
    """Norms are parallel too, over the sequence."""
    rows = {"output_layouts": Shard(1)}
    return {
        **tensor_plan(),
        "embed": RowwiseParallel(input_layouts=Replicate(), **rows),
        "block.before": SequenceParallel(),
        "block.attention": PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
        ),
        "block.attention.out": RowwiseParallel(**rows),
        "block.between": SequenceParallel(),
        "block.up": ColwiseParallel(input_layouts=Shard(1)),
        "block.down": RowwiseParallel(**rows),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


def spread(model, size, way):
    """Distribute the model; return how many parts the batch has, which is ours, and the group."""
    if way == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
        fully_shard(model.block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return size, mesh.get_local_rank(), None
    if way == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model.block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return size, torch.distributed.get_rank(), None
    if way in {"tensor", "sequence"}:
        plan = tensor_plan() if way == "tensor" else sequence_plan()
        parallelize_module(model, init_device_mesh("cpu", (size,)), plan)
        return 1, 0, None
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], tensor_plan())
    if way == "tensor and fsdp":
        fully_shard(model.block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    return 2, mesh["data"].get_local_rank(), mesh["data"].get_group()
