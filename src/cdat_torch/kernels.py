"""What a forward pass needs so that PyTorch can differentiate it a second time, or forwards.

Some operations have fast kernels without a second derivative, or with a wrong one, beside slower
ones that have it. `further_differentiable` selects the slower ones for a while.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from cdat_torch.distributed import tensor_parallel

logger = logging.getLogger("cdat_torch")

# Neither cuDNN nor oneDNN differentiate recurrent layers far enough.
_LIBRARIES: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)


@functools.cache
def say_once(level: int, message: str) -> None:
    """Log `message` the first time only."""
    logger.log(level, message)


@contextmanager
def further_differentiable() -> Iterator[None]:
    """Use kernels that have second and forward-mode derivatives, and no compiled modules.

    The backward passes belong inside as well: activation checkpointing repeats the forward there.
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
            library.enabled = before  # Ctrl-C may have come while one was off


@contextmanager
def eager() -> Iterator[None]:
    """Run torch.compile'd modules uncompiled; what is compiled already stays so for later."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import is slow
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def anything_compiled() -> bool:
    """Return whether this process has used torch.compile; True also if that cannot be told.

    Hooks on all modules must then be kept away from forward passes that may run compiled: each
    hook would compile them anew.
    """
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    backends = {} if eval_frame is None else getattr(eval_frame, "cached_backends", {0: "unknown"})
    return any(backend is not None for backend in backends.values())


def _other_kernels() -> AbstractContextManager[None]:
    """Replace single operations by equivalents with the derivatives that are missing."""
    return _rebound([*_REPLACEMENTS, *tensor_parallel.replacements()])


@contextmanager
def replayable() -> Iterator[None]:
    """Let recurrent layers and compiled modules leave a graph of simple operations."""
    with eager(), _rebound(_RECURRENT):
        yield


@contextmanager
def _rebound(replacements: list[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """Bind the names anew under which the layers of PyTorch call operations.

    A mode of torch functions would not reach the forward passes that activation checkpointing
    repeats in the backward.
    """
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, function in replacements:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # The double backward of the fused kernel takes the norm of v for a constant.
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


_RECURRENT: list[tuple[Any, str, Callable[..., Any]]] = [
    (torch._VF, name, _without_library(getattr(torch._VF, name)))
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
]
_REPLACEMENTS: list[tuple[Any, str, Callable[..., Any]]] = [
    (torch, "_weight_norm", _weight_norm),
    (sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", _weight_norm),
    *_RECURRENT,
]


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

    PyTorch raises for a ``once_differentiable`` backward only if the gradient that flows into it
    has a graph itself; behind a linear loss it has none, and the term would just be missing.
    """
    for node in nodes(loss):
        if isinstance(node, BackwardCFunction):
            function: Any = getattr(node, "_forward_cls", None)
            reason = tensor_parallel.reason_against(function, node)
            if reason is not None:
                raise NotImplementedError(reason)
            backward = getattr(function, "backward", None)
            while backward is not None:
                if getattr(backward, "__code__", None) is _ONCE:
                    msg = f"{function.__name__} is marked once_differentiable"
                    raise NotImplementedError(msg)
                backward = getattr(backward, "__wrapped__", None)


# The decorator wraps every backward in the same code; other decorators set __wrapped__ too.
_ONCE = once_differentiable(lambda ctx: ctx).__code__


def is_reentrant_checkpoint(loss: Tensor) -> bool:
    """Return whether the graph holds an activation checkpoint that only ``backward()`` can pass."""
    return any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes(loss))
