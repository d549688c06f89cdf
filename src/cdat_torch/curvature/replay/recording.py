"""A backward pass that is watched, and the sweep through the graph that follows it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from cdat_torch.curvature.replay import fallback
from cdat_torch.curvature.replay.arithmetic import dot
from cdat_torch.curvature.replay.graph import Graph, rule_of
from cdat_torch.curvature.replay.registry import (
    Edge,
    InnerProducts,
    Node,
    Pushed,
    Rule,
    Tangent,
    Unsupported,
    memory,
)
from cdat_torch.curvature.replay.verification import Mismatch, norm, verify
from cdat_torch.distributed.dtensor import is_dtensor

Pair = tuple[Tensor, Tensor]
_VERIFIED: set[tuple[Any, ...]] = set()
"""Signatures of graphs in which every rule agreed with the fallback."""
_MOST_VERIFIED = 4096
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_COARSE = 0.1
"""Relative tolerance for half precision."""


class Recording:
    """Watches the backward pass of a loss, and replays its graph along a direction.

    Parameters
    ----------
    loss : Tensor
        A scalar with its graph.
    variables : sequence of Tensor
        The parameters.
    outputs : sequence of Tensor, optional
        Those of the model, for the Gauss-Newton curvature.

    Raises
    ------
    Unsupported
        If the graph holds an operation that cannot be replayed.
    """

    def __init__(
        self, loss: Tensor, variables: Sequence[Tensor], outputs: Sequence[Tensor] | None = None
    ) -> None:
        if any(v.is_complex() or is_dtensor(v) or not v.is_leaf for v in variables):
            msg = "parameters are complex, sharded or results of other operations"
            raise Unsupported(msg)
        self._graph = Graph(loss, variables, outputs)
        self._variables = list(variables)
        self._last: Pair | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the rules need of the backward pass that runs in the block.

        It must retain the graph, and compute the gradient with respect to all variables.
        """
        handles = []
        try:
            for node in self._graph.nodes:
                adjoint, gradients = self._graph.needs(node)
                if gradients:
                    keep = functools.partial(_keep_gradients, node, gradients, adjoint)
                    handles.append(node.autograd.register_hook(keep))
                elif adjoint:
                    keep = functools.partial(_keep_adjoints, node, rule_of(node))
                    handles.append(node.autograd.register_prehook(keep))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def along(self, grads: Sequence[Tensor], direction: Mapping[Tensor, Tensor]) -> Pair:
        """Return <g, u> and <u, H u>, after a test that the sweep finds the same <g, u>.

        Parameters
        ----------
        grads : sequence of Tensor
            The gradient, in the order of `direction`.
        direction : mapping
            u by variable; what it lacks does not move.

        Returns
        -------
        slope, curvature : Tensor
            0-d, float64.

        Raises
        ------
        Mismatch
            If the two slopes differ, or a rule is wrong.
        """
        u = list(direction.values())
        parts = [dot(a, b) for a, b in zip(grads, u, strict=True)]
        known = {memory(a, b): part for a, b, part in zip(grads, u, parts, strict=True)}
        replayed, curvature = self.sweep(direction, known)
        terms = torch.stack([part.to(replayed) for part in parts])
        slope, size = terms.sum(), terms.abs().sum()
        difference = (replayed - slope).abs()
        if not bool(difference <= self._coarse * size):
            # u may be orthogonal to g: then rounding errors are those of longer vectors
            size = torch.stack([norm(a) * norm(b) for a, b in zip(grads, u, strict=True)]).sum()
            allowed = torch.maximum(self._coarse * 0.1 * size, self._rounding().to(size))
            if bool(torch.isfinite(slope)) and not bool(difference <= allowed):
                msg = (
                    f"the replayed slope is {float(replayed):.6g}, the true one {float(slope):.6g}"
                )
                raise Mismatch(msg)
        self._last = None
        return slope, curvature

    def sweep(
        self, direction: Mapping[Tensor, Tensor], inner_products: InnerProducts | None = None
    ) -> Pair:
        """Return slope and curvature along a direction; this can be done once.

        Parameters
        ----------
        direction : mapping
            u by variable.
        inner_products : dict, optional
            Inner products of gradients and directions that are known.

        Returns
        -------
        slope, curvature : Tensor
            0-d, float64.

        Raises
        ------
        Mismatch
            If a rule does not agree with the double backward of its operation, which is tested
            where the graph has not been seen before.
        """
        graph = self._graph
        tangents: dict[Edge, Tangent] = {
            edge: direction[variable].detach().to(variable)
            for edge, variable in graph.leaves.items()
            if variable in direction
        }
        uses, terms = graph.uses.copy(), []
        last = next((node for node in reversed(graph.nodes) if node.has_large_adjoint), None)
        with torch.no_grad():
            for node in graph.nodes:
                edges = node.edges
                moved = [tangents.get(edge) for edge in edges]
                if any(tangent is not None for tangent in moved):
                    node.inner_products = inner_products or {}
                    pushed = _pushed(node, moved)
                    for i, tangent in enumerate(pushed.of_outputs()):
                        tangents[node.autograd, i] = tangent
                    if node is last and (tangent := tangents[node.autograd, 0]) is not None:
                        self._last = node.adjoint, tangent
                    if pushed.second is not None and not node.first_order:
                        terms.append(pushed.second.to(torch.float64).reshape(()))
                node.detached()
                for edge in edges:
                    if edge in uses:
                        uses[edge] -= 1
                        if not uses[edge]:
                            del uses[edge]
                            tangents.pop(edge, None)
        slope = tangents.get(graph.root)
        device = next(iter(direction.values())).device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        curvature = torch.stack(terms).sum() if terms else zero
        slope = zero if slope is None else slope.to(torch.float64)
        if graph.signature not in _VERIFIED:
            verify(graph, self._coarse)
            if len(_VERIFIED) < _MOST_VERIFIED and bool(torch.isfinite(slope + curvature)):
                _VERIFIED.add(graph.signature)
        return slope, curvature

    def free(self) -> None:
        """Release what the graph has saved, as a backward pass that does not retain it would do.

        Whoever holds the loss holds its graph. Undefined adjoints run through it, for which no node
        computes anything.
        """
        root, number = self._graph.root
        handle = root.register_prehook(lambda adjoints: (None,) * len(adjoints))
        try:
            # A hook of the user's may not expect None: then the graph lives as long as the loss.
            with suppress(Exception):
                torch.autograd.grad(
                    GradientEdge(root, number),
                    self._variables,
                    torch.zeros_like(Node(root).zeros(number)),
                    allow_unused=True,
                )
        finally:
            handle.remove()

    def _rounding(self) -> Tensor:
        """Return about the rounding error of a slope, which near a minimum is all there is of it.

        The gradients of the single samples cancel there, those with respect to the last operation's
        outputs do not.
        """
        if self._last is None:
            return torch.zeros(())
        adjoint, tangent = self._last
        return 100 * torch.finfo(tangent.dtype).eps * norm(adjoint) * norm(tangent)

    @property
    def _coarse(self) -> float:
        dtypes = {v.dtype for v in self._variables} | self._graph.dtypes
        return max(_TOLERANCE.get(dtype, _COARSE) for dtype in dtypes)


def _keep_adjoints(node: Node, rule: Rule, adjoints: tuple[Tensor | None, ...]) -> None:
    node.adjoints = rule.kept(node, adjoints)


def _keep_gradients(
    node: Node,
    positions: tuple[int, ...],
    adjoint: bool,
    gradients: tuple[Tensor | None, ...],
    adjoints: tuple[Tensor | None, ...],
) -> None:
    if adjoint:
        node.adjoints = tuple(adjoints)
    for position in positions:
        gradient = gradients[position]
        if gradient is not None:
            node.keep(position, gradient)


def _pushed(node: Node, moved: Sequence[Tangent]) -> Pushed:
    """Apply the rule of a node, or the fallback where it covers less than the operation."""
    try:
        pushed: Pushed = rule_of(node).push(node, *moved)
        if pushed is NotImplemented and node.name in fallback.CHECKED:
            return fallback.push(node, *moved)
    except (torch.OutOfMemoryError, Unsupported):
        raise
    except Exception as error:  # what nodes have saved is no stable API
        msg = f"the rule for {node.name} raised {error!r}"
        raise Mismatch(msg) from error
    if pushed is NotImplemented:
        msg = f"{node.name} was called with arguments that its rule does not cover"
        raise Unsupported(msg)
    return pushed
