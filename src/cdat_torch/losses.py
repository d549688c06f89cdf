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

from cdat_torch.curvature import directional_curvature, hessian_product
from cdat_torch.differentiability import refuse_once_differentiable
from cdat_torch.differentiation import LossFn, check_scalar, differentiate, vector_jacobian
from cdat_torch.fully_sharded import gathered, scattered, spread_out
from cdat_torch.methods import Point
from cdat_torch.reevaluation import RandomState
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
    def gathered(self) -> bool:
        """Whether modules gathered variables for a second derivative."""
        return any(v is not p for v, p in zip(self.variables, self.params, strict=True))

    @contextmanager
    def suitable(self, method: str) -> Iterator[str]:
        """Give the method, which is exact or raises if variables were gathered.

        Differences cannot take over: the modules would undo a displacement of what they gathered.
        """
        try:
            yield "hessian" if self.gathered else method
        except (RuntimeError, NotImplementedError) as error:
            if self.gathered:
                error.add_note('for modules under fully_shard pass curvature="finite_difference"')
            raise

    def along(self, direction: Direction) -> Direction:
        """Return u, given by parameter, by variable."""
        if not self.gathered:
            return direction
        gathered(self.params)
        u = spread_out([direction[p] for p in self.params], self.variables)
        return dict(zip(self.variables, u, strict=True))

    def by_param(self, vector: Sequence[Tensor]) -> Direction:
        """Return by parameter what is given by variable; the mean of what was gathered."""
        means = scattered(self.params, self.variables, vector)
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

    def slope(self, along: Direction) -> Tensor:
        """Return <g, u>, with the gradient as it was before any clipping."""
        ...

    def curvature(self, along: Direction, method: str) -> tuple[Tensor, str]:
        """Return <u, H u> and the method that gave it."""
        ...

    def product(
        self, direction: Direction, method: str, *, retain_graph: bool
    ) -> tuple[Direction, str]:
        """Return H u by parameter, zero where there is none, and the method that gave it.

        Without `retain_graph` it is the last product.
        """
        ...


@dataclass
class ClosureLoss:
    """A loss that can be evaluated again.

    `gradient` carries its graph if the curvature is to be measured exactly. `start` is the random
    state from which the closure was evaluated.
    """

    closure: LossFn
    start: RandomState
    loss: Tensor
    gradient: Gradient

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

    def curvature(self, along: Direction, method: str) -> tuple[Tensor, str]:
        """Return <u, H u> and the method that gave it."""
        with torch.enable_grad(), self.gradient.suitable(method) as way:
            return directional_curvature(self._point(along), method=way)

    def product(
        self, direction: Direction, method: str, *, retain_graph: bool
    ) -> tuple[Direction, str]:
        """Return H u and the method that gave it."""
        point = self._point(self.along(direction))
        with torch.enable_grad(), self.gradient.suitable(method) as way:
            product, used = hessian_product(point, method=way, retain_graph=retain_graph)
        return self.gradient.by_param(product), used

    def _point(self, along: Direction) -> Point:
        _, variables, grads = self.gradient
        u = [along[v] for v in variables]
        return Point(self.closure, self.loss, grads, variables, u, self.start)


class _Record(NamedTuple):
    loss: Tensor
    gradient: Gradient
    scale: Tensor | None


class MicroBatches:
    """The losses of the present step, each differentiated when it came.

    Where the curvature is to be measured their graphs stay until the step, because the direction is
    known only then: the memory is that of the whole batch.
    """

    def __init__(self) -> None:
        self._records: list[_Record] = []
        self._value: Tensor | None = None
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
        create_graph: bool,
        scaler: Any = None,
        sync: bool = True,
    ) -> None:
        """Add the gradient of `loss` to ``p.grad`` and keep what the measurement needs."""
        check_scalar(loss, "loss")
        if not loss.requires_grad:
            msg = "loss must have a graph, got a tensor without one; do not detach it"
            raise ValueError(msg)
        scale = None if scaler is None else scaler.scale(torch.ones_like(loss.detach()))
        with torch.enable_grad():
            scaled = loss if scale is None else loss * scale.to(loss.dtype)
            variables, found = differentiate(scaled, params, create_graph=create_graph, sync=sync)
        with torch.no_grad():
            for p, shared in zip(params, scattered(params, variables, found), strict=True):
                if shared is not None:
                    # A copy: what clips p.grad must not reach into the graph of the gradient.
                    p.grad = shared.clone() if p.grad is None else p.grad.add_(shared)
            self._value = _value(loss) if self._value is None else self._value + _value(loss)
        root = scaled if create_graph else scaled.detach()
        self._records.append(_Record(root, Gradient.known(params, variables, found), scale))

    def along(self, direction: Direction) -> Direction:
        """Return u by variable."""
        records = [record.gradient for record in self._records]
        return {v: u for gradient in records for v, u in gradient.along(direction).items()}

    def slope(self, along: Direction) -> Tensor:
        """Return the sum of the <g, u> of all losses."""
        parts = []
        for record in self._records:
            if record.gradient.grads:
                part = record.gradient.slope(along)
                parts.append(part if record.scale is None else part / record.scale.to(part))
        return torch.stack(parts).sum()

    def curvature(self, along: Direction, method: str) -> tuple[Tensor, str]:
        """Return the sum of the <u, H u> of all losses."""
        product = self._product(along, retain_graph=False)
        return TensorListSpace().vdot([along[v] for v in product], list(product.values())), method

    def product(
        self, direction: Direction, method: str, *, retain_graph: bool
    ) -> tuple[Direction, str]:
        """Return the sum of the H u of all losses."""
        product = self._product(self.along(direction), retain_graph=retain_graph)
        found: Direction = {}
        for gradient in (record.gradient for record in self._records):
            found |= gradient.by_param([product[v] for v in gradient.variables])
        return found, method

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


@dataclass
class PlainGradient:
    """Gradients in ``p.grad`` of a loss that is not known: enough for rules that need a slope."""

    params: list[Tensor]

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

    def curvature(self, along: Direction, method: str) -> tuple[Tensor, str]:
        """Raise: there is no graph."""
        msg = f"no curvature ({method}) without a loss"
        raise NotImplementedError(msg)

    def product(
        self, direction: Direction, method: str, *, retain_graph: bool
    ) -> tuple[Direction, str]:
        """Raise: there is no graph."""
        msg = f"no product with the Hessian ({method}) without a loss"
        raise NotImplementedError(msg)


def _value(loss: Tensor) -> Tensor:
    return loss.detach().to(scalar_dtype(loss.device))
