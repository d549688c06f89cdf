"""One operation in a small loss, replayed and differentiated by central differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cdat_torch.curvature.replay import Recording, graph, recording
from cdat_torch.curvature.replay.registry import Node, OperationRule, needs_adjoint
from cdat_torch.kernels import nodes

Loss = Callable[..., Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A call of an operation.

    Attributes
    ----------
    node : str
        The autograd node that it must leave in the graph.
    function : callable
        A deterministic function of one tensor for each shape; it returns one tensor or several.
    shapes : tuple
        Of the inputs.
    domain : str
        Where the inputs lie: a key of `DOMAINS`.
    label : str
        What is special about this call.
    falls_back : bool
        Whether the rule leaves the call to double backward, in some of the variants at least.
    """

    node: str
    function: Callable[..., Any]
    shapes: tuple[Shape, ...]
    domain: str = "real"
    label: str = ""
    falls_back: bool = False

    def __str__(self) -> str:
        return f"{self.node} {self.label}".strip()


def case(
    node: str,
    function: Callable[..., Any],
    *shapes: Shape,
    domain: str = "real",
    label: str = "",
    falls_back: bool = False,
) -> Case:
    """Return a case of the node "<node>Backward0", or of the node with the name as it is."""
    name = node if "Backward" in node or "::" in node else f"{node}Backward0"
    return Case(name, function, shapes, domain, label, falls_back)


def _apart(w: Tensor) -> Tensor:
    """Return numbers away from each other and from 0, 1, 3, where functions have kinks."""
    order = torch.randperm(w.numel(), generator=torch.Generator().manual_seed(w.numel()))
    grid = (order - w.numel() // 2).to(w.dtype) * 0.31 + 0.13
    return grid.view(w.shape) + 0.05 * w.sin()


DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "real": lambda w: w + 0.5 * w.sin(),
    "positive": lambda w: (0.5 * w).exp(),
    "unit": lambda w: w.sigmoid(),
    "apart": _apart,
}
"""Inputs as functions of the parameters, none of them linear."""


@dataclass(frozen=True)
class Variant:
    """How a case is called.

    Attributes
    ----------
    active : int or None
        The only input that depends on a parameter; None for all.
    shared : bool
        Whether all inputs are one tensor.
    chained : bool
        Whether the later inputs depend on the first one.
    layout : str
        "strided" for inputs and adjoints that are not contiguous, "expanded" for adjoints that
        repeat one number.
    """

    active: int | None = None
    shared: bool = False
    chained: bool = False
    layout: str = ""


def variants(of: Case) -> list[Variant]:
    """Return all variants of a case."""
    several = len(of.shapes) > 1
    found = [Variant(), Variant(layout="strided"), Variant(layout="expanded")]
    found += [Variant(active=i) for i in range(len(of.shapes)) if several]
    if several and len(set(of.shapes)) == 1:
        found += [Variant(shared=True), Variant(chained=True)]
    return found


def problem(of: Case, variant: Variant) -> tuple[Loss, list[Tensor]]:
    """Return a loss, nonlinear in what the operation returns, and its parameters."""
    shapes = of.shapes[:1] if variant.shared else of.shapes
    everything = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    is_active = [variant.active in (None, i) for i in range(len(shapes))]
    weights: list[Tensor] = []

    def outputs(params: Sequence[Tensor]) -> list[Tensor]:
        given = iter(params)
        w = [next(given) if a else t for t, a in zip(everything, is_active, strict=True)]
        x = [DOMAINS[of.domain](t) for t in w]
        if variant.chained:
            x[1:] = [DOMAINS[of.domain](x[0] + t) for t in w[1:]]
        if variant.layout == "strided":
            x = [torch.stack([t, t], -1)[..., 0] if t.dim() < 3 else _rows_apart(t) for t in x]
        found = of.function(*(x * len(of.shapes) if variant.shared else x))
        found = [found] if isinstance(found, Tensor) else found
        if variant.layout == "strided":
            found = [y.mT if y.dim() > 1 else y for y in found]
        return [y.sum() for y in found] if variant.layout == "expanded" else found

    def loss(*params: Tensor) -> Tensor:
        found = outputs(params)
        if not weights:
            weights.extend(torch.randn_like(y) / (1 + y.detach().abs().max()) for y in found)
        terms = [(c * y).sin().sum() for c, y in zip(weights, found, strict=True)]
        return torch.stack(terms).sum()

    params = [t.requires_grad_() for t, a in zip(everything, is_active, strict=True) if a]
    return loss, params


def _rows_apart(t: Tensor) -> Tensor:
    """Return a tensor that is not contiguous but whose rows are, as fused kernels want them."""
    return torch.stack([t, t], -2)[..., 0, :]


_CENTRAL = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}
_STEP = 2.0**-9


def differences(loss: Loss, params: Sequence[Tensor], u: Sequence[Tensor]) -> list[Tensor]:
    """Return H u by an eighth-order central difference of exact gradients.

    It uses no second derivative of PyTorch, and with this step truncation and rounding errors are
    both below 1e-12 |H| |u|.
    """

    def gradient(t: float) -> tuple[Tensor, ...]:
        moved = [(p.detach() + t * v).requires_grad_() for p, v in zip(params, u, strict=True)]
        found = torch.autograd.grad(loss(*moved), moved, allow_unused=True)
        return tuple(
            torch.zeros_like(p) if g is None else g for g, p in zip(found, moved, strict=True)
        )

    product = [torch.zeros_like(p) for p in params]
    for k, c in _CENTRAL.items():
        pairs = zip(product, gradient(k * _STEP), gradient(-k * _STEP), strict=True)
        product = [h + c / _STEP * (a - b) for h, a, b in pairs]
    return product


def replay(
    loss: Tensor, params: Sequence[Tensor], u: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return slope, curvature and gradient of a loss that has just been evaluated."""
    watched = Recording(loss, params)
    with watched.watching():
        grads = torch.autograd.grad(loss, params, retain_graph=True)
    slope, curvature = watched.sweep(dict(zip(params, u, strict=True)))
    return slope, curvature, list(grads)


def vdot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum()


def norm(a: Sequence[Tensor]) -> Tensor:
    return vdot(a, a).sqrt()


def assert_exact(
    loss: Loss, params: Sequence[Tensor], u: Sequence[Tensor], *, tolerance: float = 1e-9
) -> None:
    """Compare slope and curvature with a gradient and with differences of gradients."""
    slope, curvature, grads = replay(loss(*params), params, u)
    product = differences(loss, params, u)
    # Losses and parameters are of order one. The 1e-3 is for gradients that cancel, such as
    # that of the sum of a normalised tensor.
    scale = norm(u) * (norm(product) + norm(grads) + 1e-3)
    assert abs(slope - vdot(grads, u)) <= tolerance * scale
    assert abs(curvature - vdot(product, u)) <= tolerance * scale


def names(loss: Tensor) -> set[str]:
    return {node.name() for node in nodes(loss)}


class _Everything(set[Any]):
    def __contains__(self, element: object) -> bool:
        return True


@contextmanager
def unverified(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the names of the nodes that use double backward; rules are not verified meanwhile."""
    asked: list[str] = []
    apply = recording.double_backward.apply

    def noted(node: Node, *tangents: Tensor | None) -> Any:
        asked.append(node.name)
        return apply(node, *tangents)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "_VERIFIED", _Everything())
        patch.setattr(recording.double_backward, "apply", noted)
        patch.setattr(graph, "DOUBLE_BACKWARD", OperationRule(noted, needs_adjoint))
        yield asked
