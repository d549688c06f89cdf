"""The spectrum of a model's Hessian, in one call.

The estimators are those of `cdat_core`. This module adds Hessian-vector products by double backward
on one graph of the loss, random vectors like the parameters, preconditioners read from an
optimizer, and a progress bar. A call has no side effects: random state and buffers are restored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

import cdat_core
from cdat_core.extend import validation
from cdat_torch.base.groups import check_params
from cdat_torch.curvature.autograd import LossFn
from cdat_torch.curvature.measure import hvp
from cdat_torch.distributed.fsdp import reshard
from cdat_torch.kernels import refuse_once_differentiable
from cdat_torch.side_effects import random_state, without_side_effects
from cdat_torch.spaces import TensorListSpace
from cdat_torch.spectrum.preconditioner import Preconditioner, Vector, inverse_square_root
from cdat_torch.spectrum.probes import random_signs, warm_start
from cdat_torch.spectrum.progress import Progress, reporter


def sharpness(
    loss_fn: LossFn,
    params: Iterable[Tensor],
    *,
    num_matvecs: int = 20,
    which: Literal["largest", "smallest"] = "largest",
    start: cdat_core.TopEigenvalues[Vector] | Vector | None = None,
    inverse_sqrt: Preconditioner | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> Tensor:
    """Return the largest eigenvalue of the Hessian, by the Lanczos method.

    Gradient descent at a rate above 2 over this number is unstable along its eigenvector.
    `top_eigenvalues` takes the same arguments and also returns the eigenvector and the error.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn() -> loss``, a scalar tensor with its graph. It is called once, and all products
        use the dropout masks and batch statistics of that call. If the model has BatchNorm, do not
        call this between another loss and its backward pass: restoring the running statistics
        invalidates that graph.
    params : iterable of Tensor
        The parameters, for instance ``model.parameters()``. Those that do not require grad or on
        which the loss does not depend are constants: rows of zeros in the Hessian.
    num_matvecs : int, optional
        Number of Hessian-vector products, each about two gradients. As many vectors of the size of
        the parameters are kept in memory.
    which : {"largest", "smallest"}, optional
        The end of the spectrum, by sign.
    start : TopEigenvalues or sequence of Tensor, optional
        A start vector like `params`, or the result of `top_eigenvalues` at nearby parameters; by
        default random signs.
    inverse_sqrt : callable, number or torch.optim.Optimizer, optional
        P^-1/2 for the sharpness of ``P^-1/2 H P^-1/2``: a linear symmetric map of lists of tensors
        or a multiple of the identity. For an Adam or AdamW (wrapped or not) that has taken steps, P
        is ``sqrt(v_hat) + eps``; parameters it has not moved count as constants.
    seed : int, optional
        Seed of the random vectors, which do not use the global generators.
    progress : bool or callable, optional
        True for a bar by tqdm or rich, or a callable ``progress(done, total)``.

    Returns
    -------
    Tensor
        The eigenvalue, 0-d, float64 on the device of the first parameter (float32 on MPS).

    Raises
    ------
    TypeError, ValueError
        If an argument is not of the kind described.
    ImportError
        If `progress` is True and neither tqdm nor rich is installed.
    RuntimeError, NotImplementedError
        If an operation of the loss has no second derivative.

    Examples
    --------
    >>> import torch
    >>> from cdat_torch import sharpness
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> round(float(sharpness(lambda: (w**3).sum(), [w], num_matvecs=2)), 4)
    12.0
    """
    if which not in {"largest", "smallest"}:
        msg = f"which must be 'largest' or 'smallest', got {which!r}; top_eigenvalues gives both"
        raise ValueError(msg)
    found = top_eigenvalues(
        loss_fn,
        params,
        num_matvecs=num_matvecs,
        which=which,
        start=start,
        inverse_sqrt=inverse_sqrt,
        seed=seed,
        progress=progress,
    )
    value: Tensor = found.values[0]
    return value


def top_eigenvalues(
    loss_fn: LossFn,
    params: Iterable[Tensor],
    *,
    k: int = 1,
    num_matvecs: int = 20,
    which: Literal["largest", "smallest", "both"] = "largest",
    start: cdat_core.TopEigenvalues[Vector] | Vector | None = None,
    inverse_sqrt: Preconditioner | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> cdat_core.TopEigenvalues[Vector]:
    """Return extreme eigenvalues of the Hessian with their eigenvectors and residuals.

    Parameters
    ----------
    loss_fn, params, num_matvecs, inverse_sqrt, seed, progress
        See `sharpness`.
    k : int, optional
        How many eigenvalues at each end.
    which : {"largest", "smallest", "both"}, optional
        The end of the spectrum, by sign; with "both" the k largest are followed by the k smallest.
    start : TopEigenvalues or sequence of Tensor, optional
        A start vector, or the result of an earlier call as a warm start, which saves products while
        the Hessian changes little. The start is then the sum of its vectors plus a little noise,
        which finds eigenvalues that are new at the top.

    Returns
    -------
    cdat_core.TopEigenvalues
        values of shape (k,) or (2 k,), vectors as lists of tensors, residual_norms, num_matvecs.

    Raises
    ------
    TypeError, ValueError, ImportError, RuntimeError
        As `sharpness`; also if `num_matvecs` is too small for `k`.

    See Also
    --------
    cdat_core.top_eigenvalues : The estimator, and when it misses an eigenvalue.

    Examples
    --------
    >>> import torch
    >>> from cdat_torch import top_eigenvalues
    >>> w = torch.tensor([1.0, -3.0, 2.0], requires_grad=True)
    >>> found = top_eigenvalues(lambda: (w**3).sum(), [w], num_matvecs=3, which="both")
    >>> [round(float(value), 4) for value in found.values]
    [12.0, -18.0]
    """
    params = _listed(params)
    validation.count("num_matvecs", num_matvecs)
    if isinstance(start, cdat_core.TopEigenvalues):
        _check_like(params, start.vectors[0])
        vector = warm_start(start.vectors, random_signs(params, 1, seed)[0])
    elif start is not None:
        _check_like(params, start)
        vector = start
    else:
        vector = random_signs(params, 1, seed)[0]
    with _operator(loss_fn, params, inverse_sqrt, progress, total=num_matvecs) as product:
        return cdat_core.top_eigenvalues(
            product, vector, k=k, num_matvecs=num_matvecs, space=TensorListSpace(), which=which
        )


def spectral_density(
    loss_fn: LossFn,
    params: Iterable[Tensor],
    *,
    num_probes: int = 4,
    num_matvecs: int = 30,
    reorthogonalize: bool = True,
    inverse_sqrt: Preconditioner | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> cdat_core.SpectralDensity:
    """Estimate how the eigenvalues of the Hessian are distributed.

    Parameters
    ----------
    loss_fn, params, inverse_sqrt, seed, progress
        See `sharpness`. Constants contribute zero eigenvalues; leave them out of `params` if these
        should not count.
    num_probes : int, optional
        Random sign vectors to average over.
    num_matvecs : int, optional
        Hessian-vector products for each of them.
    reorthogonalize : bool, optional
        False keeps three vectors in memory instead of `num_matvecs`; the density stays about as
        good.

    Returns
    -------
    cdat_core.SpectralDensity
        nodes and weights of shape (num_probes, num_matvecs), with two estimates of the error.

    Raises
    ------
    TypeError, ValueError, ImportError, RuntimeError
        As `sharpness`.

    See Also
    --------
    cdat_core.spectral_density : The estimator.

    Examples
    --------
    >>> import torch
    >>> from cdat_torch import spectral_density
    >>> w = torch.ones(40, requires_grad=True)
    >>> curvatures = torch.tensor([0.0] * 30 + [2.0] * 10)
    >>> found = spectral_density(lambda: (curvatures * w**2).sum() / 2, [w], num_matvecs=2)
    >>> [round(float(mass), 4) for mass in found.weights.sum(dim=0)]
    [0.75, 0.25]
    """
    params = _listed(params)
    total = validation.count("num_probes", num_probes) * validation.count(
        "num_matvecs", num_matvecs
    )
    with _operator(loss_fn, params, inverse_sqrt, progress, total=total) as product:
        return cdat_core.spectral_density(
            product,
            random_signs(params, num_probes, seed),
            num_matvecs=num_matvecs,
            space=TensorListSpace(),
            reorthogonalize=reorthogonalize,
        )


def trace(
    loss_fn: LossFn,
    params: Iterable[Tensor],
    *,
    num_probes: int = 10,
    method: Literal["hutchinson", "hutch++"] = "hutchinson",
    inverse_sqrt: Preconditioner | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> cdat_core.TraceEstimate:
    """Estimate the trace of the Hessian from random sign vectors.

    Parameters
    ----------
    loss_fn, params, inverse_sqrt, seed, progress
        See `sharpness`.
    num_probes : int, optional
        Random sign vectors; at least 2 for "hutch++".
    method : {"hutchinson", "hutch++"}, optional
        "hutchinson" takes one product per probe. "hutch++" spends half of the probes on the
        subspace of the large eigenvalues and takes 3/2 products per probe: better if the spectrum
        decays, worse if it is flat.

    Returns
    -------
    cdat_core.TraceEstimate
        estimate, standard_error, num_matvecs.

    Raises
    ------
    TypeError, ValueError, ImportError, RuntimeError
        As `sharpness`.

    See Also
    --------
    cdat_core.hutchinson_trace, cdat_core.hutchpp_trace : The estimators.

    Examples
    --------
    For a diagonal Hessian one probe of random signs is exact:

    >>> import torch
    >>> from cdat_torch import trace
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> float(trace(lambda: (w**3).sum(), [w], num_probes=1).estimate)
    18.0
    """
    params = _listed(params)
    if method not in {"hutchinson", "hutch++"}:
        msg = f"method must be 'hutchinson' or 'hutch++', got {method!r}"
        raise ValueError(msg)
    sketches = method == "hutch++"
    validation.count("num_probes", num_probes, minimum=2 if sketches else 1)
    probes, space = random_signs(params, num_probes, seed), TensorListSpace()
    total = num_probes + num_probes // 2 if sketches else num_probes
    with _operator(loss_fn, params, inverse_sqrt, progress, total=total) as product:
        if sketches:
            return cdat_core.hutchpp_trace(product, probes, space=space)
        return cdat_core.hutchinson_trace(product, probes, space=space)


@contextmanager
def _operator(
    loss_fn: LossFn,
    params: list[Tensor],
    inverse_sqrt: Preconditioner | None,
    progress: Progress,
    *,
    total: int,
) -> Iterator[cdat_core.HessianVectorProduct[Vector]]:
    """Yield the (preconditioned) Hessian at the current parameters, then restore what it changed.

    Buffers are restored at the end and not before: normalisation layers save them for backward.
    """
    apply = inverse_square_root(inverse_sqrt, params)
    with reporter(progress, total) as report, without_side_effects(params, random_state(params)):
        hessian = hvp(_twice_differentiable(loss_fn), params)
        if apply is not None:
            hessian = cdat_core.preconditioned(hessian, apply, space=TensorListSpace())

        def product(v: Vector, /) -> Vector:
            result = hessian(v)
            report()
            return result

        try:
            yield product
        finally:
            reshard(params)


def _twice_differentiable(loss_fn: LossFn) -> LossFn:
    """Return the loss with a check that double backward silently drops no term of it."""

    def checked() -> Tensor:
        loss = loss_fn()
        if isinstance(loss, Tensor):  # otherwise the evaluation raises
            refuse_once_differentiable(loss)
        return loss

    return checked


def _listed(params: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters as a list, checked."""
    if isinstance(params, Tensor | torch.nn.Module) or not isinstance(params, Iterable):
        msg = (
            f"params must be an iterable of tensors, got {type(params).__name__}; "
            "write model.parameters() or [w]"
        )
        raise TypeError(msg)
    params = list(params)
    for p in params:
        if not isinstance(p, Tensor):
            msg = (
                f"params must hold tensors, got {type(p).__name__}; "
                "pass model.parameters(), without names or groups"
            )
            raise TypeError(msg)
    check_params(params)
    if len(set(params)) < len(params):
        msg = "params must hold each tensor once, got one of them twice"
        raise ValueError(msg)
    return params


def _check_like(params: list[Tensor], start: Vector) -> None:
    shapes = [tuple(p.shape) for p in params]
    got = [tuple(v.shape) for v in start]
    if got != shapes:
        msg = f"start must hold tensors with the shapes of params, {shapes}, got {got}"
        raise ValueError(msg)
