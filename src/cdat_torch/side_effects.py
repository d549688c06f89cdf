"""Evaluating the user's loss again, at other parameters, without side effects.

Line searches and finite differences call the loss several times a step. Each further call must use
the same dropout masks, and must change neither the running statistics of normalisation layers nor
the random state that the next step starts from.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook

from cdat_torch import pytorch_internals
from cdat_torch.distributed.dtensor import locals_of
from cdat_torch.distributed.fsdp import reshard
from cdat_torch.interrupts import defer_interrupts
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


class SideEffects:
    """What an evaluation of the loss changes besides its result, recorded so it can be restored.

    That is the random state, the ``.grad`` of the parameters, and the buffers of the modules that
    are called inside `record`.

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
    def record(self, *, buffers: bool = True) -> Iterator[None]:
        """Record buffers before modules are called; inside the block ``.grad`` is None."""
        with _before_each_module(self._keep_buffers) if buffers else nullcontext():
            try:
                for p, _ in self._grads:
                    p.grad = None
                yield
            finally:
                self._restore_gradients()

    def restore(self) -> None:
        """Restore everything bit for bit."""
        for module, buffers in self._modules.items():
            pytorch_internals.buffers_of(module).update(
                buffers
            )  # the module may have replaced tensors
        with torch.no_grad():
            for buffer, saved in reversed(self._buffers):  # a shared buffer: the first copy wins
                buffer.copy_(saved)
        self._restore_gradients()
        _set_random_state(self.start)

    def _keep_buffers(self, module: Module, args: Any) -> None:
        del args
        buffers = pytorch_internals.buffers_of(module)
        if buffers and module not in self._modules:
            self._modules[module] = dict(buffers)
            for buffer in buffers.values():
                if buffer is not None:
                    self._buffers.append((buffer, buffer.detach().clone()))

    def _restore_gradients(self) -> None:
        for p, grad in self._grads:
            p.grad = grad


@contextmanager
def restore_on_error(params: Sequence[Tensor]) -> Iterator[SideEffects]:
    """Restore what was recorded if the block raises; interrupts are deferred."""
    with defer_interrupts():
        effects = SideEffects(params)
        try:
            yield effects
        except BaseException:
            effects.restore()
            raise


@contextmanager
def without_side_effects(params: Sequence[Tensor], start: RandomState) -> Iterator[None]:
    """Run a forward pass from the random state `start`; then restore what it changed.

    Random state, the buffers of the modules that are called, and the ``.grad`` of `params` are
    restored bit for bit, also after an error. Inside the block ``.grad`` is None and interrupts are
    deferred. Modules under ``torch.compile`` run uncompiled: compiled ones do not say which buffers
    they write.

    Parameters
    ----------
    params : sequence of Tensor
        Their devices say which random states matter.
    start : RandomState
        The random state from which the first evaluation of this step started.
    """
    with defer_interrupts():
        effects = SideEffects(params)
        try:
            with effects.record(), eager():
                _set_random_state(start)
                yield
        finally:
            effects.restore()


@contextmanager
def _before_each_module(hook: Callable[[Module, Any], None]) -> Iterator[None]:
    """Call `hook` before the forward pass of every module."""
    handle = register_module_forward_pre_hook(hook)
    try:
        # Modules under torch.compile warn that they call the hook once more, which is harmless.
        with _ignore_warnings("Using `torch.compile.module.` when there are global hooks"):
            yield
    finally:
        handle.remove()


@contextmanager
def _ignore_warnings(message: str) -> Iterator[None]:
    """Ignore UserWarnings that start with `message`, a regular expression.

    ``warnings.catch_warnings`` would also make Python forget which warnings it has shown, so those
    of the user's loss would appear in every step instead of once.
    """
    entry = ("ignore", re.compile(message, re.IGNORECASE), UserWarning, None, 0)
    filters: Any = warnings.filters
    filters.insert(0, entry)
    try:
        yield
    finally:
        if entry in filters:  # unless the loss has reset them
            filters.remove(entry)


@contextmanager
def temporary_values(params: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Give `params` other values; restore them bit for bit afterwards, also after an error."""
    with restore_values(params, [p.detach().clone() for p in params]):
        assign(params, values)
        yield


@contextmanager
def restore_values(params: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
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
    _drop_copies(params)


def displace(
    params: Sequence[Tensor], here: Sequence[Tensor], factor: Tensor, direction: Sequence[Tensor]
) -> None:
    """Set `params` to ``here + factor * direction`` in place."""
    with torch.no_grad():
        parts = (locals_of(tensors) for tensors in (params, here, direction))
        for p, w, u in zip(*parts, strict=True):
            torch.mul(u, factor.to(u.device), out=p).add_(w)  # addcmul would round the factor
    _drop_copies(params)


def _drop_copies(params: Sequence[Tensor]) -> None:
    """Drop copies of the parameters: unsharded ones, and those of autocast in low precision."""
    reshard(params)
    torch.clear_autocast_cache()
