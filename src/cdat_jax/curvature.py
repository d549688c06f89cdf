"""Slope and curvature of a JAX objective along a direction.

Forward over forward, a jvp of a jvp, is the cheapest exact way: inside one ``jax.jit`` XLA merges
its primal with that of the gradient. A ``custom_vjp`` has no forward rule; there the curvature is
taken from the jvp of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import cdat_core
from cdat_jax.spaces import PyTree, TreeSpace, scalar_dtype

Objective = Callable[[PyTree], jax.Array]

METHODS = ("auto", "forward", "hvp", "finite_difference")


def check_method(curvature: str) -> None:
    """Raise a ValueError unless `curvature` names a way to compute it."""
    if curvature not in METHODS:
        msg = f"curvature must be one of {METHODS}, got {curvature!r}"
        raise ValueError(msg)


def measure(
    value_fn: Objective, params: PyTree, direction: PyTree, *, curvature: str = "auto"
) -> cdat_core.Measurement:
    """Return loss, slope and curvature of `value_fn` at `params` along `direction`.

    Pure and traceable; call it inside ``jax.jit``, together with the gradient if that is needed
    too.

    Parameters
    ----------
    value_fn : callable
        ``params -> loss``, a scalar.
    params : pytree
        The point w.
    direction : pytree
        The update direction u, shaped like `params`; cast to the dtypes of `params`.
    curvature : str
        "auto" is forward over forward, or the jvp of the gradient where a ``custom_vjp`` forbids
        the former; "forward" and "hvp" demand one of the two; "finite_difference" uses two further
        gradients.

    Returns
    -------
    cdat_core.Measurement
        value f(w), slope <g, u>, curvature <u, H u>: 0-d arrays of float32 or wider.

    Raises
    ------
    ValueError
        If `value_fn` does not return a scalar, the trees do not match, or `curvature` is unknown.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from cdat_jax import measure
    >>> measurement = measure(lambda w: (w**3).sum(), jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]))
    >>> [float(x) for x in measurement[:3]]
    [9.0, 12.0, 12.0]
    """
    check_method(curvature)
    dtype = scalar_dtype(params)
    direction = tangent_like(params, direction)
    checked = require_scalar(value_fn)
    model = _MODELS[curvature](checked, params, direction)
    return cdat_core.Measurement(*(field.astype(dtype) for field in model))


def hvp(value_fn: Objective, params: PyTree) -> cdat_core.HessianVectorProduct[PyTree]:
    """Return the Hessian-vector product of `value_fn` at `params`.

    The gradient is linearised once, so further products repeat only the linear part.

    Parameters
    ----------
    value_fn : callable
        ``params -> loss``, a scalar.
    params : pytree
        The point at which the Hessian is taken.

    Returns
    -------
    cdat_core.HessianVectorProduct
        ``v -> H v`` on pytrees like `params`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from cdat_jax import hvp
    >>> product = hvp(lambda w: (w**3).sum(), jnp.array([1.0, 2.0]))
    >>> [float(x) for x in product(jnp.array([1.0, 1.0]))]
    [6.0, 12.0]
    """
    linear = linearized_gradient(value_fn, params)

    def checked(v: PyTree, /) -> PyTree:
        return hessian_product(linear, tangent_like(params, v))

    return checked


def linearized_gradient(value_fn: Objective, params: PyTree) -> Callable[[PyTree], PyTree]:
    """Return the derivative of ``jax.grad(value_fn)`` at `params`; it can leave a ``jax.jit``."""
    _, linear = jax.linearize(jax.grad(require_scalar(value_fn)), params)
    return linear


def hessian_product(linear: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
    """Return H v, with the derivative of ``jax.grad``, at a `v` in the dtypes of the parameters."""
    # Conjugated like the gradient itself: jax.grad returns the conjugate of the gradient.
    return jax.tree.map(jnp.conj, linear(v))


def require_scalar(value_fn: Objective) -> Objective:
    """Return `value_fn` with a ValueError where it returns anything but a scalar."""

    def checked(params: PyTree) -> jax.Array:
        value = value_fn(params)
        if jnp.shape(value) != ():
            msg = f"value_fn must return a scalar, got shape {jnp.shape(value)}; reduce it first"
            raise ValueError(msg)
        return jnp.asarray(value)

    return checked


def tangent_like(params: PyTree, direction: PyTree, *, name: str = "direction") -> PyTree:
    """Return `direction` in the dtypes of `params`; a ValueError if structure or shapes differ."""
    check_like(params, direction, name=name)
    return jax.tree.map(lambda p, u: jnp.asarray(u).astype(jnp.asarray(p).dtype), params, direction)


def check_like(params: PyTree, tree: PyTree, *, name: str) -> None:
    """Raise a ValueError unless `tree` has the structure and the shapes of `params`."""
    structure: Any = jax.tree.structure(params)
    got: Any = jax.tree.structure(tree)
    if got != structure:
        msg = f"{name} must have the structure of params, {structure}, got {got}"
        raise ValueError(msg)
    for p, u in zip(jax.tree.leaves(params), jax.tree.leaves(tree), strict=True):
        if jnp.shape(p) != jnp.shape(u):
            msg = f"{name} must have the shapes of params, got {jnp.shape(u)} for {jnp.shape(p)}"
            raise ValueError(msg)


Model = tuple[jax.Array, jax.Array, jax.Array]


def _forward_over_forward(value_fn: Objective, params: PyTree, direction: PyTree) -> Model:
    def along(p: PyTree) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(value_fn, (p,), (direction,))

    (value, slope), (_, curvature) = jax.jvp(along, (params,), (direction,))
    return value, slope, curvature


def _forward_over_reverse(value_fn: Objective, params: PyTree, direction: PyTree) -> Model:
    # jax.grad of a real function of complex parameters returns the conjugate of the gradient; the
    # real part of the unconjugated product is the derivative along u, and likewise for <u, H u>.
    (value, grad), (_, product) = jax.jvp(jax.value_and_grad(value_fn), (params,), (direction,))
    conjugate = jax.tree.map(jnp.conj, direction)
    space = TreeSpace()
    return value, space.vdot(conjugate, grad), space.vdot(conjugate, product)


def _finite_difference(value_fn: Objective, params: PyTree, direction: PyTree) -> Model:
    space = TreeSpace()
    value, grad = jax.value_and_grad(value_fn)(params)
    product = cdat_core.finite_difference_hvp(jax.grad(value_fn), params, space=space)
    conjugate = jax.tree.map(jnp.conj, direction)
    return value, space.vdot(conjugate, grad), space.vdot(conjugate, product(direction))


def _auto(value_fn: Objective, params: PyTree, direction: PyTree) -> Model:
    def along(p: PyTree, u: PyTree) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(value_fn, (p,), (u,))

    # Asked of a trace, because some uses of a custom_vjp fail only when they are compiled.
    reverse = contains_primitive("custom_lin", jax.make_jaxpr(along)(params, direction))
    model = _forward_over_reverse if reverse else _forward_over_forward
    return model(value_fn, params, direction)


def contains_primitive(primitive: str, traced: Any) -> bool:
    """Whether a jaxpr, closed or not, or one inside it, applies the primitive of that name."""
    equations = getattr(getattr(traced, "jaxpr", traced), "eqns", ())
    return any(
        equation.primitive.name == primitive
        or any(
            contains_primitive(primitive, leaf)
            for leaf in jax.tree.leaves(list(equation.params.values()))
        )
        for equation in equations
    )


_MODELS: dict[str, Callable[[Objective, PyTree, PyTree], Model]] = {
    "auto": _auto,
    "forward": _forward_over_forward,
    "hvp": _forward_over_reverse,
    "finite_difference": _finite_difference,
}
