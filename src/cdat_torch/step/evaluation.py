"""The loss of a step and its gradient at the present parameters.

The loss comes from a closure (`ClosureLoss`), or from calls of `TunedOptimizer.backward`, one for
each micro-batch (`cdat_torch.step.micro_batches`). Both give the slope and the curvature along a
direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from cdat_torch.curvature.autograd import LossFn
from cdat_torch.curvature.fallback import Methods
from cdat_torch.curvature.methods import EvaluatedLoss, with_product
from cdat_torch.curvature.replay import Recording
from cdat_torch.distributed.fsdp import redistribute_like, reduce_scatter, unshard
from cdat_torch.side_effects import RandomState
from cdat_torch.spaces import TensorListSpace, scalar_dtype

Direction: TypeAlias = dict[Tensor, Tensor]
"""Maps each parameter, or each tensor that the loss was differentiated by, to its part of u."""


class Gradient(NamedTuple):
    """The gradient of one loss, without the parameters that the loss does not use.

    Attributes
    ----------
    params : list of Tensor
        The parameters of the optimizer.
    variables : list of Tensor
        The tensors that the loss was differentiated by: the parameters, or their unsharded copies
        under ``fully_shard``.
    grads : list of Tensor
        With respect to `variables`.
    """

    params: list[Tensor]
    variables: list[Tensor]
    grads: list[Tensor]

    @classmethod
    def without_unused(
        cls, params: Sequence[Tensor], variables: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Gradient:
        """Return the gradient without the entries that are None."""
        found = cls([], [], [])
        for p, v, g in zip(params, variables, grads, strict=True):
            if g is not None:
                found.params.append(p)
                found.variables.append(v)
                found.grads.append(g)
        return found

    @property
    def unsharded(self) -> bool:
        """Whether modules under ``fully_shard`` unsharded variables for a second derivative."""
        return any(v is not p for v, p in zip(self.variables, self.params, strict=True))

    @contextmanager
    def suitable(self, methods: Methods) -> Iterator[Methods]:
        """Give the methods that suit the variables: no finite differences if some are unsharded.

        Unsharding again would overwrite the displaced values.
        """
        try:
            yield methods.without("finite_difference") if self.unsharded else methods
        except RuntimeError as error:
            if self.unsharded:
                error.add_note('for modules under fully_shard pass curvature="finite_difference"')
            raise

    def by_variable(self, direction: Direction) -> Direction:
        """Return u by variable, given u by parameter."""
        if not self.unsharded:
            return direction
        unshard(self.params)
        u = redistribute_like([direction[p] for p in self.params], self.variables)
        return dict(zip(self.variables, u, strict=True))

    def by_param(self, vector: Sequence[Tensor]) -> Direction:
        """Return a vector by parameter, given it by variable; sharded parts are averaged."""
        means = reduce_scatter(self.params, self.variables, vector)
        return {p: h for p, h in zip(self.params, means, strict=True) if h is not None}

    def slope(self, u: Direction) -> Tensor:
        """Return <g, u>, with u by variable."""
        grads = [g.detach() for g in self.grads]
        return TensorListSpace().vdot(grads, [u[v] for v in self.variables])


class StepLoss(Protocol):
    """What a step needs to know of its loss; the numbers are those of this process alone."""

    @property
    def value(self) -> Tensor | None:
        """The loss, detached; None if it is not known."""
        ...

    @property
    def methods(self) -> Methods:
        """The methods that are left to measure the curvature."""
        ...

    def by_variable(self, direction: Direction) -> Direction:
        """Return u by variable, given u by parameter."""
        ...

    def slope(self, u: Direction) -> Tensor:
        """Return <g, u>, with u by variable and the gradient as it was before any clipping."""
        ...

    def slope_and_curvature(self, u: Direction) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, H u>, with u by variable."""
        ...

    def product(self, direction: Direction, *, retain_graph: bool) -> Direction:
        """Return H u by parameter, given u by parameter; zero where there is none.

        Without `retain_graph` this must be the last product.
        """
        ...


class ClosureLoss:
    """A loss that can be evaluated again.

    Parameters
    ----------
    closure : callable
        It returned the loss.
    start : RandomState
        The random state from which the closure was evaluated.
    loss : Tensor
        The loss, with its graph.
    gradient : Gradient
        Its gradient, with a graph if ``methods.current`` needs one.
    methods : Methods
        The methods for the curvature; empty if it is not measured.
    recording : Recording or None
        The recorded backward pass, if ``methods.current`` needs it.
    """

    def __init__(
        self,
        closure: LossFn,
        start: RandomState,
        loss: Tensor,
        gradient: Gradient,
        methods: Methods,
        recording: Recording | None,
    ) -> None:
        self.closure = closure
        self.start = start
        self.loss = loss
        self.gradient = gradient
        self.methods = methods
        self.value = value_of(loss)
        self._recording = recording

    def by_variable(self, direction: Direction) -> Direction:
        """Return u by variable."""
        return self.gradient.by_variable(direction)

    def slope(self, u: Direction) -> Tensor:
        """Return <g, u>."""
        return self.gradient.slope(u)

    def slope_and_curvature(self, u: Direction) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, H u>."""
        evaluated = self._evaluated(u)
        with torch.enable_grad(), self.gradient.suitable(self.methods) as methods:
            found, self.methods = methods.first_that_works(
                lambda method: method.slope_and_curvature(evaluated)
            )
        return found

    def product(self, direction: Direction, *, retain_graph: bool) -> Direction:
        """Return H u."""
        evaluated = self._evaluated(self.by_variable(direction))
        with torch.enable_grad(), self.gradient.suitable(self.methods) as methods:
            product, self.methods = methods.first_that_works(
                lambda method: with_product(method).product(evaluated, retain_graph=retain_graph)
            )
        return self.gradient.by_param(product)

    def _evaluated(self, u: Direction) -> EvaluatedLoss:
        _, variables, grads = self.gradient
        direction = [u[v] for v in variables]
        return EvaluatedLoss(
            self.closure, self.loss, grads, variables, direction, self.start, self._recording
        )


@dataclass
class PlainGradient:
    """Gradients in ``p.grad`` of an unknown loss: enough for tuners that need only a slope."""

    params: list[Tensor]
    value = None
    methods = Methods()

    def by_variable(self, direction: Direction) -> Direction:
        """Return u as it is."""
        return direction

    def slope(self, u: Direction) -> Tensor:
        """Return <g, u>."""
        pairs = [(p.grad, u[p]) for p in self.params if p.grad is not None]
        return TensorListSpace().vdot([g for g, _ in pairs], [part for _, part in pairs])

    def slope_and_curvature(self, u: Direction) -> tuple[Tensor, Tensor]:
        """Raise: `TunedOptimizer` asks for a loss if the curvature is needed."""
        raise NotImplementedError

    def product(self, direction: Direction, *, retain_graph: bool) -> Direction:
        """Raise: `TunedOptimizer` asks for a loss if the curvature is needed."""
        raise NotImplementedError


def value_of(loss: Tensor) -> Tensor:
    """Return a loss without its graph, in the dtype of the tuner's scalars."""
    return loss.detach().to(scalar_dtype(loss.device))
