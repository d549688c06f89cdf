"""The comparison of each rule with the double backward of its operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdat_torch import pytorch_internals
from cdat_torch.curvature.replay import double_backward
from cdat_torch.curvature.replay.graph import DOUBLE_BACKWARD, Graph, rule_of
from cdat_torch.curvature.replay.registry import (
    Mismatch,
    Needs,
    Node,
    OperationRule,
    Pushforward,
    Tangent,
    call,
)


def verify(graph: Graph, tolerance: float) -> None:
    """Compare all rules at random tangents and adjoints; raise a `Mismatch` that names one.

    The true tangents and adjoints do not serve: they would have to be kept in memory, and some are
    nothing but rounding errors, such as the mean of what is centred.
    """
    with torch.no_grad():
        for node in graph.nodes:
            rule = rule_of(node)
            if rule is not DOUBLE_BACKWARD:
                _verify(graph, node, rule, tolerance)


def _verify(graph: Graph, node: Node, rule: OperationRule, tolerance: float) -> None:
    active = graph.active(node)
    tangents = _random_tangents(node, active)
    adjoints = tuple(
        _random(like, -1 - i) if graph.is_read((node.autograd, i)) else None
        for i, like in enumerate(pytorch_internals.output_metadata(node.autograd))
    )
    after = _after_backward(node, rule, call(rule.needs, node, active), adjoints)
    found = call(rule.apply, after, *tangents)
    if found is NotImplemented:
        return
    whole = Node(node.autograd)
    whole.adjoints = adjoints
    expected = _expected(whole, rule, tangents)
    if expected is not None:
        _compare(whole, found, expected, tolerance)


def _random(like: Any, seed: int) -> Tensor:
    """Return random numbers of a shape, dtype and device; the user's generators are not used."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(tuple(like.shape), generator=generator, dtype=like.dtype, device=like.device)


def _random_tangents(node: Node, active: Sequence[bool]) -> list[Tangent]:
    """Return random tangents, the same one for an input that is read twice."""
    probes = {
        edge: _random(pytorch_internals.output_metadata(edge[0])[edge[1]], i)
        for i, (edge, moves) in enumerate(zip(node.edges, active, strict=True))
        if moves
    }
    return [probes.get(edge) for edge in node.edges]


def _after_backward(
    node: Node, rule: OperationRule, needs: Needs, adjoints: tuple[Tensor | None, ...]
) -> Node:
    """Return the node as a backward pass with these adjoints would leave it."""
    after = Node(node.autograd)
    if needs.gradients:
        gradients = node.vjp(*adjoints)
        for position in needs.gradients:
            gradient = gradients[position]
            if gradient is not None:
                after.keep(position, gradient)
    if needs.adjoint:
        after.adjoints = call(rule.kept, node, adjoints)
    return after


def _expected(node: Node, rule: OperationRule, tangents: Sequence[Tangent]) -> Pushforward | None:
    """Return what the operation's double backward gives; None if PyTorch has none."""
    try:
        if rule.reference is None:
            return double_backward.apply(node, *tangents)
        function, inputs = rule.reference(node)
        return double_backward.apply_to(function, inputs, node, *tangents)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def _compare(node: Node, found: Pushforward, expected: Pushforward, tolerance: float) -> None:
    """Raise a `Mismatch` unless tangents and second-order terms agree; NaN agrees with all."""
    msg = f"the rule for {node.name} does not give the derivative that PyTorch computes"
    scale = 0.0
    pairs = zip(found.of_outputs(), expected.of_outputs(), node.adjoints, strict=False)
    for tangent, true_tangent, adjoint in pairs:
        if tangent is None or true_tangent is None:
            continue
        size = norm(true_tangent)
        if bool(norm(tangent - true_tangent) > tolerance * size):
            raise Mismatch(msg)
        if adjoint is not None:
            scale += float(norm(adjoint) * size)
    second, true = (
        0.0 if p.second_order is None else float(p.second_order) for p in (found, expected)
    )
    if abs(second - true) > tolerance * (abs(true) + scale):
        raise Mismatch(msg)


def norm(t: Tensor) -> Tensor:
    """Return the length of a tensor, 0-d, float64."""
    length: Tensor = torch.linalg.vector_norm(t, dtype=torch.float64)
    return length
