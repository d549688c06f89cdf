"""The spectrum of the Hessian of a JAX objective, in one call.

Each function compiles an estimator of `cdat_core` as a whole; its loops are loops of XLA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

import cdat_core
from cdat_core.extend import validation
from cdat_jax import _loops as loops
from cdat_jax._curvature import check_like, hessian_product, linearized_gradient, tangent_like
from cdat_jax._preconditioner import Preconditioner, inverse_square_root
from cdat_jax._probes import random_signs, warm_start
from cdat_jax._spaces import PyTree, TreeSpace, check_inexact


def sharpness(
    value_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    num_matvecs: int = 20,
    which: Literal["largest", "smallest"] = "largest",
    start: cdat_core.TopEigenvalues[PyTree] | PyTree | None = None,
    inverse_sqrt: Preconditioner | None = None,
    key: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """Return the largest eigenvalue of the Hessian, by the Lanczos method.

    Gradient descent at a rate above 2 over this number is unstable along its eigenvector.
    `top_eigenvalues` takes the same arguments and also returns the eigenvector and the error.

    Parameters
    ----------
    value_fn : callable
        ``value_fn(params, *args, **kwargs) -> loss``, a scalar. It is compiled once for each set
        of shapes of the arguments. A new function for each call, such as a lambda in a loop, is
        compiled each time.
    params : pytree
        The parameters, floating arrays. Complex ones count as real vectors of twice the length.
    *args, **kwargs
        Data for `value_fn`, pytrees of arrays. Pass them here, because data that `value_fn` closes
        over is compiled as a constant. A keyword that is a parameter of this function too, such as
        `key`, does not reach `value_fn`; pass it by position.
    num_matvecs : int, optional
        Number of Hessian-vector products, each about as expensive as two gradients. As many vectors
        of the size of the parameters are kept in memory.
    which : {"largest", "smallest"}, optional
        The end of the spectrum, by sign.
    start : TopEigenvalues or pytree, optional
        A start vector shaped like `params`, or the result of `top_eigenvalues` at nearby
        parameters; by default random signs.
    inverse_sqrt : callable or number, optional
        P^-1/2 for the sharpness of ``P^-1/2 H P^-1/2``: a linear symmetric map of pytrees, or a
        number for a multiple of the identity. For an Adam it is ``adam_inverse_sqrt(state)``. A
        function is compiled like `value_fn`; with ``jax.tree_util.Partial(function, arrays)`` its
        arrays are arguments, not constants.
    key : jax.Array, optional
        A JAX random key for the random vectors; by default ``jax.random.key(0)``.

    Returns
    -------
    jax.Array
        The eigenvalue, 0-d, float32 or wider.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind described.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from cdat_jax import sharpness
    >>> loss = lambda w, power: (w**power).sum()
    >>> round(float(sharpness(loss, jnp.array([1.0, 2.0]), 3.0, num_matvecs=2)), 4)
    12.0
    """
    if which not in {"largest", "smallest"}:
        msg = f"which must be 'largest' or 'smallest', got {which!r}; top_eigenvalues has both"
        raise ValueError(msg)
    found = top_eigenvalues(
        value_fn,
        params,
        *args,
        num_matvecs=num_matvecs,
        which=which,
        start=start,
        inverse_sqrt=inverse_sqrt,
        key=key,
        **kwargs,
    )
    value: jax.Array = found.values[0]
    return value


def top_eigenvalues(
    value_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    k: int = 1,
    num_matvecs: int = 20,
    which: Literal["largest", "smallest", "both"] = "largest",
    start: cdat_core.TopEigenvalues[PyTree] | PyTree | None = None,
    inverse_sqrt: Preconditioner | None = None,
    key: Any = None,
    **kwargs: Any,
) -> cdat_core.TopEigenvalues[PyTree]:
    """Return extreme eigenvalues of the Hessian with their eigenvectors and residuals.

    Parameters
    ----------
    value_fn, params, *args, **kwargs
        See `sharpness`, also for `num_matvecs`, `inverse_sqrt` and `key`.
    k : int, optional
        How many eigenvalues at each end.
    num_matvecs : int, optional
        Number of Hessian-vector products.
    which : {"largest", "smallest", "both"}, optional
        The end of the spectrum, by sign; "both" returns the k largest, then the k smallest.
    start : TopEigenvalues or pytree, optional
        A start vector, or the result of an earlier call. Such a warm start saves products as long
        as the Hessian changes little. It is the sum of the earlier vectors plus a little noise, so
        that an eigenvalue that has become the largest since is found.
    inverse_sqrt : callable or number, optional
        P^-1/2 of a preconditioner P.
    key : jax.Array, optional
        A JAX random key.

    Returns
    -------
    cdat_core.TopEigenvalues
        values of shape (k,) or (2 k,), vectors as pytrees, residual_norms, num_matvecs.

    Raises
    ------
    TypeError, ValueError
        As `sharpness`; also if `num_matvecs` is too small for `k`.

    See Also
    --------
    cdat_core.top_eigenvalues : The estimator, and when it misses an eigenvalue.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from cdat_jax import top_eigenvalues
    >>> w = jnp.array([1.0, -3.0, 2.0])
    >>> found = top_eigenvalues(lambda w: (w**3).sum(), w, num_matvecs=3, which="both")
    >>> [round(float(value), 4) for value in found.values]
    [12.0, -18.0]
    """
    params = _checked_params(params)
    validation.count("num_matvecs", num_matvecs)
    if isinstance(start, cdat_core.TopEigenvalues):
        check_like(params, start.vectors[0], name="start")
        vector = warm_start(start.vectors, random_signs(params, 1, key)[0])
    elif start is not None:
        vector = tangent_like(params, start, name="start")
    else:
        vector = random_signs(params, 1, key)[0]
    options = {"k": k, "num_matvecs": num_matvecs, "which": which, "process": loops.lanczos}
    found: cdat_core.TopEigenvalues[PyTree] = _estimate(
        cdat_core.top_eigenvalues, options, vector, value_fn, params, args, kwargs, inverse_sqrt
    )
    return found


def spectral_density(
    value_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    num_probes: int = 4,
    num_matvecs: int = 30,
    reorthogonalize: bool = True,
    inverse_sqrt: Preconditioner | None = None,
    key: Any = None,
    **kwargs: Any,
) -> cdat_core.SpectralDensity:
    """Estimate how the eigenvalues of the Hessian are distributed.

    Parameters
    ----------
    value_fn, params, *args, **kwargs
        See `sharpness`, also for `inverse_sqrt` and `key`.
    num_probes : int, optional
        Number of random sign vectors to average over.
    num_matvecs : int, optional
        Hessian-vector products for each of them.
    reorthogonalize : bool, optional
        False keeps three vectors in memory instead of `num_matvecs`; the density is then about as
        accurate.
    inverse_sqrt : callable or number, optional
        P^-1/2 of a preconditioner P.
    key : jax.Array, optional
        A JAX random key.

    Returns
    -------
    cdat_core.SpectralDensity
        nodes and weights of shape (num_probes, num_matvecs), with two estimates of the error.

    Raises
    ------
    TypeError, ValueError
        As `sharpness`.

    See Also
    --------
    cdat_core.spectral_density : The estimator.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from cdat_jax import spectral_density
    >>> curvatures = jnp.array([0.0] * 30 + [2.0] * 10)
    >>> loss = lambda w, c: (c * w**2).sum() / 2
    >>> found = spectral_density(loss, jnp.ones(40), curvatures, num_matvecs=2)
    >>> [round(float(mass), 4) for mass in found.weights.sum(axis=0)]
    [0.75, 0.25]
    """
    params = _checked_params(params)
    validation.count("num_probes", num_probes)
    validation.count("num_matvecs", num_matvecs)
    options = {
        "num_matvecs": num_matvecs,
        "reorthogonalize": bool(reorthogonalize),
        "process": loops.lanczos,
        "over": loops.over,
    }
    probes = random_signs(params, num_probes, key)
    found: cdat_core.SpectralDensity = _estimate(
        cdat_core.spectral_density, options, probes, value_fn, params, args, kwargs, inverse_sqrt
    )
    return found


def trace(
    value_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    num_probes: int = 10,
    method: Literal["hutchinson", "hutch++"] = "hutchinson",
    inverse_sqrt: Preconditioner | None = None,
    key: Any = None,
    **kwargs: Any,
) -> cdat_core.TraceEstimate:
    """Estimate the trace of the Hessian from random sign vectors.

    Parameters
    ----------
    value_fn, params, *args, **kwargs
        See `sharpness`, also for `inverse_sqrt` and `key`.
    num_probes : int, optional
        Number of random sign vectors; at least 2 for "hutch++".
    method : {"hutchinson", "hutch++"}, optional
        "hutchinson" takes one product per probe. "hutch++" takes 3/2 and uses half of the probes to
        find the subspace of the large eigenvalues: better if the spectrum decays, worse if it is
        flat.
    inverse_sqrt : callable or number, optional
        P^-1/2 of a preconditioner P.
    key : jax.Array, optional
        A JAX random key.

    Returns
    -------
    cdat_core.TraceEstimate
        estimate, standard_error, num_matvecs.

    Raises
    ------
    TypeError, ValueError
        As `sharpness`.

    See Also
    --------
    cdat_core.hutchinson_trace, cdat_core.hutchpp_trace : The estimators.

    Examples
    --------
    For a diagonal Hessian one probe of random signs is exact:

    >>> import jax.numpy as jnp
    >>> from cdat_jax import trace
    >>> w = jnp.array([1.0, 2.0])
    >>> float(trace(lambda w: (w**3).sum(), w, num_probes=1).estimate)
    18.0
    """
    params = _checked_params(params)
    if method not in {"hutchinson", "hutch++"}:
        msg = f"method must be 'hutchinson' or 'hutch++', got {method!r}"
        raise ValueError(msg)
    sketches = method == "hutch++"
    validation.count("num_probes", num_probes, minimum=2 if sketches else 1)
    estimator = cdat_core.hutchpp_trace if sketches else cdat_core.hutchinson_trace
    probes = random_signs(params, num_probes, key)
    found: cdat_core.TraceEstimate = _estimate(
        estimator, {"over": loops.over}, probes, value_fn, params, args, kwargs, inverse_sqrt
    )
    return found


def _estimate(
    estimator: Callable[..., Any],
    options: dict[str, Any],
    vectors: Any,
    value_fn: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inverse_sqrt: Preconditioner | None,
) -> Any:
    """Call an estimator of the core with the (preconditioned) Hessian at `params`."""
    try:
        hash(value_fn)
    except TypeError as error:
        msg = (
            f"value_fn must be hashable, got {type(value_fn).__name__}; "
            "use a function and pass its arrays as arguments"
        )
        raise TypeError(msg) from error
    apply_inverse_sqrt = inverse_square_root(inverse_sqrt)
    static = (estimator, tuple(options.items()), value_fn)
    return _compiled_estimate(*static, vectors, params, args, kwargs, apply_inverse_sqrt)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compiled_estimate(
    estimator: Callable[..., Any],
    options: tuple[tuple[str, Any], ...],
    value_fn: Callable[..., Any],
    vectors: Any,
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    apply_inverse_sqrt: Callable[[PyTree], PyTree] | jax.Array | None,
) -> Any:
    space = TreeSpace()
    linear = linearized_gradient(lambda p: value_fn(p, *args, **kwargs), params)
    product: Any = functools.partial(hessian_product, linear)
    if apply_inverse_sqrt is not None:
        product = cdat_core.preconditioned(product, apply_inverse_sqrt, space=space)
    return estimator(product, vectors, space=space, **dict(options))


def _checked_params(params: PyTree) -> PyTree:
    """Return `params` as arrays; raise an error if there are none or not all are inexact."""
    if not jax.tree.leaves(params):
        msg = f"params must be a pytree with at least one array, got {params!r}"
        raise ValueError(msg)
    check_inexact(params)
    return jax.tree.map(jnp.asarray, params)
