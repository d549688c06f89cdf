"""Which method measures the curvature, and what follows where it does not work.

`Methods` is the list to try, in order. Only once a graph exists can we tell whether it can be
replayed. If not, the loss is evaluated once more for the next method, which then stays in use. With
several processes the loss is evaluated only once, with kernels that suit double backward too: the
forward pass may be collective, and perhaps only one rank has a graph that cannot be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from cdat_torch.curvature import replay
from cdat_torch.curvature.autograd import Differentiated, Kernels, LossFn, differentiate
from cdat_torch.curvature.gauss_newton import CompositeLoss, first_line, tensors_of
from cdat_torch.curvature.methods import (
    BY_NAME,
    REPLAYED_GAUSS_NEWTON,
    WITH_PRODUCT,
    Method,
    NoCurvature,
)
from cdat_torch.curvature.replay import Mismatch, Unsupported
from cdat_torch.distributed.replicas import several_processes
from cdat_torch.kernels import further_differentiable, logger
from cdat_torch.messages import warn
from cdat_torch.pytorch_internals import has_compiled
from cdat_torch.side_effects import SideEffects

T = TypeVar("T")

CURVATURES = ("auto", "replay", "hvp", "gauss_newton", "finite_difference")
"""What `curvature` may be."""

_DESCRIPTIONS = {"hvp": "double backward", "gauss_newton": "a forward-mode pass"}


@dataclass(frozen=True)
class Methods:
    """The methods that are left to measure a curvature, in the order in which they are tried.

    Attributes
    ----------
    names : tuple of str
        Keys of `BY_NAME`: the method in use, then those to fall back on. Empty if no curvature is
        measured.
    """

    names: tuple[str, ...] = ()

    @classmethod
    def named(cls, curvature: str) -> Methods:
        """Return the methods that ``curvature=...`` stands for.

        Raises
        ------
        ValueError
            If there is no such method.
        RuntimeError
            For "replay" under a PyTorch that it does not work with.
        """
        if curvature == "hessian":
            warn('curvature="hessian" is deprecated: it is called "hvp" now', DeprecationWarning)
            curvature = "hvp"
        if curvature not in CURVATURES:
            hint = '; "forward" is a method of cdat_jax' if curvature == "forward" else ""
            msg = f"curvature must be one of {CURVATURES}, got {curvature!r}{hint}"
            raise ValueError(msg)
        if curvature == "auto":
            return cls(
                (*(("replay",) if replay.is_supported() else ()), "hvp", "finite_difference")
            )
        if curvature == "gauss_newton":
            return cls((*((REPLAYED_GAUSS_NEWTON,) if replay.is_supported() else ()), curvature))
        if curvature == "replay":
            replay.require_supported()
        return cls((curvature,))

    @classmethod
    def with_product(cls, curvature: str) -> Methods:
        """Return the methods that ``curvature=...`` stands for and that can multiply with H.

        Raises
        ------
        ValueError
            If there is none.
        """
        methods = cls(
            tuple(n for n in cls.named(curvature).names if isinstance(BY_NAME[n], WITH_PRODUCT))
        )
        if not methods:
            msg = (
                f'curvature="{curvature}" does not give the sharpness that tuner_or_search needs; '
                'pass curvature="hvp" or "finite_difference"'
            )
            raise ValueError(msg)
        return methods

    def __bool__(self) -> bool:
        """Return whether a curvature is measured at all."""
        return bool(self.names)

    def __contains__(self, name: str) -> bool:
        """Return whether the method of this name is left."""
        return name in self.names

    @property
    def current(self) -> Method:
        """The method in use."""
        return BY_NAME[self.names[0]] if self.names else _NO_CURVATURE

    def without(self, name: str) -> Methods:
        """Return the other methods."""
        return Methods(tuple(other for other in self.names if other != name))

    def fall_back(self, error: Exception) -> Methods:
        """Return the methods after the one in use, with a warning or a log entry.

        Parameters
        ----------
        error : Exception
            Why the method in use does not work. It is raised if no other method is left.
        """
        if len(self.names) <= 1:
            raise error
        rest = Methods(self.names[1:])
        reason, following = first_line(error), rest.names[0]
        following = _DESCRIPTIONS.get(following, following)
        current = _DESCRIPTIONS.get(self.names[0], self.names[0])
        if isinstance(error, Mismatch):
            warn(
                f"the autograd graph was not replayed exactly ({reason}); the curvature comes from "
                f"{following} instead. Please report this with the operation"
            )
        elif isinstance(error, Unsupported):
            logger.info(
                "the autograd graph cannot be replayed (%s); the curvature comes from %s instead, "
                "which costs more",
                reason,
                following,
            )
        elif rest.names[0] != "finite_difference":
            warn(f"{current} failed ({reason}); the curvature comes from {following} instead")
        else:
            warn(
                f"the loss has an operation without a second derivative ({reason}); the curvature "
                "comes from central finite differences of gradients instead: two further "
                "evaluations of the loss for each product with the Hessian"
            )
        return rest

    def first_that_works(self, compute: Callable[[Method], T]) -> tuple[T, Methods]:
        """Return the result of `compute` for the first method that works, and the methods left."""
        methods = self
        while True:
            try:
                return compute(methods.current), methods
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                methods = methods.fall_back(error)


_NO_CURVATURE = NoCurvature()


def evaluate_with_fallback(
    loss_fn: LossFn,
    evaluate: Callable[[Kernels], Tensor],
    params: Sequence[Tensor],
    methods: Methods,
    effects: SideEffects,
) -> tuple[Tensor, Differentiated, Methods]:
    """Evaluate and differentiate a loss so that the first method that works can measure it.

    Parameters
    ----------
    loss_fn : callable
        The loss.
    evaluate : callable
        Evaluates `loss_fn` with a choice of kernels.
    params : sequence of Tensor
        The parameters.
    methods : Methods
        The methods to try.
    effects : SideEffects
        It records what the evaluation changes.

    Returns
    -------
    Tensor, Differentiated, Methods
        The loss, its first derivative, and the methods left.
    """
    several = several_processes()
    if several:
        methods = methods.without(REPLAYED_GAUSS_NEWTON)  # plain gauss_newton runs its own pass
    while True:
        kernels = methods.current.kernels
        if several and methods.current.record:
            kernels = further_differentiable
        # Compiled modules do not say which buffers they change, and hooks would recompile them.
        buffers = kernels is not nullcontext or not has_compiled()
        with effects.record(buffers=buffers), _recorded_outputs(loss_fn, methods) as outputs:
            loss = evaluate(kernels)
        try:
            return loss, _differentiate(loss, params, methods, outputs), methods
        except Unsupported as error:
            methods = methods.fall_back(error)
        if several:
            return loss, *differentiate_with_fallback(loss, params, methods)
        effects.restore()


def differentiate_with_fallback(
    loss: Tensor, params: Sequence[Tensor], methods: Methods, *, sync: bool = True
) -> tuple[Differentiated, Methods]:
    """Return the first derivative of `loss` for the first method that works, and the methods left.

    See `cdat_torch.curvature.autograd.differentiate` for `sync`.
    """
    while True:
        try:
            return _differentiate(loss, params, methods, sync=sync), methods
        except Unsupported as error:
            methods = methods.fall_back(error)


def _differentiate(
    loss: Tensor,
    params: Sequence[Tensor],
    methods: Methods,
    outputs: list[Any] | None = None,
    *,
    sync: bool = True,
) -> Differentiated:
    with torch.enable_grad():
        return differentiate(
            loss,
            params,
            create_graph=methods.current.create_graph,
            record=methods.current.record,
            outputs=None if outputs is None else tensors_of(outputs),
            sync=sync,
        )


@contextmanager
def _recorded_outputs(loss_fn: LossFn, methods: Methods) -> Iterator[list[Any] | None]:
    """Give a list of the outputs of the model, if the method in use needs them."""
    replayed = methods.names[:1] == (REPLAYED_GAUSS_NEWTON,)
    if replayed and isinstance(loss_fn, CompositeLoss):
        with loss_fn.recording_outputs() as outputs:
            yield outputs
    else:
        yield None
