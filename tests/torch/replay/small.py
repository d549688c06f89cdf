"""A small network with its loss, for tests that are not about single rules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.torch.models import parameters
from tests.torch.replay.harness import vdot

X = torch.linspace(-1.0, 1.0, 60, dtype=torch.float64).sin().view(12, 5)
Y = torch.arange(12) % 3


def network(middle: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), middle or nn.Tanh(), nn.Linear(7, 3)).double()


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(X), Y)


def double_backward(model: nn.Module, u: list[Tensor]) -> Tensor:
    params = parameters(model)
    g = torch.autograd.grad(closure_of(model)(), params, create_graph=True)
    return vdot(torch.autograd.grad(g, params, u), u)
