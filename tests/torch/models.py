"""Models and references shared by the tests of the PyTorch adapter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


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

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return loss(self.model)

    wrapper = Wrapper()

    def value(w: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(w.split(sizes), shapes, strict=True)]
        weights = {f"model.{name}": part for name, part in zip(names, parts, strict=True)}
        torch.manual_seed(seed)
        return torch.func.functional_call(wrapper, weights, ())

    w = flat([p.detach() for p in model.parameters()])
    gradient = torch.func.grad(value)
    with sdpa_kernel(SDPBackend.MATH):
        columns = [torch.func.jvp(gradient, (w,), (e,))[1] for e in torch.eye(len(w)).to(w)]
    return torch.stack(columns, dim=1).detach()
