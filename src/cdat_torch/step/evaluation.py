"""The loss of a step and its gradient at the present parameters.

The loss comes from a closure (`ClosureLoss`), or from calls of `TunedOptimizer.backward`, one for
each micro-batch (`MicroBatches`). Both give the slope and the curvature along a direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from cdat_torch.curvature.autograd import LossFn, check_scalar, vector_jacobian
from cdat_torch.curvature.fallback import Methods, differentiate_with_fallback
from cdat_torch.curvature.methods import EvaluatedLoss, gradients_with_graph, with_product
from cdat_torch.curvature.replay import Recording, Unsupported
from cdat_torch.distributed.fsdp import redistribute_like, reduce_scatter, unshard
from cdat_torch.kernels import refuse_once_differentiable
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
        self.value = _value(loss)
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


class _MicroBatch(NamedTuple):
    """The loss of one micro-batch and its gradient.

    Both are multiplied by `scale` if a GradScaler is in use; otherwise that is None.
    """

    loss: Tensor
    gradient: Gradient
    scale: Tensor | None
    recording: Recording | None

    def unscaled(self, number: Tensor) -> Tensor:
        """Return a number for the loss itself, given it for the scaled loss."""
        return number if self.scale is None else number / self.scale.to(number)

    def slope(self, u: Direction) -> Tensor:
        """Return <g, u>."""
        return self.unscaled(self.gradient.slope(u))

    def replayed(self, u: Direction) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, H u> by the replay; raise `Unsupported` if it does not work."""
        assert self.recording is not None
        direction = {v: u[v] for v in self.gradient.variables}
        slope, curvature = self.recording.along(self.gradient.grads, direction)
        return self.unscaled(slope), self.unscaled(curvature)

    def with_graph(self) -> _MicroBatch:
        """Return the same loss with a graph of its gradient instead of a recording."""
        with torch.enable_grad():
            grads = gradients_with_graph(self.loss, self.gradient.variables)
        return self._replace(gradient=self.gradient._replace(grads=grads), recording=None)


class MicroBatches:
    """The losses of the present step, each differentiated as it arrives.

    If the curvature is measured their graphs stay until the step, because only then is the
    direction known: the memory is that of the whole batch.

    Attributes
    ----------
    value : Tensor or None
        The sum of the losses; None before the first.
    reduced : bool
        Whether gradients and loss are means over all processes.
    methods : Methods
        The methods that are left to measure the curvature.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.reduced = True
        self.methods = Methods()
        self._batches: list[_MicroBatch] = []

    def __bool__(self) -> bool:
        """Return whether there is a loss."""
        return bool(self._batches)

    def add(
        self,
        loss: Any,
        params: Sequence[Tensor],
        *,
        methods: Methods,
        scaler: Any = None,
        sync: bool = True,
    ) -> None:
        """Add the gradient of `loss` to ``p.grad`` and keep what the measurement needs.

        `methods` are those to measure the curvature; empty if it is not measured.
        """
        check_scalar(loss, "loss")
        if not loss.requires_grad:
            msg = "loss must have a graph, got a tensor without one; do not detach it"
            raise ValueError(msg)
        scale = None if scaler is None else scaler.scale(torch.ones_like(loss.detach()))
        with torch.enable_grad():
            scaled = loss if scale is None else loss * scale.to(loss.dtype)
        # Later micro-batches start with the method that the first one has fallen back to.
        (variables, found, recording), self.methods = differentiate_with_fallback(
            scaled, params, self.methods or methods, sync=sync
        )
        with torch.no_grad():
            for p, g in zip(params, reduce_scatter(params, variables, found), strict=True):
                if g is not None:
                    # A copy: clipping changes p.grad in place, and must not change the graph.
                    p.grad = g.clone() if p.grad is None else p.grad.add_(g)
            self.value = _value(loss) if self.value is None else self.value + _value(loss)
        root = scaled if self.methods else scaled.detach()
        gradient = Gradient.without_unused(params, variables, found)
        self._batches.append(_MicroBatch(root, gradient, scale, recording))

    def free(self) -> None:
        """Drop the losses, and free what is recorded of their graphs even if the caller holds them.

        All at once, because losses may share parts of a graph.
        """
        for batch in self._batches:
            if batch.recording is not None:
                batch.recording.free()
        self._batches = []

    def by_variable(self, direction: Direction) -> Direction:
        """Return u by variable."""
        gradients = [batch.gradient for batch in self._batches]
        return {v: u for gradient in gradients for v, u in gradient.by_variable(direction).items()}

    def slope(self, u: Direction) -> Tensor:
        """Return the sum of <g, u> over the losses."""
        return _slope(self._batches, u)

    def slope_and_curvature(self, u: Direction) -> tuple[Tensor, Tensor]:
        """Return the sums of <g, u> and of <u, H u> over the losses."""
        pairs, remaining = [], []
        for batch in self._batches:
            if batch.recording is None:
                remaining.append(batch)
                continue
            try:
                pairs.append(batch.replayed(u))
            except Unsupported as error:
                if self.methods.current.record:  # only the first failure changes the method
                    self.methods = self.methods.fall_back(error)
                remaining.append(batch.with_graph())
        if remaining:
            product = _product(remaining, u, retain_graph=False)
            curvature = TensorListSpace().vdot([u[v] for v in product], list(product.values()))
            pairs.append((_slope(remaining, u), curvature))
        self.free()
        slopes, curvatures = zip(*pairs, strict=True)
        return torch.stack(slopes).sum(), torch.stack(curvatures).sum()

    def product(self, direction: Direction, *, retain_graph: bool) -> Direction:
        """Return the sum of H u over the losses."""
        product = _product(self._batches, self.by_variable(direction), retain_graph=retain_graph)
        found: Direction = {}
        for gradient in (batch.gradient for batch in self._batches):
            # Not a sum: each entry of `product` is summed over the losses already.
            found |= gradient.by_param([product[v] for v in gradient.variables])
        return found


def _slope(batches: Sequence[_MicroBatch], u: Direction) -> Tensor:
    """Return the sum of <g, u> over the losses."""
    return torch.stack([batch.slope(u) for batch in batches if batch.gradient.grads]).sum()


def _product(batches: Sequence[_MicroBatch], u: Direction, *, retain_graph: bool) -> Direction:
    """Return H u by variable, summed over the losses, in one call: they may share a graph."""
    variables = list(dict.fromkeys(v for batch in batches for v in batch.gradient.variables))
    outputs, vectors = [], []
    for batch in batches:
        for v, g in zip(batch.gradient.variables, batch.gradient.grads, strict=True):
            outputs.append(g)
            vectors.append(u[v] if batch.scale is None else u[v] / batch.scale.to(u[v]))
    try:
        for batch in batches:
            refuse_once_differentiable(batch.loss)
        with torch.enable_grad():
            product = vector_jacobian(outputs, variables, vectors, retain_graph=retain_graph)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        msg = (
            f"the loss given to backward has no second derivative ({error}); run the model "
            "under cdat_torch.further_differentiable(), or pass a closure "
            "to step() instead"
        )
        raise RuntimeError(msg) from error
    return dict(zip(variables, product, strict=True))


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


def _value(loss: Tensor) -> Tensor:
    return loss.detach().to(scalar_dtype(loss.device))
