"""The operation rules, and how to write one.

An operation y = op(x_1, x_2, ...) of the forward pass leaves one autograd node in the graph. Its
rule gets the node and the tangents x_i' of the inputs. It returns the tangents y' of the outputs
and the second-order term <lambda, D^2 op[x', x']>, where lambda is the adjoint of y that backward
has computed. `node.saved(name)` reads what the forward pass has saved, `node.adjoint` is lambda.

To add an operation:

1. Read the node's name and what it saves: ``y.grad_fn.name()`` and ``dir(y.grad_fn)``.
2. Write one function in the module for its kind (the package's docstring lists them). A decorator
   registers it: `linear` (also for piecewise-linear functions, such as relu), `elementwise`,
   `loss_of_difference`, `loss_of_prediction`, or `nonlinear` for everything else. For the norm
   y = |x|, y' = <x, x'> / y and the second-order term is lambda (|x'|^2 - y'^2) / y:

       @nonlinear("LinalgVectorNormBackward0")
       def vector_norm(node: Node, dx: Tensor) -> Pushforward:
           if node.saved("ord") != 2 or node.saved("dim"):
               return NotImplemented
           x, y = node.saved("self"), node.saved("result")
           dy = dot(x, dx) / y
           return Pushforward(dy, node.adjoint * (dot(dx, dx) - dy**2) / y)

3. Add a case to one of ``tests/torch/replay/*_cases.py``:
   ``case("LinalgVectorNorm", torch.linalg.vector_norm, (3, 4))``. It is compared with differences
   of gradients for several layouts; every rule needs a case.
4. If `double_backward.CHECKED` has the operation, the general rule there has covered it so far.
   Remove the name, and move its case out of ``double_backward_cases.py``. If your rule returns
   NotImplemented for some arguments, keep the name: the general rule takes those, and their cases
   say ``falls_back=True``.

In use each rule is compared with the double backward of its operation the first time that a graph
is seen, and the slope is compared with <g, u> in every step (see `verification`, `recording`).
Where a rule does not cover some arguments it returns NotImplemented.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdat_torch import pytorch_internals
from cdat_torch.curvature.replay.arithmetic import dot

Tangent = Tensor | None
"""The derivative of a tensor along the direction; None is zero."""

Edge = tuple[Any, int]
"""An autograd node and the number of one of its outputs: a tensor of the forward pass."""
LEAF = "torch::autograd::AccumulateGrad"
"""The name of the nodes of leaves."""
InnerProducts = dict[tuple[int, int, int], Tensor]
"""Known inner products of a gradient and a tangent, by `memory_of` the two."""


class Unsupported(RuntimeError):  # noqa: N818
    """The graph cannot be replayed: no rule covers one of its operations."""


class Mismatch(Unsupported):
    """A rule does not fit the operation in the graph."""


class Node:
    """An autograd node, with what backward has computed there.

    Attributes
    ----------
    adjoints : tuple of Tensor or None
        The derivatives of the loss with respect to the outputs, or what the rule keeps of them;
        empty if the rule needs none.
    gradients : dict
        The derivatives with respect to the inputs that the rule needs, by position.
    inner_products : dict
        Inner products that are already known.
    edges : sequence of Edge
        The inputs.
    first_order : bool
        Whether the operation counts as linear, as the operations of the model do for the
        Gauss-Newton curvature. Then the second-order term is not used, and nothing of the backward
        pass is kept.
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
        """Return whether an input is a leaf, whose gradient the user may change in place."""
        return self.edges[position][0].name() == LEAF  # type: ignore[no-any-return]

    @property
    def adjoint(self) -> Tensor:
        """The adjoint of the first output."""
        adjoint = self.adjoints[0] if self.adjoints else None
        return self.zeros() if adjoint is None else adjoint

    @property
    def has_large_adjoint(self) -> bool:
        """Whether the adjoint of the first output was kept and has more than one element."""
        return bool(self.adjoints) and self.adjoint.numel() > 1

    def gradient(self, position: int) -> Tensor | None:
        """Return the derivative with respect to an input; None if it was changed in place since."""
        gradient = self.gradients.get(position)
        if gradient is None or pytorch_internals.version(gradient) != self._versions[position]:
            return None
        return gradient

    def required_gradient(self, position: int) -> Tensor:
        """Return the derivative with respect to an input; `Unsupported` if it was changed."""
        gradient = self.gradient(position)
        if gradient is None:
            msg = f"a derivative that {self.name} computed was changed in place"
            raise Unsupported(msg)
        return gradient

    def keep(self, position: int, gradient: Tensor) -> None:
        """Keep the derivative with respect to an input; vectors are copied, as they are small."""
        gradient = gradient.detach()
        gradient = gradient.clone() if gradient.dim() < 2 else gradient
        self.gradients[position] = gradient
        self._versions[position] = pytorch_internals.version(gradient)

    def inner_product(self, gradient: Tensor, tangent: Tensor) -> Tensor:
        """Return <gradient, tangent>; for a weight that is read once it is part of the slope."""
        known = self.inner_products.get(memory_of(gradient, tangent))
        return dot(gradient, tangent) if known is None else known

    def metadata(self, output: int = 0) -> Any:
        """Return shape, dtype and device of an output."""
        return pytorch_internals.output_metadata(self._node)[output]

    def shape(self, output: int = 0) -> torch.Size:
        """Return the shape of an output."""
        return torch.Size(self.metadata(output).shape)

    def zeros(self, output: int = 0) -> Tensor:
        """Return zeros like an output."""
        like = self.metadata(output)
        return torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)

    def saved(self, name: str) -> Any:
        """Return what the forward pass has saved under a name."""
        return pytorch_internals.saved(self._node, name)

    def vjp(self, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the vector-Jacobian product J' v with adjoints v of the outputs, as backward does.

        There is one for each input, None where it needs no gradient.
        """
        call = self._node if callable(self._node) else self._node.apply
        found = call(*adjoints)
        return found if isinstance(found, tuple) else (found,)

    def release(self) -> None:
        """Release what backward has computed."""
        self.adjoints, self.gradients = (), {}


class Pushforward(NamedTuple):
    """What a rule returns.

    Attributes
    ----------
    tangents : Tensor, None, or a sequence of them
        y' for each output; a single one belongs to the first output.
    second_order : Tensor or None
        <lambda, D^2 op[x', x']>, a 0-d tensor; None is zero.
    """

    tangents: Tangent | Sequence[Tangent]
    second_order: Tensor | None = None

    def of_outputs(self) -> list[Tangent]:
        """Return the tangents of all outputs."""
        found = self.tangents
        return [found] if isinstance(found, Tensor) else list(found or ())


class Needs(NamedTuple):
    """What a rule needs of the backward pass; all of it stays in memory until the sweep.

    Attributes
    ----------
    adjoint : bool
        Whether it reads `Node.adjoint`.
    gradients : tuple of int
        The positions of those inputs whose derivative it reads.
    """

    adjoint: bool = False
    gradients: tuple[int, ...] = ()


Active = Sequence[bool]
"""For each input whether it depends on a parameter."""
Apply = Callable[..., Any]
"""``(node, *tangents) -> Pushforward``, or NotImplemented."""
Reference = Callable[[Node], tuple[Callable[..., Tensor], Sequence[Tensor]]]
FindNeeds = Callable[[Node, Active], Needs]
ReduceAdjoint = Callable[[Node, Tensor], Tensor]


def needs_nothing(node: Node, active: Active) -> Needs:
    """Return that nothing is needed, as for linear operations."""
    return Needs()


def needs_adjoint(node: Node, active: Active) -> Needs:
    """Return that the adjoint is needed."""
    return Needs(adjoint=True)


@dataclass(frozen=True)
class OperationRule:
    """The second-order rule for one operation, and what it needs of the backward pass.

    Attributes
    ----------
    apply : callable
        ``apply(node, *tangents) -> Pushforward``; NotImplemented where it does not cover the
        arguments that the operation was called with.
    needs : callable
        ``needs(node, active) -> Needs``.
    reference : callable, optional
        ``reference(node) -> (function, inputs)``, the operation composed of others. The rule is
        compared with its double backward where that of the node itself is missing or wrong.
    reduce_adjoint : callable, optional
        ``reduce_adjoint(node, adjoint)``, what is kept instead of the first output's adjoint.
    """

    apply: Apply
    needs: FindNeeds = needs_nothing
    reference: Reference | None = None
    reduce_adjoint: ReduceAdjoint | None = None

    def kept(self, node: Node, adjoints: tuple[Tangent, ...]) -> tuple[Tangent, ...]:
        """Return what is kept of the adjoints of the outputs."""
        if self.reduce_adjoint is None or adjoints[0] is None:
            return tuple(adjoints)
        return (self.reduce_adjoint(node, adjoints[0]), *adjoints[1:])


def call(part: Callable[..., Any], node: Node, *arguments: Any) -> Any:
    """Call a part of the rule for a node; any error becomes a `Mismatch`.

    What nodes have saved is no stable interface of PyTorch, and a rule that no longer fits must
    not end the user's step.
    """
    try:
        return part(node, *arguments)
    except (torch.OutOfMemoryError, Unsupported):
        raise
    except Exception as error:
        msg = f"the rule for {node.name} raised {error!r}"
        raise Mismatch(msg) from error


OPERATION_RULES: dict[str, OperationRule] = {}
"""All rules, by the name of the autograd node."""


def nonlinear(
    *names: str,
    adjoint: bool = True,
    gradients: tuple[int, ...] = (),
    if_active: tuple[int, ...] = (),
    needs: FindNeeds | None = None,
    reference: Reference | None = None,
    reduce_adjoint: ReduceAdjoint | None = None,
) -> Callable[[Apply], Apply]:
    """Register ``(node, *tangents) -> Pushforward`` for the autograd nodes of these names.

    Parameters
    ----------
    *names : str
        As ``grad_fn.name()`` returns them.
    adjoint : bool
        Whether the rule reads `Node.adjoint`.
    gradients : tuple of int
        The positions of the inputs whose derivative the rule reads.
    if_active : tuple of int
        The operation is linear unless all of these inputs depend on a parameter; where it is
        linear, the rule needs nothing.
    needs : callable, optional
        Used instead of the three above if they cannot express what the rule needs.
    reference, reduce_adjoint : callable, optional
        As in `OperationRule`.
    """

    def usual_needs(node: Node, active: Active) -> Needs:
        return Needs(adjoint, gradients) if all(active[i] for i in if_active) else Needs()

    def register(apply: Apply) -> Apply:
        for name in names:
            OPERATION_RULES[name] = OperationRule(
                apply, needs or usual_needs, reference, reduce_adjoint
            )
        return apply

    return register


def linear(*names: str) -> Callable[[Apply], Apply]:
    """Register ``(node, *tangents) -> tangents of the outputs``, for (piecewise) linear nodes."""

    def register(push: Apply) -> Apply:
        def apply(node: Node, *tangents: Tangent) -> Any:
            found = push(node, *tangents)
            return found if found is NotImplemented else Pushforward(found)

        for name in names:
            OPERATION_RULES[name] = OperationRule(apply)
        return push

    return register


def memory_of(gradient: Tensor, tangent: Tensor) -> tuple[int, int, int]:
    """Return a key for a pair of tensors; views that hold all elements have the key of the base."""
    return gradient.data_ptr(), tangent.data_ptr(), gradient.numel()
