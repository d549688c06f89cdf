"""Slope and curvature of a JAX objective along a direction.

Forward over forward, a jvp of a jvp, is the cheapest exact method. Inside one ``jax.jit`` XLA
merges its forward pass with the one of the gradient; the tangents, which both jvps compute, are
merged here. A ``custom_vjp`` has no forward-mode rule, so a loss with one uses the jvp of the
gradient. The Gauss-Newton curvature is the second derivative of the loss as a function of the
model's outputs, along their directional derivative Ju.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import cdat_core
from cdat_jax._accumulation import micro_batches, over_micro_batches
from cdat_jax._common_subexpressions import without_repeats
from cdat_jax._composite import split
from cdat_jax._spaces import PyTree, TreeSpace, check_inexact, scalar_dtype

Objective = Callable[[PyTree], Any]

METHODS = ("auto", "forward", "hvp", "gauss_newton", "finite_difference")

_METHODS_OF_TORCH = ("replay", "hessian")


def check_method(curvature: str) -> None:
    """Raise a ValueError unless `curvature` is the name of a method."""
    if curvature not in METHODS:
        msg = f"curvature must be one of {METHODS}, got {curvature!r}"
        if curvature in _METHODS_OF_TORCH:
            msg += ', which exists in cdat_torch only; use "hvp" instead'
        raise ValueError(msg)


def measure(
    value_fn: Objective, params: PyTree, direction: PyTree, *, curvature: str = "auto"
) -> cdat_core.Measurement:
    """Return loss, slope and curvature of `value_fn` at `params` along `direction`.

    Pure and traceable. Call it inside ``jax.jit``; if you need the gradient too, compute it inside
    the same ``jax.jit``.

    Parameters
    ----------
    value_fn : callable
        ``params -> loss``, a scalar, or ``params -> (loss, aux)``.
    params : pytree
        The point w; floating or complex arrays.
    direction : pytree
        The update direction u, shaped like `params`; cast to the dtypes of `params`.
    curvature : str
        "forward" is forward over forward. "hvp" is the jvp of the gradient. "auto" is "forward",
        or "hvp" if the loss contains a ``custom_vjp``, which has no forward-mode rule.
        "gauss_newton" leaves out the second derivatives of the model of a `CompositeLoss`.
        "finite_difference" takes the difference of two more gradients.

    Returns
    -------
    cdat_core.Measurement
        value f(w), slope <g, u>, curvature <u, H u> or <Ju, H_loss Ju>: 0-d arrays of float32 or
        wider.

    Raises
    ------
    ValueError
        If `value_fn` does not return a scalar, the trees do not match, or `curvature` is unknown.
    TypeError
        If `params` contains integers, or if `curvature` is "gauss_newton" and `value_fn` is not a
        `CompositeLoss`, `accumulate` of one, or a ``functools.partial`` of either.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from cdat_jax import measure
    >>> measurement = measure(lambda w: (w**3).sum(), jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]))
    >>> [float(x) for x in measurement[:3]]
    [9.0, 12.0, 12.0]
    """
    check_method(curvature)
    check_inexact(params)
    dtype = scalar_dtype(params)
    direction = tangent_like(params, direction)
    if curvature == "gauss_newton":
        quadratic = _gauss_newton(value_fn, params, direction)
    else:
        quadratic = _METHODS[curvature](require_scalar(value_fn), params, direction)
    return cdat_core.Measurement(*(field.astype(dtype) for field in quadratic))


def hvp(value_fn: Objective, params: PyTree) -> cdat_core.HessianVectorProduct[PyTree]:
    """Return the Hessian-vector product of `value_fn` at `params`.

    The gradient is linearised once, so each product repeats the linear part only.

    Parameters
    ----------
    value_fn : callable
        ``params -> loss``, a scalar, or ``params -> (loss, aux)``.
    params : pytree
        The point at which the Hessian is evaluated; floating or complex arrays.

    Returns
    -------
    cdat_core.HessianVectorProduct
        ``v -> H v`` on pytrees like `params`.

    Raises
    ------
    ValueError
        If `value_fn` does not return a scalar.
    TypeError
        If `params` contains integers.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from cdat_jax import hvp
    >>> product = hvp(lambda w: (w**3).sum(), jnp.array([1.0, 2.0]))
    >>> [float(x) for x in product(jnp.array([1.0, 1.0]))]
    [6.0, 12.0]
    """
    check_inexact(params)
    linear = linearized_gradient(value_fn, params)

    def checked(v: PyTree, /) -> PyTree:
        return hessian_product(linear, tangent_like(params, v))

    return checked


def linearized_gradient(value_fn: Objective, params: PyTree) -> Callable[[PyTree], PyTree]:
    """Return the derivative of ``jax.grad(value_fn)`` at `params`; ``jax.jit`` can return it."""
    _, linear = jax.linearize(jax.grad(require_scalar(value_fn)), params)
    return linear


def hessian_product(linear: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
    """Return H v from the derivative of ``jax.grad``; `v` has the dtypes of the parameters."""
    # jax.grad returns the conjugate of the gradient.
    return jax.tree.map(jnp.conj, linear(v))


def require_scalar(value_fn: Objective, name: str = "value_fn") -> Callable[[PyTree], jax.Array]:
    """Return `value_fn` without its auxiliary outputs; it raises a ValueError if not a scalar.

    A pair is ``(loss, aux)``, as in ``jax.value_and_grad(..., has_aux=True)``.
    """

    def checked(params: PyTree) -> jax.Array:
        value = value_fn(params)
        if isinstance(value, tuple) and len(value) == 2:
            value, _ = value
        if isinstance(value, tuple | list | dict):
            msg = f"{name} must return a scalar or (scalar, aux), got {type(value).__name__}"
            raise ValueError(msg)
        if jnp.shape(value) != ():
            msg = f"{name} must return a scalar, got shape {jnp.shape(value)}; reduce it first"
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


QuadraticModel = tuple[jax.Array, jax.Array, jax.Array]
"""Value, slope and curvature along the direction."""


def _forward_over_forward(value_fn: Objective, params: PyTree, direction: PyTree) -> QuadraticModel:
    def second_order(p: PyTree, u: PyTree) -> QuadraticModel:
        def along(p: PyTree) -> tuple[jax.Array, jax.Array]:
            return jax.jvp(value_fn, (p,), (u,))

        (value, slope), (_, curvature) = jax.jvp(along, (p,), (u,))
        return value, slope, curvature

    # Both jvps compute the same tangents.
    quadratic: QuadraticModel = without_repeats(second_order)(params, direction)
    return quadratic


def _forward_over_reverse(value_fn: Objective, params: PyTree, direction: PyTree) -> QuadraticModel:
    # For complex parameters jax.grad returns the conjugate of the gradient, so the derivative along
    # u is the real part of the product without conjugation, and likewise for <u, H u>.
    (value, grad), (_, product) = jax.jvp(jax.value_and_grad(value_fn), (params,), (direction,))
    conjugate = jax.tree.map(jnp.conj, direction)
    space = TreeSpace()
    return value, space.vdot(conjugate, grad), space.vdot(conjugate, product)


def _finite_difference(value_fn: Objective, params: PyTree, direction: PyTree) -> QuadraticModel:
    space = TreeSpace()
    value, grad = jax.value_and_grad(value_fn)(params)
    product = cdat_core.finite_difference_hvp(jax.grad(value_fn), params, space=space)
    conjugate = jax.tree.map(jnp.conj, direction)
    return value, space.vdot(conjugate, grad), space.vdot(conjugate, product(direction))


def _auto(value_fn: Objective, params: PyTree, direction: PyTree) -> QuadraticModel:
    reverse = needs_reverse(value_fn, params, direction)
    method = _forward_over_reverse if reverse else _forward_over_forward
    return method(value_fn, params, direction)


def _gauss_newton(value_fn: Objective, params: PyTree, direction: PyTree) -> QuadraticModel:
    accumulated = micro_batches(value_fn)
    if accumulated:
        on_one, stacked = accumulated
        quadratics = over_micro_batches(
            lambda batch: _gauss_newton(functools.partial(on_one, **batch), params, direction),
            stacked,
        )
        value, slope, curvature = (jnp.mean(numbers) for numbers in quadratics)
        return value, slope, curvature
    model_fn, loss_fn = split(value_fn)
    loss_fn = require_scalar(loss_fn, "loss_fn")

    def model(p: PyTree) -> tuple[PyTree, PyTree]:
        outputs = model_fn(p)
        # Integers, booleans and keys are constants; None takes their place in the tree.
        z = jax.tree.map(lambda leaf: leaf if _is_inexact(leaf) else None, outputs)
        if not jax.tree.leaves(z):
            msg = (
                "model_fn must return at least one floating or complex array, "
                f"got {jax.tree.map(jnp.result_type, outputs)!r}"
            )
            raise ValueError(msg)
        return z, outputs

    def loss_with_constants_of(outputs: PyTree) -> Objective:
        def loss(z: PyTree) -> jax.Array:
            complete = jax.tree.map(
                lambda leaf, constant: constant if leaf is None else leaf,
                z,
                outputs,
                is_leaf=lambda leaf: leaf is None,
            )
            return loss_fn(complete)

        return loss

    def forward(p: PyTree, u: PyTree) -> QuadraticModel:
        z, Ju, outputs = jax.jvp(model, (p,), (u,), has_aux=True)
        return _forward_over_forward(loss_with_constants_of(outputs), z, Ju)

    def reverse(p: PyTree, u: PyTree) -> QuadraticModel:
        z, transposed, outputs = jax.vjp(model, p, has_aux=True)
        # v -> J'v is linear; its transpose is u -> Ju.
        _, twice_transposed = jax.vjp(transposed, jax.tree.map(jnp.zeros_like, z))
        (Ju,) = twice_transposed((u,))
        objective = jax.value_and_grad(loss_with_constants_of(outputs))
        (value, grad), (_, product) = jax.jvp(objective, (z,), (Ju,))
        # Inner products of parameters, because under shard_map the outputs belong to one shard.
        (grad,), (product,) = transposed(grad), transposed(product)
        conjugate, space = jax.tree.map(jnp.conj, u), TreeSpace()
        return value, space.vdot(conjugate, grad), space.vdot(conjugate, product)

    backward = needs_reverse(lambda p: loss_fn(model_fn(p)), params, direction)
    return (reverse if backward else forward)(params, direction)


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def needs_reverse(value_fn: Objective, params: PyTree, direction: PyTree) -> bool:
    """Whether a ``custom_vjp`` between `params` and the value rules out forward mode."""

    def along(p: PyTree, u: PyTree) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(value_fn, (p,), (u,))

    # Look at a trace: some uses of a custom_vjp fail only when they are compiled.
    return _contains_primitive("custom_lin", jax.make_jaxpr(along)(params, direction))


def _contains_primitive(primitive: str, traced: Any) -> bool:
    """Whether `traced`, a jaxpr (closed or not), or one nested in it applies the primitive."""
    equations = getattr(getattr(traced, "jaxpr", traced), "eqns", ())
    return any(
        equation.primitive.name == primitive
        or any(
            _contains_primitive(primitive, leaf)
            for leaf in jax.tree.leaves(list(equation.params.values()))
        )
        for equation in equations
    )


_METHODS: dict[str, Callable[[Objective, PyTree, PyTree], QuadraticModel]] = {
    "auto": _auto,
    "forward": _forward_over_forward,
    "hvp": _forward_over_reverse,
    "finite_difference": _finite_difference,
}
