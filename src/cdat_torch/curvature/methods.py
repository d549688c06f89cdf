"""The methods for a directional curvature, behind one interface.

A `Method` says what the evaluation of the loss must keep, checks that a loss suits it, and turns
an `EvaluatedLoss` into <g, u> and <u, C u>, where C is the Hessian H or the Gauss-Newton matrix. To
add a method, write it here and name it in `BY_NAME`. What ``curvature=...`` may be, and which
methods it stands for, is in `cdat_torch.curvature.fallback`.
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
from cdat_torch.curvature.replay import Recording
from cdat_torch.distributed.replicas import several_processes
from cdat_torch.kernels import (
    further_differentiable,
    refuse_once_differentiable,
    replayable,
)
from cdat_torch.side_effects import RandomState, displace, restore_values, without_side_effects
from cdat_torch.spaces import TensorListSpace

T = TypeVar("T")


class EvaluatedLoss(NamedTuple):
    """The loss at the present parameters, its gradient, and a direction.

    Attributes
    ----------
    loss_fn : callable
        The function that returned the loss.
    loss : Tensor
        The loss, with its graph.
    grads : sequence of Tensor
        The gradient; it has a graph if the method asks for one (`Method.create_graph`).
    params, direction : sequence of Tensor
        The parameters that have a gradient, and u.
    start : RandomState
        The random state from which `loss_fn` was evaluated.
    recording : Recording or None
        The recorded backward pass, if the method asks for one (`Method.record`).
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

    def evaluated_again(self) -> EvaluatedLoss:
        """Return the same loss, with a graph of its gradient."""
        loss = self.loss  # with several processes the loss is evaluated only once
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
    """A method for <u, C u>, where C is the Hessian H or the Gauss-Newton matrix."""

    @property
    def kernels(self) -> Kernels:
        """The choice of kernels for the evaluation of the loss."""

    @property
    def create_graph(self) -> bool:
        """Whether the gradient needs a graph, for double backward."""

    @property
    def record(self) -> bool:
        """Whether the backward pass must be recorded, for the replay."""

    def check(self, loss_fn: Any, argument: str) -> None:
        """Raise a TypeError if the method cannot use this kind of loss."""

    def slope_and_curvature(self, evaluated: EvaluatedLoss) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, C u>, 0-d float64 tensors."""


class NoCurvature:
    """The loss and its gradient alone, for a step that does not measure the curvature."""

    kernels = staticmethod(nullcontext)
    create_graph = False
    record = False

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept every loss."""

    def slope_and_curvature(self, evaluated: EvaluatedLoss) -> tuple[Tensor, Tensor]:
        """Raise: nothing was kept to compute a curvature from."""
        msg = "the loss was evaluated without its curvature"
        raise NotImplementedError(msg)


class Replay:
    """Carry u through the graph of the loss, with the adjoints that backward computed."""

    kernels = staticmethod(replayable)
    create_graph = False
    record = True

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept every loss."""

    def slope_and_curvature(self, evaluated: EvaluatedLoss) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, H u>; raise `Mismatch` if the replayed <g, u> differs."""
        assert evaluated.recording is not None
        u = dict(zip(evaluated.params, evaluated.direction, strict=True))
        found = evaluated.recording.along(evaluated.grads, u)
        evaluated.recording.free()
        return found


class DoubleBackward:
    """Double backward through the graph of the gradient."""

    kernels = staticmethod(further_differentiable)
    create_graph = True
    record = False

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept every loss."""

    def slope_and_curvature(self, evaluated: EvaluatedLoss) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, H u>.

        Raises
        ------
        RuntimeError
            If an operation has no second derivative.
        """
        slope = evaluated.slope()
        if evaluated.recording is not None:  # the replay failed after it had recorded the graph
            evaluated = evaluated.evaluated_again()
        product = self.product(evaluated, retain_graph=False)
        return slope, TensorListSpace().vdot(evaluated.direction, product)

    def product(self, evaluated: EvaluatedLoss, *, retain_graph: bool) -> list[Tensor]:
        """Return H u."""
        refuse_once_differentiable(evaluated.loss)
        return vector_jacobian(
            evaluated.grads, evaluated.params, evaluated.direction, retain_graph=retain_graph
        )


class ReplayedGaussNewton(Replay):
    """The replay, treating the model as linear: <Ju, H_loss Ju>."""

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept a `CompositeLoss` only."""
        GaussNewton().check(loss_fn, argument)


class GaussNewton:
    """One forward-mode pass through the model, and double backward through its loss."""

    kernels = staticmethod(nullcontext)
    create_graph = False
    record = False

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept a `CompositeLoss` only."""
        if not isinstance(loss_fn, CompositeLoss):
            msg = (
                f'{argument} must be a cdat_torch.CompositeLoss for curvature="gauss_newton", '
                f"got {loss_fn!r}; pass CompositeLoss(model_fn, loss_fn), which says where the "
                "model ends and the loss of its outputs begins"
            )
            raise TypeError(msg)

    def slope_and_curvature(self, evaluated: EvaluatedLoss) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <Ju, H_loss Ju>."""
        loss_fn = evaluated.loss_fn
        assert isinstance(loss_fn, CompositeLoss)
        curvature = gauss_newton_curvature(
            loss_fn, evaluated.params, evaluated.direction, evaluated.start
        )
        return evaluated.slope(), curvature


class FiniteDifference:
    """The central difference of two gradients."""

    kernels = staticmethod(nullcontext)
    create_graph = False
    record = False

    def check(self, loss_fn: Any, argument: str) -> None:
        """Accept every loss."""

    def slope_and_curvature(self, evaluated: EvaluatedLoss) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, H u> by a central difference; two more evaluations of the loss."""
        space, h = TensorListSpace(), self._displacement(evaluated)
        forward, backward = self._changes(
            evaluated, h, lambda c: space.vdot(c, evaluated.direction)
        )
        curvature: Tensor = (forward - backward) * (0.5 * safe_reciprocal(h))
        return evaluated.slope(), curvature

    def product(self, evaluated: EvaluatedLoss, *, retain_graph: bool) -> list[Tensor]:
        """Return H u by a central difference; there is no graph to retain."""
        del retain_graph
        space, h = TensorListSpace(), self._displacement(evaluated)
        forward, backward = self._changes(evaluated, h, lambda change: change)
        return space.scale(0.5 * safe_reciprocal(h), space.add_scale(forward, -1.0, backward))

    def _displacement(self, evaluated: EvaluatedLoss) -> Tensor:
        # This relative displacement balances truncation and rounding errors of the gradients.
        step = float(max(torch.finfo(p.dtype).eps for p in evaluated.params) ** (1 / 3))
        here = [p.detach() for p in evaluated.params]
        h: Tensor = displacement(here, step=step, space=TensorListSpace())(
            list(evaluated.direction)
        )
        return h

    def _changes(
        self, evaluated: EvaluatedLoss, h: Tensor, keep: Callable[[list[Tensor]], T]
    ) -> tuple[T, T]:
        """Return ``keep(g(here + h u) - g(here))`` and ``keep(g(here - h u) - g(here))``.

        Gradients are subtracted before their inner product with u: a difference of two slopes would
        lose most digits.
        """
        here = [p.detach().clone() for p in evaluated.params]

        def at(factor: Tensor) -> T:
            displace(evaluated.params, here, factor, evaluated.direction)
            return keep(self._change(evaluated))

        with restore_values(evaluated.params, here):
            return at(h), at(-h)

    def _change(self, evaluated: EvaluatedLoss) -> list[Tensor]:
        """Return the gradient at the displaced parameters minus that of `evaluated`."""
        with without_side_effects(evaluated.params, evaluated.start):
            loss = evaluate(evaluated.loss_fn, "loss_fn")
            found = list(differentiate(loss, evaluated.params).grads)
        change = []
        for here_g in evaluated.grads:
            there_g = found.pop(0)  # so that each gradient is freed after its subtraction
            change.append(-here_g.detach() if there_g is None else there_g - here_g.detach())
        return change


REPLAYED_GAUSS_NEWTON = "gauss_newton by replay"
BY_NAME: dict[str, Method] = {
    "replay": Replay(),
    "hvp": DoubleBackward(),
    "gauss_newton": GaussNewton(),
    REPLAYED_GAUSS_NEWTON: ReplayedGaussNewton(),
    "finite_difference": FiniteDifference(),
}

WITH_PRODUCT = (DoubleBackward, FiniteDifference)
"""The methods that can multiply with H, as the sharpness needs it."""


def with_product(method: Method) -> DoubleBackward | FiniteDifference:
    """Return `method`, which is known to be one that can multiply with H."""
    assert isinstance(method, WITH_PRODUCT)
    return method
