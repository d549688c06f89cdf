"""The ways to compute a directional curvature, behind one interface.

A `Method` says what it needs of the evaluation of the loss, checks that a loss suits it, and turns
an evaluated `Point` into <u, C u>. To add one, write it and name it in `BY_NAME`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from cdat_core._arrays import safe_reciprocal
from cdat_core.curvature import displacement
from cdat_torch.differentiability import refuse_once_differentiable
from cdat_torch.differentiation import LossFn, differentiate, evaluate, vector_jacobian
from cdat_torch.gauss_newton import CompositeLoss, gauss_newton_curvature
from cdat_torch.reevaluation import RandomState, displace, put_back, without_trace
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
    """

    loss_fn: LossFn
    loss: Tensor
    grads: Sequence[Tensor]
    params: Sequence[Tensor]
    direction: Sequence[Tensor]
    start: RandomState


class Method(Protocol):
    """One way to compute <u, C u>."""

    @property
    def differentiated_twice(self) -> bool:
        """Whether loss and gradient are to be computed with a graph for double backward."""

    def check(self, loss_fn: Any, argument: str) -> None:
        """Raise a TypeError if the method cannot use this kind of loss."""

    def curvature(self, point: Point) -> Tensor:
        """Return <u, C u>, a 0-d float64 tensor."""


class Hessian:
    """Double backward through the graph of the gradient."""

    differentiated_twice = True

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept every loss."""

    def curvature(self, point: Point) -> Tensor:
        """Return <u, H u>; RuntimeError if an operation has no second derivative."""
        return TensorListSpace().vdot(point.direction, self.product(point, retain_graph=False))

    def product(self, point: Point, *, retain_graph: bool) -> list[Tensor]:
        """Return H u."""
        refuse_once_differentiable(point.loss)
        return vector_jacobian(
            point.grads, point.params, point.direction, retain_graph=retain_graph
        )


class GaussNewton:
    """One forward-mode pass through the model, and double backward through its loss."""

    differentiated_twice = False

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept a `CompositeLoss` only."""
        if not isinstance(loss_fn, CompositeLoss):
            msg = (
                f'{argument} must be a cdat_torch.CompositeLoss for curvature="gauss_newton", '
                f"got {loss_fn!r}; pass CompositeLoss(model_fn, loss_fn), which says where the "
                "model ends and the loss of its outputs begins"
            )
            raise TypeError(msg)

    def curvature(self, point: Point) -> Tensor:
        """Return <Ju, H_loss Ju>."""
        self.check(point.loss_fn, "loss_fn")
        assert isinstance(point.loss_fn, CompositeLoss)
        return gauss_newton_curvature(point.loss_fn, point.params, point.direction, point.start)


class FiniteDifference:
    """The central difference of two gradients."""

    differentiated_twice = False

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept every loss."""

    def curvature(self, point: Point) -> Tensor:
        """Return the difference quotient of <g, u>; the loss is evaluated twice more."""
        space, h = TensorListSpace(), self._displacement(point)
        forward, backward = self._changes(point, h, lambda c: space.vdot(c, point.direction))
        curvature: Tensor = (forward - backward) * (0.5 * safe_reciprocal(h))
        return curvature

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

        with put_back(point.params, here):
            return at(h), at(-h)

    def _change(self, point: Point) -> list[Tensor]:
        """Return what the gradient at the present parameters is more than that of the point."""
        with without_trace(point.params, point.start):
            loss = evaluate(point.loss_fn, "loss_fn", differentiated_twice=False)
            found = list(differentiate(loss, point.params, create_graph=False)[1])
        change = []
        for here_g in point.grads:  # one after the other: there is memory for one list
            there_g = found.pop(0)
            change.append(-here_g.detach() if there_g is None else there_g - here_g.detach())
        return change


BY_NAME: dict[str, Method] = {
    "hessian": Hessian(),
    "gauss_newton": GaussNewton(),
    "finite_difference": FiniteDifference(),
}
AUTO = ("hessian", "finite_difference")  # "auto" is the first one, and the second if that raises
METHODS = ("auto", *BY_NAME)


def method_named(name: str) -> Method:
    """Return the method that `name` begins with; ValueError if there is none of that name."""
    if name not in METHODS:
        msg = f"curvature must be one of {METHODS}, got {name!r}"
        raise ValueError(msg)
    return BY_NAME[AUTO[0] if name == "auto" else name]


def method_with_product(name: str) -> Hessian | FiniteDifference:
    """Return the method that `name` begins with; ValueError if it has no product with H."""
    method = method_named(name)
    if not isinstance(method, Hessian | FiniteDifference):
        msg = (
            f'curvature="{name}" does not give the sharpness that tuner_or_search needs; '
            'pass curvature="hessian" or "finite_difference"'
        )
        raise ValueError(msg)
    return method
