"""Choosing kernels for a forward pass that is differentiated twice, or in forward mode.

Some operations have fast kernels whose second derivative is missing or wrong, and slower ones that
have it. `further_differentiable` selects the slower ones inside its block.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from cdat_torch import pytorch_internals
from cdat_torch.distributed import tensor_parallel
from cdat_torch.pytorch_internals import Binding

logger = logging.getLogger("cdat_torch")

# Neither cuDNN nor oneDNN has the second derivative of recurrent layers.
_LIBRARIES: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)


@functools.cache
def say_once(level: int, message: str) -> None:
    """Log `message` the first time only."""
    logger.log(level, message)


@contextmanager
def further_differentiable() -> Iterator[None]:
    """Use kernels that have second and forward-mode derivatives, and no compiled modules.

    Run the backward passes inside as well: activation checkpointing repeats the forward pass there.
    """
    say_once(
        logging.INFO,
        "while a curvature is measured, scaled dot-product attention uses its math kernel and "
        "torch.compile'd modules run uncompiled: fused and compiled kernels have no second "
        "derivative. every=k measures in each k-th step only",
    )
    fast_path = torch.backends.mha.get_fastpath_enabled()
    enabled = [library.enabled for library in _LIBRARIES]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eager(), sdpa_kernel(SDPBackend.MATH), _other_kernels():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for library, before in zip(_LIBRARIES, enabled, strict=True):
            library.enabled = before  # an interrupt may have come while one was disabled


@contextmanager
def eager() -> Iterator[None]:
    """Run torch.compile'd modules uncompiled; what is compiled already is kept for later."""
    with ExitStack() as stack:
        if pytorch_internals.is_dynamo_loaded():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _other_kernels() -> AbstractContextManager[None]:
    """Replace single operations by equivalents that have the missing derivatives."""
    return _rebound([*_WEIGHT_NORM, *_RECURRENT, *tensor_parallel.replacements()])


@contextmanager
def replayable() -> Iterator[None]:
    """Let recurrent layers and compiled modules leave a graph of simple operations."""
    with eager(), _rebound(_RECURRENT):
        yield


@contextmanager
def _rebound(replacements: Sequence[tuple[Binding, Callable[..., Any]]]) -> Iterator[None]:
    """Rebind the names under which the layers of PyTorch call operations.

    A ``TorchFunctionMode`` would not reach the forward passes that activation checkpointing repeats
    in the backward pass.
    """
    before = [(binding, getattr(*binding)) for binding, _ in replacements]
    try:
        for binding, function in replacements:
            setattr(*binding, function)
        yield
    finally:
        for binding, function in before:
            setattr(*binding, function)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # The double backward of the fused kernel treats the norm of v as a constant.
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _without_library(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def native(*args: Any, **kwargs: Any) -> Any:
        enabled = [library.enabled for library in _LIBRARIES]
        try:
            for library in _LIBRARIES:
                library.enabled = False
            return function(*args, **kwargs)
        finally:
            for library, before in zip(_LIBRARIES, enabled, strict=True):
                library.enabled = before

    return native


_RECURRENT = [
    (binding, _without_library(getattr(*binding)))
    for binding in pytorch_internals.recurrent_bindings()
]
_WEIGHT_NORM = [(binding, _weight_norm) for binding in pytorch_internals.weight_norm_bindings()]


def nodes(tensor: Tensor) -> Iterator[Any]:
    """Yield the nodes of the graph that ends in `tensor`."""
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
        yield node


def refuse_once_differentiable(loss: Tensor) -> None:
    """Raise where double backward would silently drop a custom function's second derivative.

    PyTorch itself raises for a ``once_differentiable`` backward only if the gradient that flows
    into it has a graph. Below a linear loss it has none, and the term would just be missing.
    """
    for node in nodes(loss):
        if isinstance(node, BackwardCFunction):
            function = pytorch_internals.function_of(node)
            reason = tensor_parallel.reason_against(function, node)
            if reason is not None:
                raise NotImplementedError(reason)
            backward = getattr(function, "backward", None)
            while backward is not None:
                if getattr(backward, "__code__", None) is _ONCE:
                    msg = f"{function.__name__} is marked once_differentiable"
                    raise NotImplementedError(msg)
                backward = getattr(backward, "__wrapped__", None)


# The decorator wraps every backward in this code; other decorators set __wrapped__ too.
_ONCE = once_differentiable(lambda ctx: ctx).__code__


def is_reentrant_checkpoint(loss: Tensor) -> bool:
    """Return whether the graph holds an activation checkpoint that only ``backward()`` can pass."""
    return any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes(loss))
