"""The loss of a step and its gradient at the present parameters.

Either a closure gave the loss (`ClosureLoss`), or `TunedOptimizer.backward` differentiated one loss
after the other (`MicroBatches`). Both know the slope and the curvature along a direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from cdat_torch.curvature.autograd import LossFn, check_scalar, vector_jacobian
from cdat_torch.curvature.fallback import differentiated, given_up
from cdat_torch.curvature.measure import hessian_product, quadratic_model
from cdat_torch.curvature.methods import BY_NAME, Point, Ways, gradients_with_graph
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
        What the loss was computed with: the same tensors, or what modules gathered from them.
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
        """Whether modules gathered variables for a second derivative."""
        return any(v is not p for v, p in zip(self.variables, self.params, strict=True))

    @contextmanager
    def suitable(self, ways: Ways) -> Iterator[Ways]:
        """Give the ways, which are exact or raise if variables were gathered.

        Differences cannot take over: the modules would undo a displacement of what they gathered.
        """
        try:
            exact = tuple(way for way in ways if way != "finite_difference")
            yield exact if self.unsharded else ways
        except (RuntimeError, NotImplementedError) as error:
            if self.unsharded:
                error.add_note('for modules under fully_shard pass curvature="finite_difference"')
            raise

    def along(self, direction: Direction) -> Direction:
        """Return u, given by parameter, by variable."""
        if not self.unsharded:
            return direction
        unshard(self.params)
        u = redistribute_like([direction[p] for p in self.params], self.variables)
        return dict(zip(self.variables, u, strict=True))

    def by_param(self, vector: Sequence[Tensor]) -> Direction:
        """Return by parameter what is given by variable; the mean of what was gathered."""
        means = reduce_scatter(self.params, self.variables, vector)
        return {p: h for p, h in zip(self.params, means, strict=True) if h is not None}

    def slope(self, along: Direction) -> Tensor:
        """Return <g, u>."""
        u = [along[v] for v in self.variables]
        return TensorListSpace().vdot([g.detach() for g in self.grads], u)


class StepLoss(Protocol):
    """What a step asks; the numbers are those of this process alone."""

    @property
    def value(self) -> Tensor | None:
        """The loss, a 0-d tensor; None if it is not known."""
        ...

    def along(self, direction: Direction) -> Direction:
        """Return u, given by parameter of the optimizer, as `slope` and `curvature` take it."""
        ...

    @property
    def ways(self) -> Ways:
        """The ways to measure the curvature that are left, the one in use first."""
        ...

    def slope(self, along: Direction) -> Tensor:
        """Return <g, u>, with the gradient as it was before any clipping."""
        ...

    def model(self, along: Direction) -> tuple[Tensor, Tensor]:
        """Return <g, u> and <u, H u>."""
        ...

    def product(self, direction: Direction, *, retain_graph: bool) -> Direction:
        """Return H u by parameter, zero where there is none.

        Without `retain_graph` it is the last product.
        """
        ...


@dataclass
class ClosureLoss:
    """A loss that can be evaluated again.

    `gradient` and `recording` are what the first of the `ways` needs. `start` is the random state
    from which the closure was evaluated.
    """

    closure: LossFn
    start: RandomState
    loss: Tensor
    gradient: Gradient
    ways: Ways = ()
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
        with torch.enable_grad(), self.gradient.suitable(self.ways) as ways:
            found, self.ways = quadratic_model(self._point(along), ways=ways)
        return found

    def product(self, direction: Direction, *, retain_graph: bool) -> Direction:
        """Return H u."""
        point = self._point(self.along(direction))
        with torch.enable_grad(), self.gradient.suitable(self.ways) as ways:
            product, self.ways = hessian_product(point, ways=ways, retain_graph=retain_graph)
        return self.gradient.by_param(product)

    def _point(self, along: Direction) -> Point:
        _, variables, grads = self.gradient
        u = [along[v] for v in variables]
        return Point(self.closure, self.loss, grads, variables, u, self.start, self.recording)


class _Record(NamedTuple):
    loss: Tensor
    gradient: Gradient
    scale: Tensor | None
    recording: Recording | None

    def unscaled(self, number: Tensor) -> Tensor:
        """Return a number of the scaled loss for the loss itself."""
        return number if self.scale is None else number / self.scale.to(number)


class MicroBatches:
    """The losses of the present step, each differentiated when it came.

    Where the curvature is to be measured their graphs stay until the step, because the direction is
    known only then: the memory is that of the whole batch.
    """

    def __init__(self) -> None:
        self._records: list[_Record] = []
        self._value: Tensor | None = None
        self.ways: Ways = ()
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
        """Take the mean over all processes for the loss."""
        self._value, self.reduced = mean, True

    def add(
        self,
        loss: Any,
        params: Sequence[Tensor],
        *,
        ways: Ways,
        scaler: Any = None,
        sync: bool = True,
    ) -> None:
        """Add the gradient of `loss` to ``p.grad`` and keep what the measurement needs.

        `ways` are those to measure the curvature; none if it is not measured.
        """
        check_scalar(loss, "loss")
        if not loss.requires_grad:
            msg = "loss must have a graph, got a tensor without one; do not detach it"
            raise ValueError(msg)
        scale = None if scaler is None else scaler.scale(torch.ones_like(loss.detach()))
        with torch.enable_grad():
            scaled = loss if scale is None else loss * scale.to(loss.dtype)
        (variables, found, recording), self.ways = differentiated(scaled, params, ways, sync=sync)
        with torch.no_grad():
            for p, shared in zip(params, reduce_scatter(params, variables, found), strict=True):
                if shared is not None:
                    # A copy: what clips p.grad must not reach into the graph of the gradient.
                    p.grad = shared.clone() if p.grad is None else p.grad.add_(shared)
            self._value = _value(loss) if self._value is None else self._value + _value(loss)
        root = scaled if self.ways else scaled.detach()
        gradient = Gradient.known(params, variables, found)
        self._records.append(_Record(root, gradient, scale, recording))

    def free(self) -> None:
        """Release what is kept, also if the caller still holds the losses."""
        for record in self._records:  # all at the end, since losses may share parts of a graph
            if record.recording is not None:
                record.recording.free()
        self._records = []

    def along(self, direction: Direction) -> Direction:
        """Return u by variable."""
        records = [record.gradient for record in self._records]
        return {v: u for gradient in records for v, u in gradient.along(direction).items()}

    def slope(self, along: Direction) -> Tensor:
        """Return the sum of the <g, u> of all losses."""
        parts = [r.unscaled(r.gradient.slope(along)) for r in self._records if r.gradient.grads]
        return torch.stack(parts).sum()

    def model(self, along: Direction) -> tuple[Tensor, Tensor]:
        """Return the sums of the <g, u> and of the <u, H u> of all losses."""
        pairs, records = [], self._records
        self._records = []
        for record in records:
            if record.recording is None:
                self._records.append(record)
                continue
            try:
                u = {v: along[v] for v in record.gradient.variables}
                found = record.recording.along(record.gradient.grads, u)
                pairs.append(tuple(map(record.unscaled, found)))
            except Unsupported as error:
                if BY_NAME[self.ways[0]].recorded:  # else another loss has given it up already
                    self.ways = given_up(self.ways, error)
                self._records.append(_differentiated_again(record))
        if self._records:
            product = self._product(along, retain_graph=False)
            curvature = TensorListSpace().vdot([along[v] for v in product], list(product.values()))
            pairs.append((self.slope(along), curvature))
        self._records = records
        self.free()
        slopes, curvatures = zip(*pairs, strict=True)
        return torch.stack(slopes).sum(), torch.stack(curvatures).sum()

    def product(self, direction: Direction, *, retain_graph: bool) -> Direction:
        """Return the sum of the H u of all losses."""
        product = self._product(self.along(direction), retain_graph=retain_graph)
        found: Direction = {}
        for gradient in (record.gradient for record in self._records):
            found |= gradient.by_param([product[v] for v in gradient.variables])
        return found

    def _product(self, along: Direction, *, retain_graph: bool) -> Direction:
        """Return H u by variable; a graph that the losses share is freed once."""
        gradients = [record.gradient for record in self._records]
        variables = list(dict.fromkeys(v for gradient in gradients for v in gradient.variables))
        outputs, vectors = [], []
        for record in self._records:
            for v, g in zip(record.gradient.variables, record.gradient.grads, strict=True):
                u = along[v]
                outputs.append(g)
                vectors.append(u if record.scale is None else u / record.scale.to(u))
        try:
            for record in self._records:
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


def _differentiated_again(record: _Record) -> _Record:
    """Return a record with a graph of its gradient, in the place of what was watched."""
    variables = record.gradient.variables
    with torch.enable_grad():
        grads = gradients_with_graph(record.loss, variables)
    return record._replace(gradient=record.gradient._replace(grads=grads), recording=None)


@dataclass
class PlainGradient:
    """Gradients in ``p.grad`` of a loss that is not known: enough for rules that need a slope."""

    params: list[Tensor]
    ways: Ways = ()

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
