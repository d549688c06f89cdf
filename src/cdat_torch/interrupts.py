"""Ctrl-C during a step: heard while the loss is evaluated or differentiated, else a little later.

A step moves parameters, buffers and random state for a while and then puts them back. An interrupt
in between would leave them half restored, and a second Ctrl-C can cut into the restoration after
the first. So within `held` interrupts wait, except inside `let_through`, which belongs around the
calls that take long: those of the user's loss and of autograd, after everything that restores has
been entered. What such an interrupt raises closes the gate behind itself.

Handlers of the user's own are called as if nothing was between, whether they raise or not. Threads
other than the main one have nothing to hold: Python handles signals in the main thread alone.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_Handler = Callable[[int, FrameType | None], object]


class _Gate:
    """A handler of SIGINT before another: closed it remembers a signal, open it passes it on."""

    def __init__(self, behind: _Handler) -> None:
        self._behind = behind
        self._waiting = False
        self.closed = True

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.closed:
            self._waiting = True
            return
        try:
            self._behind(signum, frame)
        except BaseException:
            self.closed = True
            raise

    def deliver(self) -> None:
        """Pass on the signal that waits, if one does and the gate is open."""
        if self._waiting and not self.closed:
            self._waiting = False
            self(signal.SIGINT, None)


_gate: _Gate | None = None  # the one in force; only the main thread reads or writes it


@contextmanager
def held() -> Iterator[None]:
    """Let interrupts wait until the end of the block, where one of them is delivered."""
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
    behind = signal.getsignal(signal.SIGINT)
    if not callable(behind):  # ignored, left to the system, or not set from Python
        yield
        return
    gate = _Gate(behind)
    signal.signal(signal.SIGINT, gate)
    _gate = gate
    try:
        yield
    finally:
        _gate = None
        found = signal.signal(signal.SIGINT, behind)
        if found is not gate:  # the loss has set another handler
            signal.signal(signal.SIGINT, found)
        gate.closed = False
        gate.deliver()


@contextmanager
def let_through() -> Iterator[None]:
    """Deliver interrupts at once inside the block, also one that waits."""
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
