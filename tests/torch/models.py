"""Models and references shared by the tests of the PyTorch adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

WIDTH, CLASSES = 6, 3


def mlp(*sizes: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def parameters(model: nn.Module) -> list[Tensor]:
    return list(model.parameters())


def random_like(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.randn_like(t) for t in tensors]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def dense_hessian(model: nn.Module, loss: Callable[[nn.Module], Tensor], seed: int = 0) -> Tensor:
    """The dense Hessian by forward over reverse: not the way of the library."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]

    def value(w: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(w.split(sizes), shapes, strict=True)]
        torch.manual_seed(seed)
        return call(model, loss, dict(zip(names, parts, strict=True)))

    w = flat([p.detach() for p in model.parameters()])
    gradient = torch.func.grad(value)
    with sdpa_kernel(SDPBackend.MATH):
        columns = [torch.func.jvp(gradient, (w,), (e,))[1] for e in torch.eye(len(w)).to(w)]
    return torch.stack(columns, dim=1).detach()


def dense_hessian_same_masks(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], seed: int = 0
) -> Tensor:
    """Forward over reverse without torch.func, whose dropout masks fall into other places."""
    names = [name for name, _ in model.named_parameters()]
    w = [p.detach() for p in model.parameters()]

    def column(e: Tensor) -> Tensor:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            parts = e.split([p.numel() for p in w])
            duals = [
                forward_ad.make_dual(p.clone().requires_grad_(), part.reshape(p.shape))
                for p, part in zip(w, parts, strict=True)
            ]
            torch.manual_seed(seed)
            value = call(model, loss, dict(zip(names, duals, strict=True)))
            grads = torch.autograd.grad(value, duals, materialize_grads=True)
            tangents = [forward_ad.unpack_dual(g).tangent for g in grads]
        pairs = zip(tangents, w, strict=True)
        return flat([torch.zeros_like(p) if t is None else t.detach() for t, p in pairs])

    return torch.stack([column(e) for e in torch.eye(len(flat(w))).to(w[0])], dim=1)


def call(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], weights: dict[str, Tensor]
) -> Tensor:
    """The loss of `model` with other parameters."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return loss(self.model)

    weights = {f"model.{name}": value for name, value in weights.items()}
    return torch.func.functional_call(Wrapper(), weights, ())


class Classifier(nn.Module):
    """A layer on sequences, and a linear head on the mean over the sequence."""

    def __init__(self, body: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


class NanCurvature(torch.autograd.Function):
    """The square, whose second derivative is NaN."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return 2 * x * grad + (x - x.detach()).abs() ** 0.5 * 0


class ManualAttention(nn.Module):
    """What `nn.MultiheadAttention` computes for self-attention, by elementary operations."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.dropout = attention.num_heads, attention.dropout
        self.in_proj_weight = attention.in_proj_weight
        self.in_proj_bias = attention.in_proj_bias
        self.out_proj = attention.out_proj
        self.batch_first = self._qkv_same_embed_dim = True

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        batch, length, width = x.shape
        qkv = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        split = (batch, length, self.num_heads, width // self.num_heads)
        q, k, v = (t.reshape(split).transpose(1, 2) for t in qkv.chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-2, -1) / split[-1] ** 0.5, -1)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        y = (weights @ v).permute(2, 0, 1, 3).reshape(length, batch, width)
        return self.out_proj(y).transpose(0, 1), None  # dropout masks follow the memory layout


def with_manual_attention(model: nn.Module) -> nn.Module:
    """A copy of `model`, the same parameters in the same order, with `ManualAttention`."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                setattr(module, name, ManualAttention(child))
    return twin
