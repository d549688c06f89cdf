"""Curvature along a direction, from any Hessian-vector product."""

from __future__ import annotations

from collections.abc import Callable

from cdat_core import _validation
from cdat_core._arrays import namespace, safe_reciprocal, sqrt_nonnegative
from cdat_core._types import HessianVectorProduct, InnerProductSpace, Measurement, Scalar, V


def directional_curvature(
    hvp: HessianVectorProduct[V], direction: V, *, space: InnerProductSpace[V]
) -> Scalar:
    """Return <u, H u> with one Hessian-vector product.

    Parameters
    ----------
    hvp : HessianVectorProduct
        The operator ``v -> H v``.
    direction : V
        The update direction u; it need not be normalised.
    space : InnerProductSpace
        The inner product of the vectors.

    Returns
    -------
    Scalar
        The directional curvature, in units of loss per squared learning rate.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> H = np.array([[2.0, 1.0], [1.0, 3.0]])
    >>> u = np.array([1.0, -1.0])
    >>> float(directional_curvature(lambda v: H @ v, u, space=ArraySpace()))
    3.0
    """
    return space.vdot(direction, hvp(direction))


def measure(
    value: Scalar,
    grad: V,
    hvp: HessianVectorProduct[V],
    direction: V,
    *,
    space: InnerProductSpace[V],
) -> Measurement:
    """Return the quadratic model of the loss along `direction`.

    Parameters
    ----------
    value : Scalar
        The loss at the current parameters.
    grad : V
        Its gradient there.
    hvp : HessianVectorProduct
        The product with its Hessian there: same loss, same batch.
    direction : V
        The update direction u.
    space : InnerProductSpace
        The inner product of the vectors.

    Returns
    -------
    Measurement
        value, slope <g, u> and curvature <u, H u>.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> w = np.array([1.0, 2.0])  # the loss is sum(w**3)
    >>> model = measure(
    ...     np.sum(w**3), 3 * w**2, lambda v: 6 * w * v, np.array([0.0, -1.0]), space=ArraySpace()
    ... )
    >>> [float(x) for x in model[:3]]
    [9.0, -12.0, 12.0]
    """
    return Measurement(
        value=value,
        slope=space.vdot(grad, direction),
        curvature=directional_curvature(hvp, direction, space=space),
    )


def finite_difference_hvp(
    grad_fn: Callable[[V], V],
    params: V,
    *,
    step: float | None = None,
    space: InnerProductSpace[V],
) -> HessianVectorProduct[V]:
    """Return a Hessian-vector product made of two gradients: a central difference.

    ``H v`` is approximated by ``(g(w + h v) - g(w - h v)) / (2 h)``, where h is chosen for each v
    so that the parameters move by the length ``step * max(1, |w|)``. The error is of second order
    in that length plus the rounding of the gradients divided by it. With kinks (ReLU) the
    difference sees the kinks; the Hessian does not.

    Parameters
    ----------
    grad_fn : callable
        ``params -> gradient``; called twice for each product.
    params : V
        The point w at which the Hessian is taken.
    step : float, optional
        Relative length of the displacement. By default the cube root of the machine epsilon of the
        dtype of ``space.vdot``, which balances the two errors.
    space : InnerProductSpace
        The inner product of the vectors.

    Returns
    -------
    HessianVectorProduct
        A callable; the product with the zero vector is the zero vector.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> w = np.array([1.0, 2.0])
    >>> hvp = finite_difference_hvp(lambda w: 3 * w**2, w, space=ArraySpace())
    >>> hvp(np.array([1.0, 1.0])).round(8).tolist()
    [6.0, 12.0]

    Notes
    -----
    Squared lengths must stay in the range of the scalars: in float32, ``|w|`` below 1e19 and the
    length of v between 1e-19 and 1e19. A shorter or longer v gives the zero vector.
    """
    size = displacement(params, step=step, space=space)

    def hvp(v: V, /) -> V:
        h = size(v)
        forward = grad_fn(space.add_scale(params, h, v))
        backward = grad_fn(space.add_scale(params, -h, v))
        return space.scale(0.5 * safe_reciprocal(h), space.add_scale(forward, -1.0, backward))

    return hvp


def displacement(
    params: V, *, step: float | None = None, space: InnerProductSpace[V]
) -> Callable[[V], Scalar]:
    """Return the step h of a finite difference, as a function of the direction.

    `finite_difference_hvp` evaluates the gradient at ``w + h v`` and ``w - h v``. An adapter that
    moves its parameters itself, in place for instance, needs h alone.

    Parameters
    ----------
    params : V
        The point w.
    step : float, optional
        Relative length of the displacement, as in `finite_difference_hvp`.
    space : InnerProductSpace
        The inner product of the vectors.

    Returns
    -------
    callable
        ``v -> h`` with ``|h v| = step * max(1, |w|)``; h is 0 for the zero vector.

    Raises
    ------
    ValueError
        If `step` is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> from cdat_core.extend import displacement
    >>> h = displacement(np.array([3.0, 4.0]), step=0.01, space=ArraySpace())
    >>> float(h(np.array([0.0, 2.0])))
    0.025
    """
    step = _validation.optional(_validation.positive, "step", step)
    params_norm = sqrt_nonnegative(space.vdot(params, params))
    xp = namespace(params_norm)
    relative = float(xp.finfo(params_norm.dtype).eps) ** (1 / 3) if step is None else step
    length = relative * xp.where(params_norm > 1, params_norm, xp.ones_like(params_norm))
    return lambda v: length * safe_reciprocal(sqrt_nonnegative(space.vdot(v, v)))


def preconditioned(
    hvp: HessianVectorProduct[V],
    inverse_sqrt: Callable[[V], V] | Scalar,
    *,
    space: InnerProductSpace[V],
) -> HessianVectorProduct[V]:
    """Return ``v -> P^-1/2 H P^-1/2 v``, the Hessian that a preconditioned method sees.

    Its largest eigenvalue is the sharpness that limits the rate of the update ``u = -P^-1 g``. It
    has the eigenvalues of ``P^-1 H``, and unlike ``P^-1 H`` it is symmetric, as the estimators
    require.

    Parameters
    ----------
    hvp : HessianVectorProduct
        The operator ``v -> H v``, symmetric.
    inverse_sqrt : callable or Scalar
        ``v -> P^-1/2 v``, symmetric and linear, or a number, for a multiple of the identity. For
        Adam, P is the diagonal matrix ``sqrt(v_hat) + eps`` with the bias-corrected second moment,
        so `inverse_sqrt` divides each entry by ``sqrt(sqrt(v_hat) + eps)``.
    space : InnerProductSpace
        The inner product of the vectors; used only if `inverse_sqrt` is a number.

    Returns
    -------
    HessianVectorProduct
        A callable, at the cost of one product with H.

    Examples
    --------
    >>> import numpy as np
    >>> from cdat_core import ArraySpace
    >>> hessian, second_moment = np.array([100.0, 1.0]), np.array([1e4, 16.0])
    >>> product = preconditioned(
    ...     lambda v: hessian * v, lambda v: v / np.sqrt(np.sqrt(second_moment)), space=ArraySpace()
    ... )
    >>> product(np.array([1.0, 1.0])).tolist()
    [1.0, 0.25]
    """

    def apply(v: V) -> V:
        if callable(inverse_sqrt):
            return inverse_sqrt(v)
        return space.scale(inverse_sqrt, v)

    def product(v: V, /) -> V:
        return apply(hvp(apply(v)))

    return product
