"""The loss of a step and its gradient at the present parameters.

Either a closure gave the loss (`ClosureLoss`), or `TunedOptimizer.backward` differentiated one loss
after the other (`MicroBatches`). Both know the slope and the curvature along a direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cdat_torch.curvature import directional_curvature, hessian_product
from cdat_torch.differentiability import refuse_once_differentiable
from cdat_torch.differentiation import LossFn, check_scalar, gradients, vector_jacobian
from cdat_torch.methods import Point
from cdat_torch.reevaluation import RandomState
from cdat_torch.spaces import TensorListSpace, scalar_dtype


class StepLoss(Protocol):
    """What a step asks; the numbers are those of this process alone."""

    @property
    def value(self) -> Tensor | None:
        """The loss, a 0-d tensor; None if it is not known."""
        ...

    def slope(self, direction: dict[Tensor, Tensor]) -> Tensor:
        """Return <g, u>, with the gradient as it was before any clipping."""
        ...

    def curvature(self, direction: dict[Tensor, Tensor], method: str) -> tuple[Tensor, str]:
        """Return <u, H u> and the method that gave it."""
        ...

    def product(
        self, direction: dict[Tensor, Tensor], method: str, *, retain_graph: bool
    ) -> tuple[dict[Tensor, Tensor], str]:
        """Return H u by parameter, zero where there is none, and the method that gave it.

        Without `retain_graph` it is the last product.
        """
        ...


@dataclass
class ClosureLoss:
    """A loss that can be evaluated again.

    `grads` carry their graph if the curvature is to be measured exactly. `start` is the random
    state from which the closure was evaluated.
    """

    closure: LossFn
    start: RandomState
    loss: Tensor
    params: list[Tensor]
    grads: list[Tensor]

    @property
    def value(self) -> Tensor:
        """The loss."""
        return _value(self.loss)

    def slope(self, direction: dict[Tensor, Tensor]) -> Tensor:
        """Return <g, u>."""
        u = [direction[p] for p in self.params]
        return TensorListSpace().vdot([g.detach() for g in self.grads], u)

    def curvature(self, direction: dict[Tensor, Tensor], method: str) -> tuple[Tensor, str]:
        """Return <u, H u> and the method that gave it."""
        u = [direction[p] for p in self.params]
        with torch.enable_grad():
            return directional_curvature(
                self.closure,
                self.loss,
                self.grads,
                self.params,
                u,
                method=method,
                start=self.start,
            )

    def product(
        self, direction: dict[Tensor, Tensor], method: str, *, retain_graph: bool
    ) -> tuple[dict[Tensor, Tensor], str]:
        """Return H u and the method that gave it."""
        u = [direction[p] for p in self.params]
        point = Point(self.closure, self.loss, self.grads, self.params, u, self.start)
        with torch.enable_grad():
            product, used = hessian_product(point, method=method, retain_graph=retain_graph)
        return dict(zip(self.params, product, strict=True)), used


class _Record(NamedTuple):
    loss: Tensor
    params: list[Tensor]
    grads: list[Tensor]
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
        self, loss: Any, params: Sequence[Tensor], *, create_graph: bool, scaler: Any = None
    ) -> None:
        """Add the gradient of `loss` to ``p.grad`` and keep what the measurement needs."""
        check_scalar(loss, "loss")
        if not loss.requires_grad:
            msg = "loss must have a graph, got a tensor without one; do not detach it"
            raise ValueError(msg)
        scale = None if scaler is None else scaler.scale(torch.ones_like(loss.detach()))
        with torch.enable_grad():
            scaled = loss if scale is None else loss * scale.to(loss.dtype)
            found = gradients(scaled, params, create_graph=create_graph)
        pairs = [(p, g) for p, g in zip(params, found, strict=True) if g is not None]
        with torch.no_grad():
            for p, g in pairs:
                # A copy: what clips p.grad must not reach into the graph of g.
                p.grad = g.detach().clone() if p.grad is None else p.grad.add_(g.detach())
            self._value = _value(loss) if self._value is None else self._value + _value(loss)
        kept = [g if create_graph else g.detach() for _, g in pairs]
        root = scaled if create_graph else scaled.detach()
        self._records.append(_Record(root, [p for p, _ in pairs], kept, scale))

    def slope(self, direction: dict[Tensor, Tensor]) -> Tensor:
        """Return the sum of the <g, u> of all losses."""
        space = TensorListSpace()
        parts = []
        for record in self._records:
            u = [direction[p] for p in record.params]
            part = space.vdot([g.detach() for g in record.grads], u)
            parts.append(part if record.scale is None else part / record.scale.to(part))
        return torch.stack(parts).sum()

    def curvature(self, direction: dict[Tensor, Tensor], method: str) -> tuple[Tensor, str]:
        """Return the sum of the <u, H u> of all losses."""
        product, used = self.product(direction, method, retain_graph=False)
        return TensorListSpace().vdot([direction[p] for p in product], list(product.values())), used

    def product(
        self, direction: dict[Tensor, Tensor], method: str, *, retain_graph: bool
    ) -> tuple[dict[Tensor, Tensor], str]:
        """Return the sum of the H u of all losses; a graph that they share is freed once."""
        params = list(dict.fromkeys(p for record in self._records for p in record.params))
        outputs, vectors = [], []
        for record in self._records:
            for p, g in zip(record.params, record.grads, strict=True):
                u = direction[p]
                outputs.append(g)
                vectors.append(u if record.scale is None else u / record.scale.to(u))
        try:
            for record in self._records:
                refuse_once_differentiable(record.loss)
            with torch.enable_grad():
                product = vector_jacobian(outputs, params, vectors, retain_graph=retain_graph)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            msg = (
                f"the loss given to backward has no second derivative ({error}); run the model "
                "under cdat_torch.further_differentiable(), or pass a closure "
                "to step() instead"
            )
            raise RuntimeError(msg) from error
        return dict(zip(params, product, strict=True)), method


@dataclass
class PlainGradient:
    """Gradients in ``p.grad`` of a loss that is not known: enough for rules that need a slope."""

    params: list[Tensor]

    @property
    def value(self) -> None:
        """Not known."""
        return

    def slope(self, direction: dict[Tensor, Tensor]) -> Tensor:
        """Return <g, u>."""
        pairs = [(p.grad, direction[p]) for p in self.params if p.grad is not None]
        return TensorListSpace().vdot([g for g, _ in pairs], [u for _, u in pairs])

    def curvature(self, direction: dict[Tensor, Tensor], method: str) -> tuple[Tensor, str]:
        """Raise: there is no graph."""
        msg = f"no curvature ({method}) without a loss"
        raise NotImplementedError(msg)

    def product(
        self, direction: dict[Tensor, Tensor], method: str, *, retain_graph: bool
    ) -> tuple[dict[Tensor, Tensor], str]:
        """Raise: there is no graph."""
        msg = f"no product with the Hessian ({method}) without a loss"
        raise NotImplementedError(msg)


def _value(loss: Tensor) -> Tensor:
    return loss.detach().to(scalar_dtype(loss.device))
