"""The comparison of each rule with the double backward of its operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdat_torch.curvature.replay import fallback
from cdat_torch.curvature.replay.graph import FALLBACK, Graph, rule_of
from cdat_torch.curvature.replay.registry import Needs, Node, Pushed, Rule, Tangent, Unsupported


class Mismatch(Unsupported):
    """What was replayed is not what the graph computed."""


def verify(graph: Graph, tolerance: float) -> None:
    """Compare all rules at random tangents and adjoints; raise a `Mismatch` that names one.

    Of the true ones rounding may be all that is left, as of the mean of what is centred, and they
    would have to be in memory still.
    """
    with torch.no_grad():
        for node in graph.nodes:
            rule = rule_of(node)
            if rule is not FALLBACK:
                _verify(graph, node, rule, tolerance)


def _verify(graph: Graph, node: Node, rule: Rule, tolerance: float) -> None:
    active = graph.active(node)
    tangents = _tangents(node, active)
    adjoints = tuple(
        _random(like, -1 - i) if graph.is_read((node.autograd, i)) else None
        for i, like in enumerate(node.autograd._input_metadata)
    )
    mine = _watched(node, rule, rule.needs(node, active), adjoints)
    found = rule.push(mine, *tangents)
    if found is NotImplemented:
        return
    whole = Node(node.autograd)
    whole.adjoints = adjoints
    expected = _reference(whole, rule, tangents)
    if expected is not None:
        _compare(whole, found, expected, tolerance)


def _random(like: Any, seed: int) -> Tensor:
    """Return random numbers of a shape, dtype and device; those of the user are not touched."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(tuple(like.shape), generator=generator, dtype=like.dtype, device=like.device)


def _tangents(node: Node, active: Sequence[bool]) -> list[Tangent]:
    """Return random tangents, one for an input that is read twice."""
    probes = {
        edge: _random(edge[0]._input_metadata[edge[1]], i)
        for i, (edge, moves) in enumerate(zip(node.edges, active, strict=True))
        if moves
    }
    return [probes.get(edge) for edge in node.edges]


def _watched(node: Node, rule: Rule, needs: Needs, adjoints: tuple[Tensor | None, ...]) -> Node:
    """Return the node as a backward pass with these adjoints would leave it."""
    watched = Node(node.autograd)
    if needs.gradients:
        gradients = node.vjp(*adjoints)
        for position in needs.gradients:
            gradient = gradients[position]
            if gradient is not None:
                watched.keep(position, gradient)
    if needs.adjoint:
        watched.adjoints = rule.kept(node, adjoints)
    return watched


def _reference(node: Node, rule: Rule, moved: Sequence[Tangent]) -> Pushed | None:
    """Return what the operation's double backward gives; None if PyTorch has none."""
    try:
        if rule.forward is None:
            return fallback.push(node, *moved)
        function, inputs = rule.forward(node)
        return fallback.push_through(function, inputs, node, *moved)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):
        return None


def _compare(node: Node, found: Pushed, expected: Pushed, tolerance: float) -> None:
    """Raise a `Mismatch` unless tangents and second-order terms agree; NaN agrees with all."""
    msg = f"the rule for {node.name} does not give the derivative that PyTorch computes"
    reach = 0.0
    pairs = zip(found.of_outputs(), expected.of_outputs(), node.adjoints, strict=False)
    for mine, other, adjoint in pairs:
        if mine is None or other is None:
            continue
        size = norm(other)
        if bool(norm(mine - other) > tolerance * size):
            raise Mismatch(msg)
        if adjoint is not None:
            reach += float(norm(adjoint) * size)
    second, true = (0.0 if p.second is None else float(p.second) for p in (found, expected))
    if abs(second - true) > tolerance * (abs(true) + reach):
        raise Mismatch(msg)


def norm(t: Tensor) -> Tensor:
    """Return the length of a tensor, 0-d, float64."""
    length: Tensor = torch.linalg.vector_norm(t, dtype=torch.float64)
    return length
