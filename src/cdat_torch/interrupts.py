"""Ctrl-C during a step: delivered while the loss is evaluated or differentiated, else a bit later.

A step changes parameters, buffers and random state for a while and then restores them. An interrupt
in between would leave them half restored, and a second Ctrl-C could cut into the restoration after
the first. Interrupts are therefore deferred inside `defer_interrupts`, except inside
`deliver_interrupts`. The latter belongs around the calls that take long, to the user's loss and to
autograd, once everything that restores has been entered. When an interrupt raises there, further
ones are deferred until the end of the outer block.

The user's own signal handlers are called as usual, whether they raise or not. Only the main thread
defers anything: Python handles signals in the main thread alone.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_Handler = Callable[[int, FrameType | None], object]


class _Gate:
    """A SIGINT handler in front of another: it keeps a signal when closed, else passes it on."""

    def __init__(self, previous: _Handler) -> None:
        self._next = previous
        self._pending = False
        self.closed = True

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.closed:
            self._pending = True
            return
        try:
            self._next(signum, frame)
        except BaseException:
            self.closed = True
            raise

    def deliver(self) -> None:
        """Pass on the pending signal, if there is one and the gate is open."""
        if self._pending and not self.closed:
            self._pending = False
            self(signal.SIGINT, None)


_gate: _Gate | None = None  # the installed one; only the main thread reads or writes it


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Defer interrupts to the end of the block, where one of them is delivered."""
    global _gate  # noqa: PLW0603
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _gate is not None:  # a step or a measurement inside the loss of another one
        outer, before = _gate, _gate.closed
        outer.closed = True
        try:
            yield
        finally:
            outer.closed = before
            outer.deliver()
        return
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):  # ignored, left to the system, or not set from Python
        yield
        return
    gate = _Gate(previous)
    signal.signal(signal.SIGINT, gate)
    _gate = gate
    try:
        yield
    finally:
        _gate = None
        found = signal.signal(signal.SIGINT, previous)
        if found is not gate:  # the loss has set another handler
            signal.signal(signal.SIGINT, found)
        gate.closed = False
        gate.deliver()


@contextmanager
def deliver_interrupts() -> Iterator[None]:
    """Deliver interrupts at once inside the block, including a pending one."""
    gate = _gate
    if gate is None or not gate.closed or threading.current_thread() is not threading.main_thread():
        yield
        return
    gate.closed = False
    try:
        gate.deliver()
        yield
    finally:
        gate.closed = True
