"""The ways to compute a directional curvature, behind one interface.

A `Method` says what it needs of the evaluation of the loss, checks that a loss suits it, and turns
an evaluated `Point` into <u, C u>. To add one, write it and name it in `BY_NAME`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from cdat_core.extend import displacement, safe_reciprocal
from cdat_torch.curvature.autograd import (
    Kernels,
    LossFn,
    differentiate,
    evaluate,
    gradients,
    vector_jacobian,
)
from cdat_torch.curvature.gauss_newton import CompositeLoss, gauss_newton_curvature
from cdat_torch.curvature.replay import IS_TESTED, Recording
from cdat_torch.distributed.replicas import several_processes
from cdat_torch.kernels import (
    further_differentiable,
    refuse_once_differentiable,
    replayable,
)
from cdat_torch.side_effects import RandomState, displace, restore_values, without_side_effects
from cdat_torch.spaces import TensorListSpace

T = TypeVar("T")


class Point(NamedTuple):
    """A loss that was evaluated, with its gradient, and a direction.

    Attributes
    ----------
    loss_fn : callable
        The loss.
    loss : Tensor
        What it returned, with its graph.
    grads : sequence of Tensor
        The gradient; with a graph if the method is `Method.differentiated_twice`.
    params, direction : sequence of Tensor
        The parameters that have a gradient, and u.
    start : RandomState
        The random state from which `loss_fn` was evaluated.
    recording : Recording or None
        What was watched of the backward pass, if the method is `Method.recorded`.
    """

    loss_fn: LossFn
    loss: Tensor
    grads: Sequence[Tensor]
    params: Sequence[Tensor]
    direction: Sequence[Tensor]
    start: RandomState
    recording: Recording | None = None

    def slope(self) -> Tensor:
        """Return <g, u>, a 0-d float64 tensor."""
        return TensorListSpace().vdot([g.detach() for g in self.grads], self.direction)

    def evaluated_again(self) -> Point:
        """Return the same point with a graph of its gradient."""
        loss = self.loss  # among several processes the loss is evaluated once
        if not several_processes():
            with without_side_effects(self.params, self.start):
                loss = evaluate(self.loss_fn, "loss_fn", kernels=further_differentiable)
        grads = gradients_with_graph(loss, self.params)
        return self._replace(loss=loss, grads=grads, recording=None)


def gradients_with_graph(loss: Tensor, variables: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient for a double backward, zero where the loss does not depend on it."""
    found = gradients(loss, variables, create_graph=True)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(variables, found, strict=True)]


class Method(Protocol):
    """One way to compute <u, C u>."""

    @property
    def kernels(self) -> Kernels:
        """The choice of kernels for the evaluation of the loss."""

    @property
    def differentiated_twice(self) -> bool:
        """Whether the gradient is to be computed with a graph for double backward."""

    @property
    def recorded(self) -> bool:
        """Whether the backward pass is to be watched."""

    def check(self, loss_fn: Any, argument: str) -> None:
        """Raise a TypeError if the method cannot use this kind of loss."""

    def along(self, point: Point) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, C u>, 0-d float64 tensors."""


class Replay:
    """The graph of the loss carries the direction, with the adjoints that backward computed."""

    kernels = staticmethod(replayable)
    differentiated_twice = False
    recorded = True

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept every loss."""

    def along(self, point: Point) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, H u>; `Mismatch` if the replayed <g, u> is another one."""
        assert point.recording is not None
        u = dict(zip(point.params, point.direction, strict=True))
        found = point.recording.along(point.grads, u)
        point.recording.free()
        return found


class Hessian:
    """Double backward through the graph of the gradient."""

    kernels = staticmethod(further_differentiable)
    differentiated_twice = True
    recorded = False

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept every loss."""

    def along(self, point: Point) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, H u>; RuntimeError if an operation has no second derivative."""
        slope = point.slope()
        if point.recording is not None:  # the graph turned out not to be one that can be replayed
            point = point.evaluated_again()
        product = self.product(point, retain_graph=False)
        return slope, TensorListSpace().vdot(point.direction, product)

    def product(self, point: Point, *, retain_graph: bool) -> list[Tensor]:
        """Return H u."""
        refuse_once_differentiable(point.loss)
        return vector_jacobian(
            point.grads, point.params, point.direction, retain_graph=retain_graph
        )


class ReplayedGaussNewton(Replay):
    """The same with a model that counts as linear: <Ju, H_loss Ju>."""

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept a `CompositeLoss` only."""
        GaussNewton().check(loss_fn, argument)


class GaussNewton:
    """One forward-mode pass through the model, and double backward through its loss."""

    kernels = staticmethod(nullcontext)
    differentiated_twice = False
    recorded = False

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept a `CompositeLoss` only."""
        if not isinstance(loss_fn, CompositeLoss):
            msg = (
                f'{argument} must be a cdat_torch.CompositeLoss for curvature="gauss_newton", '
                f"got {loss_fn!r}; pass CompositeLoss(model_fn, loss_fn), which says where the "
                "model ends and the loss of its outputs begins"
            )
            raise TypeError(msg)

    def along(self, point: Point) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <Ju, H_loss Ju>."""
        self.check(point.loss_fn, "loss_fn")
        loss_fn = point.loss_fn
        assert isinstance(loss_fn, CompositeLoss)
        curvature = gauss_newton_curvature(loss_fn, point.params, point.direction, point.start)
        return point.slope(), curvature


class FiniteDifference:
    """The central difference of two gradients."""

    kernels = staticmethod(nullcontext)
    differentiated_twice = False
    recorded = False

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept every loss."""

    def along(self, point: Point) -> tuple[Tensor, Tensor]:
        """Return <g, u> and its difference quotient; the loss is evaluated twice more."""
        space, h = TensorListSpace(), self._displacement(point)
        forward, backward = self._changes(point, h, lambda c: space.vdot(c, point.direction))
        curvature: Tensor = (forward - backward) * (0.5 * safe_reciprocal(h))
        return point.slope(), curvature

    def product(self, point: Point, *, retain_graph: bool) -> list[Tensor]:
        """Return the difference quotient of g; there is no graph to retain."""
        del retain_graph
        space, h = TensorListSpace(), self._displacement(point)
        forward, backward = self._changes(point, h, lambda change: change)
        return space.scale(0.5 * safe_reciprocal(h), space.add_scale(forward, -1.0, backward))

    def _displacement(self, point: Point) -> Tensor:
        # the relative displacement that balances truncation and rounding of the gradients
        step = float(max(torch.finfo(p.dtype).eps for p in point.params) ** (1 / 3))
        here = [p.detach() for p in point.params]
        h: Tensor = displacement(here, step=step, space=TensorListSpace())(list(point.direction))
        return h

    def _changes(self, point: Point, h: Tensor, keep: Callable[[list[Tensor]], T]) -> tuple[T, T]:
        """Return what `keep` makes of g(here + h u) - g(here) and of g(here - h u) - g(here).

        Of the slopes alone little would be left in their difference but rounding errors.
        """
        here = [p.detach().clone() for p in point.params]

        def at(factor: Tensor) -> T:
            displace(point.params, here, factor, point.direction)
            return keep(self._change(point))

        with restore_values(point.params, here):
            return at(h), at(-h)

    def _change(self, point: Point) -> list[Tensor]:
        """Return what the gradient at the present parameters is more than that of the point."""
        with without_side_effects(point.params, point.start):
            loss = evaluate(point.loss_fn, "loss_fn")
            found = list(differentiate(loss, point.params).grads)
        change = []
        for here_g in point.grads:  # one after the other: there is memory for one list
            there_g = found.pop(0)
            change.append(-here_g.detach() if there_g is None else there_g - here_g.detach())
        return change


REPLAYED_GAUSS_NEWTON = "gauss_newton by replay"
BY_NAME: dict[str, Method] = {
    "replay": Replay(),
    "hessian": Hessian(),
    "gauss_newton": GaussNewton(),
    REPLAYED_GAUSS_NEWTON: ReplayedGaussNewton(),
    "finite_difference": FiniteDifference(),
}
METHODS = ("auto", *(name for name in BY_NAME if name != REPLAYED_GAUSS_NEWTON))

Ways = tuple[str, ...]
"""Names of methods: the one in use, then those to go on with where it does not work."""


def ways_named(name: str) -> Ways:
    """Return the ways that `curvature` of this name means; ValueError if there is none."""
    if name not in METHODS:
        msg = f"curvature must be one of {METHODS}, got {name!r}"
        raise ValueError(msg)
    if name == "auto":
        return (*(("replay",) if IS_TESTED else ()), "hessian", "finite_difference")
    if name == "gauss_newton":
        return (*((REPLAYED_GAUSS_NEWTON,) if IS_TESTED else ()), name)
    return (name,)


def ways_with_product(name: str) -> Ways:
    """Return those that have a product with H; ValueError if none has."""
    ways = tuple(way for way in ways_named(name) if isinstance(BY_NAME[way], _WITH_PRODUCT))
    if not ways:
        msg = (
            f'curvature="{name}" does not give the sharpness that tuner_or_search needs; '
            'pass curvature="hessian" or "finite_difference"'
        )
        raise ValueError(msg)
    return ways


def with_product(name: str) -> Hessian | FiniteDifference:
    """Return the method of that name, which has a product with H."""
    method = BY_NAME[name]
    assert isinstance(method, _WITH_PRODUCT)
    return method


_WITH_PRODUCT = (Hessian, FiniteDifference)
