"""The losses of a step that `TunedOptimizer.backward` has differentiated, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdat_torch.curvature.autograd import check_scalar, vector_jacobian
from cdat_torch.curvature.fallback import Methods, differentiate_with_fallback
from cdat_torch.curvature.methods import gradients_with_graph
from cdat_torch.curvature.replay import Recording, Unsupported
from cdat_torch.distributed.fsdp import reduce_scatter
from cdat_torch.kernels import refuse_once_differentiable
from cdat_torch.spaces import TensorListSpace
from cdat_torch.step.evaluation import Direction, Gradient, value_of


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
            self.value = value_of(loss) if self.value is None else self.value + value_of(loss)
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
