"""Evaluating the user's loss again, at other parameters, without a trace.

Trial values of a line search and finite differences call the loss several times a step. Each
further call must see the same dropout masks and must not move the running statistics of
normalisation layers or the random state that the next step starts from.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook

from cdat_torch.distributed.dtensor import locals_of
from cdat_torch.distributed.fsdp import release
from cdat_torch.interrupts import held
from cdat_torch.kernels import eager

RandomState = tuple[Tensor, dict[int, Tensor]]


def random_state(params: Sequence[Tensor]) -> RandomState:
    """Return the random state of the CPU and of the CUDA devices that hold `params`."""
    cuda = sorted({p.device.index for p in params if p.device.type == "cuda"})
    return torch.get_rng_state(), {index: torch.cuda.get_rng_state(index) for index in cuda}


def _set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    for index, cuda_state in state[1].items():
        torch.cuda.set_rng_state(cuda_state, index)


class Trace:
    """What an evaluation of the loss changes beside its result, kept as it was before.

    That is the random state, the ``.grad`` of the parameters, and the buffers of the modules that
    are called while `recorded`.

    Parameters
    ----------
    params : sequence of Tensor
        Their devices say which random states matter.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.start = random_state(params)
        self._grads = [(p, p.grad) for p in params if p.is_leaf]
        self._modules: dict[Module, dict[str, Tensor | None]] = {}
        self._buffers: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def recorded(self, *, buffers: bool = True) -> Iterator[None]:
        """Take note of buffers before modules are called; ``.grad`` is None in the block only."""
        handle = None
        if buffers:
            _expect_hooks_of_compiled_modules()
            handle = register_module_forward_pre_hook(self._keep_buffers)
        try:
            for p, _ in self._grads:
                p.grad = None
            yield
        finally:
            if handle is not None:
                handle.remove()
            self._put_back_gradients()

    def undo(self) -> None:
        """Put everything back, bit for bit."""
        for module, buffers in self._modules.items():
            module._buffers.update(buffers)  # a module may have put other tensors in their place
        with torch.no_grad():
            for buffer, saved in reversed(self._buffers):  # of a shared one the first copy counts
                buffer.copy_(saved)
        self._put_back_gradients()
        _set_random_state(self.start)

    def _keep_buffers(self, module: Module, args: Any) -> None:
        del args
        if module._buffers and module not in self._modules:
            self._modules[module] = dict(module._buffers)
            for buffer in module._buffers.values():
                if buffer is not None:
                    self._buffers.append((buffer, buffer.detach().clone()))

    def _put_back_gradients(self) -> None:
        for p, grad in self._grads:
            p.grad = grad


@contextmanager
def undone_on_error(params: Sequence[Tensor]) -> Iterator[Trace]:
    """Undo what the trace has taken note of if the block raises; interrupts wait as in `held`."""
    with held():
        trace = Trace(params)
        try:
            yield trace
        except BaseException:
            trace.undo()
            raise


@contextmanager
def without_trace(params: Sequence[Tensor], start: RandomState) -> Iterator[None]:
    """Run a forward pass from the random state `start`; then restore what it changed.

    Random state, the buffers of the modules that are called, and the ``.grad`` of `params` are
    afterwards as before, bit for bit, also after an error; meanwhile ``.grad`` is None and
    interrupts wait as in `held`. Modules
    under ``torch.compile`` run uncompiled: compiled ones do not say which buffers they write.

    Parameters
    ----------
    params : sequence of Tensor
        Their devices say which random states matter.
    start : RandomState
        The random state that the first evaluation of this step started from.
    """
    with held():
        trace = Trace(params)
        try:
            with trace.recorded(), eager():
                _set_random_state(start)
                yield
        finally:
            trace.undo()


def _expect_hooks_of_compiled_modules() -> None:
    """Keep torch.compile'd modules from warning that they call the hook once more: it may be."""
    message = "Using `torch.compile.module.` when there are global hooks"
    known = (f[1] for f in warnings.filters if f[0] == "ignore")
    if "torch._dynamo" in sys.modules and not any(
        isinstance(pattern, re.Pattern) and pattern.pattern == message for pattern in known
    ):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)


@contextmanager
def moved(params: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Give `params` other values; afterwards they are restored bit for bit, also after an error."""
    with put_back(params, [p.detach().clone() for p in params]):
        assign(params, values)
        yield


@contextmanager
def put_back(params: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Copy `values` into `params` at the end of the block, also after an error."""
    try:
        yield
    finally:
        assign(params, values)


def assign(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy `values` into `params` in place."""
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    _changed(params)


def displace(
    params: Sequence[Tensor], here: Sequence[Tensor], factor: Tensor, direction: Sequence[Tensor]
) -> None:
    """Set `params` to ``here + factor * direction`` in place."""
    with torch.no_grad():
        parts = (locals_of(tensors) for tensors in (params, here, direction))
        for p, w, u in zip(*parts, strict=True):
            torch.mul(u, factor.to(u.device), out=p).add_(w)  # addcmul would round the factor
    _changed(params)


def _changed(params: Sequence[Tensor]) -> None:
    """Drop what is derived from the parameters."""
    release(params)  # modules may hold gathered copies, autocast some in low precision
    torch.clear_autocast_cache()
