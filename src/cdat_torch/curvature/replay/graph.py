"""The part of an autograd graph through which parameters reach the loss."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from cdat_torch.curvature.replay import fallback
from cdat_torch.curvature.replay.registry import (
    LEAF,
    RULES,
    Edge,
    Needs,
    Node,
    Rule,
    Unsupported,
    the_adjoint,
)

FALLBACK = Rule(fallback.push, the_adjoint)


class Graph:
    """Nodes between parameters and loss, inputs before outputs.

    Parameters
    ----------
    loss : Tensor
        A scalar with its graph.
    variables : sequence of Tensor
        The parameters, leaves of the graph.
    outputs : sequence of Tensor, optional
        Tensors up to which operations count as linear: those of the model, for the Gauss-Newton
        curvature.

    Attributes
    ----------
    nodes : list of Node
        The operations that depend on a parameter.
    leaves : dict
        By edge, the parameter that it is.
    uses : Counter
        How many operations read each edge.
    root : Edge
        The loss.

    Raises
    ------
    Unsupported
        If an operation between them has neither a rule nor a place among the checked ones, if what
        it has saved comes out of an activation checkpoint, or if the loss depends on a parameter
        beside the outputs.
    """

    def __init__(
        self, loss: Tensor, variables: Sequence[Tensor], outputs: Sequence[Tensor] | None = None
    ) -> None:
        self.nodes: list[Node] = []
        self.leaves: dict[Edge, Tensor] = {}
        self.uses: Counter[Edge] = Counter()
        self.root: Edge = (loss.grad_fn, loss.output_nr)
        known = {id(v) for v in variables}
        active: set[Any] = set()
        for found in _inputs_first(loss.grad_fn):
            name = found.name()
            if name == LEAF:
                if id(found.variable) in known:
                    active.add(found)
                    self.leaves[found, 0] = found.variable
                continue
            reached = [edge for edge in found.next_functions if edge[0] in active]
            if reached:
                if name not in RULES and name not in fallback.CHECKED:
                    msg = f"{name} has no rule"
                    raise Unsupported(msg)
                if _is_checkpointed(found):
                    msg = f"{name} is inside an activation checkpoint, which each rule would repeat"
                    raise Unsupported(msg)
                active.add(found)
                self.uses.update(reached)
                self.nodes.append(Node(found))
        if outputs is not None:
            self._linear_up_to({(e.node, e.output_nr) for e in map(get_gradient_edge, outputs)})

    def _linear_up_to(self, ends: set[Edge]) -> None:
        if not ends:
            msg = "the outputs of the model do not depend on parameters"
            raise Unsupported(msg)
        behind: set[Any] = set()
        for node in self.nodes:
            read = [edge for edge in node.edges if edge in self.uses]
            after = [edge in ends or edge[0] in behind for edge in read]
            node.first_order = not any(after)
            if any(after):
                behind.add(node.autograd)
                if not all(after):
                    msg = "the loss depends on parameters beside the outputs of the model"
                    raise Unsupported(msg)

    def is_read(self, edge: Edge) -> bool:
        """Return whether the loss depends on a tensor."""
        return edge in self.uses or edge == self.root

    def active(self, node: Node) -> list[bool]:
        """Return for each input of a node whether it depends on a parameter."""
        return [edge in self.uses for edge in node.edges]

    def needs(self, node: Node) -> Needs:
        """Return what a node's rule needs of the backward pass."""
        return Needs() if node.first_order else rule_of(node).needs(node, self.active(node))

    @functools.cached_property
    def signature(self) -> tuple[Any, ...]:
        """What tells graphs of different operations apart; sizes do not count."""
        described = [(node.name, node.metadata(), node.first_order) for node in self.nodes]
        return tuple((name, len(like.shape), like.dtype, f) for name, like, f in described)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Those of all results; autocast computes in others than the parameters have."""
        return {dtype for _, _, dtype, _ in self.signature}


def rule_of(node: Node) -> Rule:
    """Return the rule for a node, the fallback for operations that have none."""
    return RULES.get(node.name, FALLBACK)


def _is_checkpointed(node: Any) -> bool:
    """Return whether each look at what a node has saved repeats a part of the forward pass.

    Only within one backward pass an activation checkpoint is repeated once for all. All that is
    saved inside has its hook, so one tensor of each node tells.
    """
    kind: Any = type(node)
    name = _first_saved(kind)
    found = None if name is None else getattr(node, name)
    hook = getattr(found, "unpack_hook", None)
    return getattr(hook, "__module__", "") == "torch.utils.checkpoint"


@functools.cache
def _first_saved(kind: type) -> str | None:
    return next((name for name in dir(kind) if name.startswith("_raw_saved_")), None)


def _inputs_first(root: Any) -> list[Any]:
    """Return the nodes below `root`, each after all that it reads; without recursion."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, int]] = [(root, 0)]
    while stack:
        node, position = stack.pop()
        if position == 0:
            if node in seen:
                continue
            seen.add(node)
        following = node.next_functions
        while position < len(following) and (
            following[position][0] is None or following[position][0] in seen
        ):
            position += 1
        if position < len(following):
            stack.append((node, position + 1))
            stack.append((following[position][0], 0))
        else:
            order.append(node)
    return order
