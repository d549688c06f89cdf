"""Watching a backward pass, and the sweep through the graph that follows it.

`Recording.sweep` carries the direction from the parameters to the loss, operation by operation, and
adds up the second-order terms.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from cdat_torch.curvature.replay import double_backward
from cdat_torch.curvature.replay.arithmetic import dot
from cdat_torch.curvature.replay.graph import Graph, rule_of
from cdat_torch.curvature.replay.registry import (
    Edge,
    InnerProducts,
    Mismatch,
    Node,
    OperationRule,
    Pushforward,
    Tangent,
    Unsupported,
    call,
    memory_of,
)
from cdat_torch.curvature.replay.verification import norm, verify
from cdat_torch.distributed.dtensor import is_dtensor

Pair = tuple[Tensor, Tensor]
_VERIFIED: set[tuple[Any, ...]] = set()
"""Signatures of graphs in which every rule agreed with double backward."""
_MOST_VERIFIED = 4096
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1
"""Relative tolerances, by precision."""


class Recording:
    """Watches the backward pass of a loss, and replays its graph along a direction.

    Parameters
    ----------
    loss : Tensor
        A scalar with its graph.
    variables : sequence of Tensor
        The parameters.
    outputs : sequence of Tensor, optional
        The outputs of the model, for the Gauss-Newton curvature.

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
        graph, handles = self._graph, []
        try:
            for node, (adjoint, gradients) in zip(graph.nodes, graph.needs, strict=True):
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
        """Return <g, u> and <u, H u>, and check that the sweep finds the same <g, u>.

        Parameters
        ----------
        grads : sequence of Tensor
            The gradient, in the order of `direction`.
        direction : mapping
            u by variable; other variables are constants.

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
        terms = [dot(a, b) for a, b in zip(grads, u, strict=True)]
        known = {memory_of(a, b): term for a, b, term in zip(grads, u, terms, strict=True)}
        replayed, curvature = self.sweep(direction, known)
        each = torch.stack([term.to(replayed) for term in terms])
        slope = each.sum()
        if not bool((replayed - slope).abs() <= self._tolerance * each.abs().sum()):
            self._check_slope(replayed, slope, grads, u)
        self._last = None
        return slope, curvature

    def _check_slope(
        self, replayed: Tensor, slope: Tensor, grads: Sequence[Tensor], u: Sequence[Tensor]
    ) -> None:
        """Raise a `Mismatch` if two slopes differ by more than rounding errors.

        If u is nearly orthogonal to g, these are relative to |g| |u| instead of the slope.
        """
        size = torch.stack([norm(a) * norm(b) for a, b in zip(grads, u, strict=True)]).sum()
        allowed = torch.maximum(self._tolerance * 0.1 * size, self._rounding().to(size))
        difference = (replayed - slope).abs()
        if bool(torch.isfinite(slope)) and not bool(difference <= allowed):
            msg = f"the replayed slope is {float(replayed):.6g}, the true one {float(slope):.6g}"
            raise Mismatch(msg)

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
            If a rule does not agree with the double backward of its operation. This is tested the
            first time that a graph is seen.
        """
        slope, curvature = self._propagate(direction, inner_products or {})
        self._verify_once(slope, curvature)
        return slope, curvature

    def _propagate(self, direction: Mapping[Tensor, Tensor], inner_products: InnerProducts) -> Pair:
        """Carry the direction from the parameters to the loss; release what has been passed."""
        graph, terms = self._graph, []
        tangents = _Tangents(graph, direction)
        last = next((node for node in reversed(graph.nodes) if node.has_large_adjoint), None)
        with torch.no_grad():
            for node in graph.nodes:
                incoming = tangents.of_inputs(node)
                if any(tangent is not None for tangent in incoming):
                    node.inner_products = inner_products
                    pushed = _apply_rule(node, incoming)
                    tangents.add(node, pushed.of_outputs())
                    if node is last and (tangent := tangents.of((node.autograd, 0))) is not None:
                        self._last = node.adjoint, tangent
                    if pushed.second_order is not None and not node.first_order:
                        terms.append(pushed.second_order.to(torch.float64).reshape(()))
                node.release()
                tangents.release_inputs(node)
        slope = tangents.of(graph.root)
        device = next(iter(direction.values())).device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        curvature = torch.stack(terms).sum() if terms else zero
        return zero if slope is None else slope.to(torch.float64), curvature

    def _verify_once(self, slope: Tensor, curvature: Tensor) -> None:
        """Verify the rules unless this graph has been seen before with a finite result."""
        if self._graph.signature not in _VERIFIED:
            verify(self._graph, self._tolerance)
            if len(_VERIFIED) < _MOST_VERIFIED and bool(torch.isfinite(slope + curvature)):
                _VERIFIED.add(self._graph.signature)

    def free(self) -> None:
        """Release what the graph has saved, as a backward pass without ``retain_graph`` does.

        The user may hold the loss, and with it the graph. So undefined adjoints are sent through
        it: no node computes anything for these, but each releases what it has saved.
        """
        root, number = self._graph.root
        handle = root.register_prehook(lambda adjoints: (None,) * len(adjoints))
        try:
            # A user's hook may not expect None; then the graph lives as long as the loss.
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
        """Return an estimate of the rounding error of the slope.

        Near a minimum the gradients of single samples cancel and the slope is rounding error only.
        The adjoint and the tangent of the last operation with many outputs do not cancel.
        """
        if self._last is None:
            return torch.zeros(())
        adjoint, tangent = self._last
        return 100 * torch.finfo(tangent.dtype).eps * norm(adjoint) * norm(tangent)

    @property
    def _tolerance(self) -> float:
        dtypes = {v.dtype for v in self._variables} | self._graph.dtypes
        return max(_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in dtypes)


class _Tangents:
    """The tangents of the edges, each until the last operation that reads it has been passed."""

    def __init__(self, graph: Graph, direction: Mapping[Tensor, Tensor]) -> None:
        self._uses = graph.uses.copy()
        self._by_edge: dict[Edge, Tangent] = {
            edge: direction[variable].detach().to(variable)
            for edge, variable in graph.leaves.items()
            if variable in direction
        }

    def of(self, edge: Edge) -> Tangent:
        """Return the tangent of an edge."""
        return self._by_edge.get(edge)

    def of_inputs(self, node: Node) -> list[Tangent]:
        """Return the tangents of the inputs of a node."""
        return [self._by_edge.get(edge) for edge in node.edges]

    def add(self, node: Node, tangents: Sequence[Tangent]) -> None:
        """Add the tangents of the outputs of a node."""
        for i, tangent in enumerate(tangents):
            self._by_edge[node.autograd, i] = tangent

    def release_inputs(self, node: Node) -> None:
        """Release those tangents of inputs that no other operation reads any more."""
        for edge in node.edges:
            if edge in self._uses:
                self._uses[edge] -= 1
                if not self._uses[edge]:
                    del self._uses[edge]
                    self._by_edge.pop(edge, None)


def _keep_adjoints(node: Node, rule: OperationRule, adjoints: tuple[Tensor | None, ...]) -> None:
    try:
        node.adjoints = call(rule.kept, node, adjoints)
    except Mismatch:  # backward must go on; the verification finds this again
        node.adjoints = adjoints


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


def _apply_rule(node: Node, tangents: Sequence[Tangent]) -> Pushforward:
    """Apply the rule of a node, or double backward where the rule does not cover its arguments."""
    pushed: Pushforward = call(rule_of(node).apply, node, *tangents)
    if pushed is NotImplemented and node.name in double_backward.CHECKED:
        pushed = call(double_backward.apply, node, *tangents)
    if pushed is NotImplemented:
        msg = f"{node.name} was called with arguments that its rule does not cover"
        raise Unsupported(msg)
    return pushed
