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
"""u by variable; the variables are what the loss was differentiated with respect to."""


class Gradient(NamedTuple):
    """The gradient of one loss.

    Attributes
    ----------
    params : list of Tensor
        The parameters of the optimizer.
    variables : list of Tensor
        The tensors that the loss was computed with: the parameters, or what modules unsharded.
    grads : list of Tensor
        With respect to `variables`.
    """

    params: list[Tensor]
    variables: list[Tensor]
    grads: list[Tensor]

    @classmethod
    def known(
        cls, params: Sequence[Tensor], variables: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> Gradient:
        """Return the gradient with respect to what the loss depends on."""
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
        """Give the methods that suit the variables: only exact ones if some were unsharded.

        Finite differences do not suit these: the modules would undo a displacement.
        """
        try:
            yield methods.without("finite_difference") if self.unsharded else methods
        except (RuntimeError, NotImplementedError) as error:
            if self.unsharded:
                error.add_note('for modules under fully_shard pass curvature="finite_difference"')
            raise

    def along(self, direction: Direction) -> Direction:
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

    def slope(self, along: Direction) -> Tensor:
        """Return <g, u>."""
        u = [along[v] for v in self.variables]
        return TensorListSpace().vdot([g.detach() for g in self.grads], u)


class StepLoss(Protocol):
    """What a step needs to know of its loss; the numbers are those of this process alone."""

    @property
    def value(self) -> Tensor | None:
        """The loss, detached; None if it is not known."""
        ...

    def along(self, direction: Direction) -> Direction:
        """Return u by variable, as `slope` and `model` take it, given u by parameter."""
        ...

    @property
    def methods(self) -> Methods:
        """The methods that are left to measure the curvature."""
        ...

    def slope(self, along: Direction) -> Tensor:
        """Return <g, u>, with the gradient as it was before any clipping."""
        ...

    def model(self, along: Direction) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, H u>."""
        ...

    def product(self, direction: Direction, *, retain_graph: bool) -> Direction:
        """Return H u by parameter, zero where there is none.

        Without `retain_graph` this must be the last product.
        """
        ...


@dataclass
class ClosureLoss:
    """A loss that can be evaluated again.

    `gradient` and `recording` are what the method in use needs. `start` is the random state from
    which the closure was evaluated.
    """

    closure: LossFn
    start: RandomState
    loss: Tensor
    gradient: Gradient
    methods: Methods = Methods()  # noqa: RUF009 (it is frozen)
    recording: Recording | None = None

    @property
    def value(self) -> Tensor:
        """The loss."""
        return _value(self.loss)

    def along(self, direction: Direction) -> Direction:
        """Return u by variable."""
        return self.gradient.along(direction)

    def slope(self, along: Direction) -> Tensor:
        """Return <g, u>."""
        return self.gradient.slope(along)

    def model(self, along: Direction) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, H u>."""
        evaluated = self._evaluated(along)
        with torch.enable_grad(), self.gradient.suitable(self.methods) as methods:
            found, self.methods = methods.first_that_works(lambda method: method.along(evaluated))
        return found

    def product(self, direction: Direction, *, retain_graph: bool) -> Direction:
        """Return H u."""
        evaluated = self._evaluated(self.along(direction))
        with torch.enable_grad(), self.gradient.suitable(self.methods) as methods:
            product, self.methods = methods.first_that_works(
                lambda method: with_product(method).product(evaluated, retain_graph=retain_graph)
            )
        return self.gradient.by_param(product)

    def _evaluated(self, along: Direction) -> EvaluatedLoss:
        _, variables, grads = self.gradient
        u = [along[v] for v in variables]
        return EvaluatedLoss(
            self.closure, self.loss, grads, variables, u, self.start, self.recording
        )


class _Record(NamedTuple):
    """The loss of one micro-batch, `scale` times itself if a GradScaler is in use."""

    loss: Tensor
    gradient: Gradient
    scale: Tensor | None
    recording: Recording | None

    def unscaled(self, number: Tensor) -> Tensor:
        """Return a number for the loss itself, given it for the scaled loss."""
        return number if self.scale is None else number / self.scale.to(number)

    def slope(self, along: Direction) -> Tensor:
        """Return <g, u>."""
        return self.unscaled(self.gradient.slope(along))

    def replayed(self, along: Direction) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, H u> by the replay; raise `Unsupported` if it does not work."""
        assert self.recording is not None
        u = {v: along[v] for v in self.gradient.variables}
        slope, curvature = self.recording.along(self.gradient.grads, u)
        return self.unscaled(slope), self.unscaled(curvature)

    def with_graph(self) -> _Record:
        """Return the same loss with a graph of its gradient instead of a recording."""
        with torch.enable_grad():
            grads = gradients_with_graph(self.loss, self.gradient.variables)
        return self._replace(gradient=self.gradient._replace(grads=grads), recording=None)


class MicroBatches:
    """The losses of the present step, each differentiated when it came.

    If the curvature is measured their graphs stay until the step, because only then is the
    direction known: the memory is that of the whole batch.
    """

    def __init__(self) -> None:
        self._records: list[_Record] = []
        self._value: Tensor | None = None
        self.methods = Methods()
        self.reduced = True
        """Whether gradients and loss are means over all processes."""

    def __bool__(self) -> bool:
        """Return whether there is a loss."""
        return bool(self._records)

    @property
    def value(self) -> Tensor | None:
        """The sum of the losses."""
        return self._value

    def reduce_value(self, mean: Tensor) -> None:
        """Replace the loss by its mean over all processes."""
        self._value, self.reduced = mean, True

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
        (variables, found, recording), self.methods = differentiate_with_fallback(
            scaled, params, methods, sync=sync
        )
        with torch.no_grad():
            for p, g in zip(params, reduce_scatter(params, variables, found), strict=True):
                if g is not None:
                    # A copy: clipping changes p.grad in place, and must not change the graph.
                    p.grad = g.clone() if p.grad is None else p.grad.add_(g)
            self._value = _value(loss) if self._value is None else self._value + _value(loss)
        root = scaled if self.methods else scaled.detach()
        gradient = Gradient.known(params, variables, found)
        self._records.append(_Record(root, gradient, scale, recording))

    def free(self) -> None:
        """Free the graphs, also if the caller still holds the losses."""
        for record in self._records:  # all at the end: losses may share parts of a graph
            if record.recording is not None:
                record.recording.free()
        self._records = []

    def along(self, direction: Direction) -> Direction:
        """Return u by variable."""
        records = [record.gradient for record in self._records]
        return {v: u for gradient in records for v, u in gradient.along(direction).items()}

    def slope(self, along: Direction) -> Tensor:
        """Return the sum of <g, u> over the losses."""
        return _slope(self._records, along)

    def model(self, along: Direction) -> tuple[Tensor, Tensor]:
        """Return the sums of <g, u> and of <u, H u> over the losses."""
        pairs, remaining = [], []
        for record in self._records:
            if record.recording is None:
                remaining.append(record)
                continue
            try:
                pairs.append(record.replayed(along))
            except Unsupported as error:
                if self.methods.current.record:  # else another loss has already fallen back
                    self.methods = self.methods.fall_back(error)
                remaining.append(record.with_graph())
        if remaining:  # together, because they may share a graph
            product = _product(remaining, along, retain_graph=False)
            curvature = TensorListSpace().vdot([along[v] for v in product], list(product.values()))
            pairs.append((_slope(remaining, along), curvature))
        self.free()
        slopes, curvatures = zip(*pairs, strict=True)
        return torch.stack(slopes).sum(), torch.stack(curvatures).sum()

    def product(self, direction: Direction, *, retain_graph: bool) -> Direction:
        """Return the sum of H u over the losses."""
        product = _product(self._records, self.along(direction), retain_graph=retain_graph)
        found: Direction = {}
        for gradient in (record.gradient for record in self._records):
            found |= gradient.by_param([product[v] for v in gradient.variables])
        return found


def _slope(records: Sequence[_Record], along: Direction) -> Tensor:
    """Return the sum of <g, u> over the losses."""
    return torch.stack([r.slope(along) for r in records if r.gradient.grads]).sum()


def _product(records: Sequence[_Record], along: Direction, *, retain_graph: bool) -> Direction:
    """Return H u by variable, summed over the losses; a graph that they share is freed once."""
    gradients = [record.gradient for record in records]
    variables = list(dict.fromkeys(v for gradient in gradients for v in gradient.variables))
    outputs, vectors = [], []
    for record in records:
        for v, g in zip(record.gradient.variables, record.gradient.grads, strict=True):
            u = along[v]
            outputs.append(g)
            vectors.append(u if record.scale is None else u / record.scale.to(u))
    try:
        for record in records:
            refuse_once_differentiable(record.loss)
        with torch.enable_grad():
            product = vector_jacobian(outputs, variables, vectors, retain_graph=retain_graph)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
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
    methods: Methods = Methods()  # noqa: RUF009 (it is frozen)

    @property
    def value(self) -> None:
        """Not known."""
        return

    def along(self, direction: Direction) -> Direction:
        """Return u as it is."""
        return direction

    def slope(self, along: Direction) -> Tensor:
        """Return <g, u>."""
        pairs = [(p.grad, along[p]) for p in self.params if p.grad is not None]
        return TensorListSpace().vdot([g for g, _ in pairs], [u for _, u in pairs])

    def model(self, along: Direction) -> tuple[Tensor, Tensor]:
        """Raise: there is no graph."""
        msg = "no curvature without a loss"
        raise NotImplementedError(msg)

    def product(self, direction: Direction, *, retain_graph: bool) -> Direction:
        """Raise: there is no graph."""
        msg = "no product with the Hessian without a loss"
        raise NotImplementedError(msg)


def _value(loss: Tensor) -> Tensor:
    return loss.detach().to(scalar_dtype(loss.device))
