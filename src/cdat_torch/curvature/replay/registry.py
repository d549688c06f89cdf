"""How an operation of the autograd graph carries a direction: the interface of a rule.

A rule belongs to one type of autograd node, that is to one operation y = op(x_1, x_2, ...). It gets
the node, whose saved tensors are those of backward, and the tangents x_i' of its inputs; it returns
the tangents y' of its outputs and the second-order term <lambda, D^2 op[x', x']>, where lambda is
the adjoint of y that backward has computed. To add an operation write one function here or in a
module beside, under the decorator of its kind, and one case in ``tests/torch/replay``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdat_torch.curvature.replay.arithmetic import dot

Tangent = Tensor | None
"""The derivative of a tensor along the direction; None is zero."""

Edge = tuple[Any, int]
"""An autograd node and the number of one of its outputs: a tensor of the forward pass."""
LEAF = "torch::autograd::AccumulateGrad"
"""The name of the nodes of leaves."""
InnerProducts = dict[tuple[int, int, int], Tensor]


class Unsupported(RuntimeError):  # noqa: N818
    """The graph holds something that no rule can carry a direction through."""


class Node:
    """An autograd node, with what backward has computed there.

    Attributes
    ----------
    adjoints : tuple of Tensor or None
        The derivatives of the loss with respect to the outputs, or what the rule keeps of them;
        empty if the rule asked for none.
    gradients : dict
        By position, those derivatives with respect to inputs that the rule asked for.
    inner_products : dict
        Inner products that are known already, by the memory of their factors.
    edges : sequence of Edge
        The inputs.
    first_order : bool
        Whether the operation counts as linear, as the model does for the Gauss-Newton curvature:
        the second-order term is not wanted, and nothing of the backward pass is kept.
    """

    __slots__ = (
        "_node", "_versions", "adjoints", "edges", "first_order", "gradients", "inner_products",
    )  # fmt: skip

    def __init__(self, node: Any) -> None:
        self._node = node
        self.edges: Sequence[Edge] = node.next_functions
        self.adjoints: tuple[Tensor | None, ...] = ()
        self.gradients: dict[int, Tensor] = {}
        self._versions: dict[int, int] = {}
        self.inner_products: InnerProducts = {}
        self.first_order = False

    @property
    def autograd(self) -> Any:
        """The node of PyTorch."""
        return self._node

    @property
    def name(self) -> str:
        """What PyTorch calls it, such as "AddmmBackward0"."""
        name: str = self._node.name()
        return name

    def reads_leaf(self, position: int) -> bool:
        """Return whether an input is a leaf: its derivative is where it may be changed."""
        return self.edges[position][0].name() == LEAF  # type: ignore[no-any-return]

    @property
    def adjoint(self) -> Tensor:
        """The adjoint of the first output."""
        adjoint = self.adjoints[0] if self.adjoints else None
        return self.zeros() if adjoint is None else adjoint

    @property
    def has_large_adjoint(self) -> bool:
        """Whether the adjoint of the first output was kept and is more than a number."""
        return bool(self.adjoints) and self.adjoint.numel() > 1

    def gradient(self, position: int) -> Tensor | None:
        """Return the derivative with respect to an input, unless it was changed in place since."""
        gradient = self.gradients.get(position)
        if gradient is None or gradient._version != self._versions[position]:
            return None
        return gradient

    def unchanged(self, position: int) -> Tensor:
        """Return the derivative with respect to an input; `Unsupported` if it was changed."""
        gradient = self.gradient(position)
        if gradient is None:
            msg = f"a derivative that {self.name} computed was changed in place"
            raise Unsupported(msg)
        return gradient

    def keep(self, position: int, gradient: Tensor) -> None:
        """Keep the derivative with respect to an input; of a vector a copy, against changes."""
        gradient = gradient.detach()
        self.gradients[position] = gradient.clone() if gradient.dim() < 2 else gradient
        self._versions[position] = self.gradients[position]._version

    def inner_product(self, gradient: Tensor, tangent: Tensor) -> Tensor:
        """Return <gradient, tangent>; for a weight that is read once it is part of the slope."""
        known = self.inner_products.get(memory(gradient, tangent))
        return dot(gradient, tangent) if known is None else known

    def metadata(self, output: int = 0) -> Any:
        """Return shape, dtype and device of an output."""
        return self._node._input_metadata[output]

    def shape(self, output: int = 0) -> torch.Size:
        """Return the shape of an output."""
        return torch.Size(self.metadata(output).shape)

    def zeros(self, output: int = 0) -> Tensor:
        """Return zeros like an output."""
        like = self.metadata(output)
        return torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)

    def saved(self, name: str) -> Any:
        """Return what the forward pass has saved; integers as they were given, -1 too."""
        value = getattr(self._node, f"_saved_{name}")
        if isinstance(value, int) and not isinstance(value, bool):
            return _signed(value)
        if isinstance(value, tuple):
            return tuple(_signed(v) if isinstance(v, int) else v for v in value)
        return value

    def vjp(self, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the product of adjoints of the outputs with the Jacobian, as backward would."""
        call = self._node if callable(self._node) else self._node.apply
        found = call(*adjoints)
        return found if isinstance(found, tuple) else (found,)

    def detached(self) -> Node:
        """Forget what backward has computed, and return the node."""
        self.adjoints, self.gradients = (), {}
        return self


class Pushed(NamedTuple):
    """What a rule returns.

    Attributes
    ----------
    tangents : Tensor, None, or a sequence of them
        Of the outputs; one that stands alone is that of the first output.
    second : Tensor or None
        The second-order term, a 0-d tensor; None is zero.
    """

    tangents: Tangent | Sequence[Tangent]
    second: Tensor | None = None

    def of_outputs(self) -> list[Tangent]:
        """Return the tangents of all outputs."""
        found = self.tangents
        return [found] if isinstance(found, Tensor) else list(found or ())


class Needs(NamedTuple):
    """What a rule needs of the backward pass.

    Attributes
    ----------
    adjoint : bool
        Whether it reads `Node.adjoint`.
    gradients : tuple of int
        The positions of those inputs whose derivative it reads.
    """

    adjoint: bool = False
    gradients: tuple[int, ...] = ()


Push = Callable[..., Any]
Forward = Callable[[Node], tuple[Callable[..., Tensor], Sequence[Tensor]]]
Active = Sequence[bool]
"""For each input whether it depends on a parameter."""


def nothing(node: Node, active: Active) -> Needs:
    """Need nothing, as linear operations do."""
    return Needs()


def the_adjoint(node: Node, active: Active) -> Needs:
    """Need the adjoint."""
    return Needs(adjoint=True)


@dataclass(frozen=True)
class Rule:
    """A rule, and what it needs of the backward pass.

    Attributes
    ----------
    push : callable
        ``push(node, *tangents) -> Pushed``; NotImplemented where it does not cover the arguments
        that the operation was called with.
    needs : callable
        ``needs(node, active) -> Needs``. All that is kept stays in memory until the sweep.
    forward : callable, optional
        ``forward(node) -> (function, inputs)``, the operation written with others. The rule is
        compared with its double backward where that of the node itself is missing or wrong.
    part : callable, optional
        ``part(node, adjoint)``, what is kept in the place of the first output's adjoint.
    """

    push: Push
    needs: Callable[[Node, Active], Needs] = nothing
    forward: Forward | None = None
    part: Callable[[Node, Tensor], Tensor] | None = None

    def kept(self, node: Node, adjoints: tuple[Tangent, ...]) -> tuple[Tangent, ...]:
        """Return what of the adjoints is kept."""
        if self.part is None or adjoints[0] is None:
            return tuple(adjoints)
        return (self.part(node, adjoints[0]), *adjoints[1:])


RULES: dict[str, Rule] = {}


def rule(
    *names: str,
    adjoint: bool = True,
    gradients: tuple[int, ...] = (),
    both: tuple[int, ...] = (),
    needs: Callable[[Node, Active], Needs] | None = None,
    forward: Forward | None = None,
    part: Callable[[Node, Tensor], Tensor] | None = None,
) -> Callable[[Push], Push]:
    """Register ``push(node, *tangents) -> Pushed`` for the autograd nodes of these names.

    It needs the adjoint and the gradients at these positions, but nothing where one of the inputs
    `both` is a constant, because it is linear then. Other needs are given as a function.
    """

    def usual(node: Node, active: Active) -> Needs:
        return Needs(adjoint, gradients) if all(active[i] for i in both) else Needs()

    def register(push: Push) -> Push:
        for name in names:
            RULES[name] = Rule(push, needs or usual, forward, part)
        return push

    return register


def linear(*names: str) -> Callable[[Push], Push]:
    """Register ``push(node, *tangents)`` of a linear operation: it returns the tangents alone."""

    def register(push: Push) -> Push:
        def without_second(node: Node, *tangents: Tangent) -> Any:
            found = push(node, *tangents)
            return found if found is NotImplemented else Pushed(found)

        for name in names:
            RULES[name] = Rule(without_second)
        return push

    return register


def memory(gradient: Tensor, tangent: Tensor) -> tuple[int, int, int]:
    """Return what tells a pair of tensors from others: views of the whole have the same."""
    return gradient.data_ptr(), tangent.data_ptr(), gradient.numel()


def _signed(value: int) -> int:
    """Autograd shows negative integers as unsigned ones."""
    return value - 2**64 if value >= 2**63 else value
