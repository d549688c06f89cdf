"""The part of an autograd graph through which parameters reach the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from cdat_torch.curvature.replay import double_backward
from cdat_torch.curvature.replay.registry import (
    LEAF,
    OPERATION_RULES,
    Edge,
    Needs,
    Node,
    OperationRule,
    Unsupported,
    call,
    needs_adjoint,
)
from cdat_torch.pytorch_internals import MissingInternal, unpack_hook

DOUBLE_BACKWARD = OperationRule(double_backward.apply, needs_adjoint)
"""The rule for operations without their own."""


class Graph:
    """Nodes between parameters and loss, inputs before outputs.

    Parameters
    ----------
    loss : Tensor
        A scalar with its graph.
    variables : sequence of Tensor
        The parameters, leaves of the graph.
    outputs : sequence of Tensor, optional
        For the Gauss-Newton curvature, the outputs of the model: operations up to them count as
        linear.

    Attributes
    ----------
    nodes : list of Node
        The operations that depend on a parameter.
    needs : list of Needs
        What their rules need of the backward pass.
    leaves : dict
        The parameters, by edge.
    uses : Counter
        How many operations read each edge.
    root : Edge
        The loss.
    signature : tuple
        The operations, with dimensions and dtype of their outputs; sizes do not count.

    Raises
    ------
    Unsupported
        If an operation has no rule and is not among those that double backward is checked for; if
        it is inside an activation checkpoint; if the loss depends on a parameter other than through
        the outputs; or if the installed PyTorch does not show what an operation computed.
    """

    def __init__(
        self, loss: Tensor, variables: Sequence[Tensor], outputs: Sequence[Tensor] | None = None
    ) -> None:
        self.nodes: list[Node] = []
        self.leaves: dict[Edge, Tensor] = {}
        self.uses: Counter[Edge] = Counter()
        self.root: Edge = (loss.grad_fn, loss.output_nr)
        self._collect({id(v) for v in variables})
        if outputs is not None:
            self._linear_up_to({(e.node, e.output_nr) for e in map(get_gradient_edge, outputs)})
        self.needs = [self._needs_of(node) for node in self.nodes]
        try:
            self.signature = tuple(_description(node) for node in self.nodes)
        except MissingInternal as error:
            raise Unsupported(str(error)) from error

    def _collect(self, variables: set[int]) -> None:
        """Find the nodes that depend on variables, given by id."""
        active: set[Any] = set()
        for node in _inputs_first(self.root[0]):
            name = node.name()
            if name == LEAF:
                if id(node.variable) in variables:
                    active.add(node)
                    self.leaves[node, 0] = node.variable
                continue
            reached = [edge for edge in node.next_functions if edge[0] in active]
            if reached:
                _check_supported(node, name)
                active.add(node)
                self.uses.update(reached)
                self.nodes.append(Node(node))

    def _linear_up_to(self, ends: set[Edge]) -> None:
        """Mark the operations of the model, which end in these edges, as linear."""
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

    def _needs_of(self, node: Node) -> Needs:
        if node.first_order:
            return Needs()
        needs: Needs = call(rule_of(node).needs, node, self.active(node))
        return needs

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of all results; under autocast they differ from those of the parameters."""
        return {dtype for _, _, dtype, _ in self.signature}


def rule_of(node: Node) -> OperationRule:
    """Return the rule for a node: its own, or else double backward."""
    return OPERATION_RULES.get(node.name, DOUBLE_BACKWARD)


def _check_supported(node: Any, name: str) -> None:
    if name not in OPERATION_RULES and name not in double_backward.CHECKED:
        msg = f"{name} has no rule"
        raise Unsupported(msg)
    if _is_checkpointed(node):
        msg = f"{name} is inside an activation checkpoint, which each rule would repeat"
        raise Unsupported(msg)


def _is_checkpointed(node: Any) -> bool:
    """Return whether a node is inside an activation checkpoint.

    Outside of a backward pass, the forward pass of the checkpoint would be repeated each time that
    a rule reads a saved tensor. All tensors saved inside have its hook, so one of them tells.
    """
    return getattr(unpack_hook(node), "__module__", "") == "torch.utils.checkpoint"


def _description(node: Node) -> tuple[str, int, torch.dtype, bool]:
    like = node.metadata()
    return node.name, len(like.shape), like.dtype, node.first_order


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
