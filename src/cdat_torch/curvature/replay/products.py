"""Products: matrix products, convolutions, elementwise products and quotients.

z = B(x, w) for a bilinear B has the tangent z' = B(x, w') + B(x', w) and the second-order term
2 <lambda, B(x', w')>. That would be three products; two suffice. For any number a let

    A = B(x + a x', w'),    then    z' = A + B(x', w - a w'),

and since <lambda, B(x, w')> = <g_w, w'>, where g_w is the derivative with respect to w that
backward has computed,

    <lambda, B(x', w')> = (<lambda, A> - <g_w, w'>) / a.

This is exact for every a; a = |x| / |x'| balances the rounding errors of the two parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cdat_torch.curvature.replay.arithmetic import HALF, add_scaled, balance, dot
from cdat_torch.curvature.replay.registry import Node, Pushforward, Tangent, nonlinear

Product = Callable[[Tensor, Tensor], Tensor]
AddProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


def bilinear(
    product: Product,
    add_product: AddProduct,
    x: Callable[[], Tensor],
    w: Callable[[], Tensor],
    tangents: tuple[Tangent, Tangent],
    node: Node,
    gradient: Tensor | None,
) -> tuple[Tangent, Tensor | None]:
    """Return the tangent of ``product(x, w)`` and 2 <lambda, product(x', w')>.

    Parameters
    ----------
    product, add_product : callable
        B, and ``(z, x, w) -> z + B(x, w)``, which may write into z.
    x, w : callable
        They return the factors. A factor is read only where it is needed, because autograd saves
        it only then.
    tangents : pair of Tensor or None
        x' and w'.
    node : Node
        For lambda.
    gradient : Tensor or None
        The derivative with respect to w; if it is None, three products are formed.
    """
    dx, dw = tangents
    if dx is None:
        return (None, None) if dw is None else (product(x(), dw), None)
    if dw is None:
        return product(dx, w()), None
    point = x()
    if node.first_order:
        return add_product(product(point, dw), dx, w()), None
    if gradient is None or point.dtype in HALF:  # too coarse for a difference of products
        second_order = 2 * dot(node.adjoint, product(dx, dw))
        return add_product(product(point, dw), dx, w()), second_order
    a = balance(point, dx)
    mixed = product(add_scaled(point, a, dx), dw)
    second_order = (dot(node.adjoint, mixed) - node.inner_product(gradient, dw)) * (2 / a)
    return add_product(mixed, dx, add_scaled(w(), -a, dw)), second_order


@nonlinear("MmBackward0", gradients=(1,), if_active=(0, 1))
def mm(node: Node, dx: Tangent, dw: Tangent) -> Pushforward:
    """Z = x w."""
    return Pushforward(*_matrix_product(node, "self", "mat2", dx, dw, position=1))


@nonlinear("BmmBackward0", gradients=(1,), if_active=(0, 1))
def bmm(node: Node, dx: Tangent, dw: Tangent) -> Pushforward:
    """Z = x w for each matrix of a batch."""
    return Pushforward(*_matrix_product(node, "self", "mat2", dx, dw, position=1))


@nonlinear("AddmmBackward0", gradients=(2,), if_active=(1, 2))
def addmm(node: Node, db: Tangent, dx: Tangent, dw: Tangent) -> Pushforward:
    """Z = beta b + alpha x w."""
    return _affine(node, "mat1", "mat2", db, dx, dw)


@nonlinear("BaddbmmBackward0", gradients=(2,), if_active=(1, 2))
def baddbmm(node: Node, db: Tangent, dx: Tangent, dw: Tangent) -> Pushforward:
    """Z = beta b + alpha x w for each matrix of a batch."""
    return _affine(node, "batch1", "batch2", db, dx, dw)


def _affine(node: Node, x: str, w: str, db: Tangent, dx: Tangent, dw: Tangent) -> Pushforward:
    alpha, beta = node.saved("alpha"), node.saved("beta")
    z, second = _matrix_product(node, x, w, dx, dw, position=2, factor=alpha)
    if z is not None and alpha != 1:
        z = z.mul_(alpha)
    if db is not None:
        db = db if beta == 1 else db * beta
        z = db.expand(node.shape()) if z is None else z.add_(db)
    return Pushforward(z, second)


def _matrix_product(
    node: Node,
    x: str,
    w: str,
    dx: Tangent,
    dw: Tangent,
    *,
    position: int,
    factor: float = 1,
) -> tuple[Tangent, Tensor | None]:
    batched = len(node.shape()) == 3

    def add_product(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return z.baddbmm_(a, b) if batched else z.addmm_(a, b)

    # A factor is rare: then three products are formed.
    z, second = bilinear(
        torch.bmm if batched else torch.mm,
        add_product,
        lambda: node.saved(x),
        lambda: node.saved(w),
        (dx, dw),
        node,
        node.gradient(position) if factor == 1 else None,
    )
    return z, None if second is None else second * factor


@nonlinear("ConvolutionBackward0", gradients=(1,), if_active=(0, 1))
def convolution(node: Node, dx: Tangent, dw: Tangent, db: Tangent) -> Pushforward:
    """Z = x * w + b, also transposed, dilated and in groups."""
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    arguments: Any = [node.saved(name) for name in names]

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        return torch.convolution(x, w, None, *arguments)

    z, second = bilinear(
        convolve,
        lambda z, x, w: z.add_(convolve(x, w)),
        lambda: node.saved("input"),
        lambda: node.saved("weight"),
        (dx, dw),
        node,
        node.gradient(1),
    )
    if db is not None:
        db = db.view(-1, *[1] * (len(node.shape()) - 2))
        z = db.expand(node.shape()) if z is None else z.add_(db)
    return Pushforward(z, second)


@nonlinear("MulBackward0", if_active=(0, 1))
def mul(node: Node, da: Tangent, db: Tangent) -> Pushforward:
    """Z = a b, elementwise."""
    z = None if da is None else da * node.saved("other")
    if db is None:
        return Pushforward(z)
    z = node.saved("self") * db if z is None else torch.addcmul(z, node.saved("self"), db)
    if da is None or node.first_order:
        return Pushforward(z)
    return Pushforward(z, 2 * dot(node.adjoint, da * db))


@nonlinear("DivBackward0", if_active=(1,))
def div(node: Node, da: Tangent, db: Tangent) -> Pushforward:
    """Z = a / b, elementwise: z' = (a' - z b') / b and z'' = -2 z' b' / b."""
    b = node.saved("other")
    if db is None:
        assert da is not None
        return Pushforward(da / b)
    a = node.saved("self")
    z = ((0.0 if da is None else da) - (a / b) * db) / b
    return Pushforward(z, -2 * dot(node.adjoint, z * (db / b)))
