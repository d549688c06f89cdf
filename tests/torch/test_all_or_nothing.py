"""Steps are atomic, also if they raise or are interrupted once or many times."""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdat_core import linesearch, tuners
from cdat_torch import CompositeLoss, TunedOptimizer, measure, sharpness
from cdat_torch.curvature.fallback import Methods
from cdat_torch.interrupts import defer_interrupts, deliver_interrupts

WAYS: dict[str, dict[str, Any]] = {
    "replay": {},
    "hvp": {"curvature": "hvp"},
    "gauss_newton": {"curvature": "gauss_newton"},
    "forward mode": {"curvature": "gauss_newton"},
    "finite_difference": {"curvature": "finite_difference"},
    "held rate": {"every": 5},
    "backtracking": {"tuner_or_search": linesearch.backtracking(initial_step_size=1e3)},
    "zoom": {"tuner_or_search": linesearch.zoom(initial_step_size=1e3)},
}
SEVERAL_CALLS = ["finite_difference", "forward mode", "backtracking", "zoom"]


@pytest.fixture(autouse=True)
def _default_handler() -> Iterator[None]:
    """Python's own handler, which is missing if a shell runs the tests in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


class Broken(Exception):  # noqa: N818
    """Errors that a user's loss may raise."""


class Training:
    """A model with dropout, running statistics and gradients, after one step."""

    def __init__(self, way: str, base: type[torch.optim.Optimizer] = torch.optim.Adam) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 2)
        )
        self.x, self.labels = torch.randn(16, 4), torch.randint(0, 2, (16,))
        options = {"tuner_or_search": tuners.cdat(1.0, initial_learning_rate=0.01), **WAYS[way]}
        self.curvature = options.get("curvature", "auto")
        self.optimizer = TunedOptimizer(base(self.model.parameters()), **options)
        if way == "forward mode":
            self.optimizer._rule.methods = Methods(("gauss_newton",))
        self.calls, self.raises_at = 0, 0
        self.raises: BaseException = Broken()
        self.closure = CompositeLoss(self._outputs, self._loss)
        self.step()
        self.calls = 0
        self.loss = nn.functional.mse_loss(self.model(self.x), torch.zeros(16, 2))

    def _outputs(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=self.calls % 2 == 0)  # a habit, and harmless
        outputs = self.model(self.x)
        self._count()
        return outputs

    def _loss(self, outputs: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(outputs, self.labels)
        self._count()
        return loss

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.raises_at:
            raise self.raises

    def step(self) -> None:
        self.optimizer.step(self.closure)

    def backward(self) -> None:
        self.optimizer.backward(self.loss)

    def measure(self) -> None:
        params = list(self.model.parameters())
        u = [torch.ones_like(p) for p in params]
        measure(self.closure, params, u, curvature=self.curvature)

    def sharpness(self) -> None:
        sharpness(self.closure, self.model.parameters(), num_matvecs=3)

    def everything(self) -> dict[str, Any]:
        """What a step may change, as copies."""
        optimizer = self.optimizer
        params = list(self.model.parameters())
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "gradients": [p.grad for p in params],
                "random state": torch.get_rng_state(),
                "base": [optimizer.base.state.get(p) for p in params],
                "tuner": optimizer._rule.state,
                "progress": optimizer._rule.progress,
                "groups": [{**g, "params": None} for g in optimizer.param_groups],
                "last": optimizer.last,
                "modes": (
                    torch.is_grad_enabled(),
                    torch._C._is_fwd_grad_enabled(),
                    torch._C._len_torch_function_stack(),
                    torch.backends.mkldnn.enabled,
                    torch.backends.mha.get_fastpath_enabled(),
                    [p.requires_grad for p in params],
                ),
            }
        )


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    return [key for key in left if not same(left[key], right[key])]


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("error", [Broken(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("way", WAYS)
def test_a_closure_that_raises_in_any_call_undoes_the_step(
    way: str, error: BaseException, base: type[torch.optim.Optimizer]
) -> None:
    undisturbed = Training(way, base)
    undisturbed.step()
    assert undisturbed.calls >= (4 if way in SEVERAL_CALLS else 2)
    for call in range(1, undisturbed.calls + 1):
        training = Training(way, base)
        before = training.everything()
        training.raises_at, training.raises = call, error
        with pytest.raises(type(error)):
            training.step()
        assert training.calls == call
        assert not differences(before, training.everything())
        training.step()  # and the next one is that of an undisturbed run
        assert not differences(undisturbed.everything(), training.everything())


class CtrlC:
    """Sends SIGINT at the n-th line of Python, then at every call while the step holds it.

    The lines are those of all modules: cdat_torch, PyTorch, the standard library.
    """

    def __init__(self, line: int = 0) -> None:
        self.line, self.lines, self.sent = line, 0, 0

    def __call__(self, function: Callable[[], None]) -> bool:
        """Call the function and return whether KeyboardInterrupt came out of it."""
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
            sys.setprofile(None)
        return False

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.line:
                self.sent = 1
                signal.raise_signal(signal.SIGINT)
        return self._trace

    def _profile(self, frame: Any, event: str, arg: Any) -> None:
        if self.sent and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            self.sent += 1
            signal.raise_signal(signal.SIGINT)


MOMENTS = 25
SWEPT = [
    *((way, "step") for way in WAYS),
    *((way, "measure") for way in ("replay", "hvp", "gauss_newton", "finite_difference")),
    ("hvp", "sharpness"),
    ("replay", "backward"),
    ("hvp", "backward"),
]


@pytest.mark.parametrize(("way", "what"), SWEPT)
def test_ctrl_c_at_any_moment_and_again_leaves_all_or_nothing(way: str, what: str) -> None:
    getattr(Training(way), what)()  # what is cached takes no lines from now on
    finished = Training(way)
    counter = CtrlC()
    assert not counter(getattr(finished, what))
    after = finished.everything()
    before = Training(way).everything()
    outcomes, most = set(), 0
    for line in random.Random(0).sample(range(1, counter.lines + 1), MOMENTS):
        training, ctrl_c = Training(way), CtrlC(line)
        # Finalizers add lines, so a run may have fewer than the one that was counted.
        assert ctrl_c(getattr(training, what)) or ctrl_c.lines < line
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        found = training.everything()
        undone, done = differences(before, found), differences(after, found)
        assert not undone or not done, (line, undone, done)
        outcomes.add(not undone)
        most = max(most, ctrl_c.sent)
    assert outcomes == ({True} if what == "sharpness" else {True, False})
    assert most > 50  # the restoration was under fire


def test_the_first_interrupt_comes_at_once_and_the_second_after_the_restoration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By real signals; the second comes in the copy that restores the parameters."""
    training = Training("finite_difference")
    before = training.everything()
    outputs, copy_, sent = training._outputs, Tensor.copy_, []

    def interrupted() -> Tensor:
        if training.calls:
            sent.append("first")
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the closure went on")
        return outputs()

    def interrupting(self: Tensor, *args: Any) -> Tensor:
        if sent == ["first"]:
            sent.append("second")
            os.kill(os.getpid(), signal.SIGINT)
        return copy_(self, *args)

    training.closure.model_fn = interrupted
    monkeypatch.setattr(Tensor, "copy_", interrupting)
    with pytest.raises(KeyboardInterrupt) as caught:
        training.step()
    assert sent == ["first", "second"]
    assert isinstance(caught.value.__context__, KeyboardInterrupt)  # the second after the first
    assert not differences(before, training.everything())


def test_a_handler_that_does_not_raise_is_called_and_the_step_goes_on() -> None:
    """Like those of trainers, which finish the step or the epoch and then stop."""
    expected = Training("zoom")
    expected.step()
    training, heard = Training("zoom"), []
    outputs = training._outputs

    def interrupted() -> Tensor:
        signal.raise_signal(signal.SIGINT)
        heard.append("after")
        return outputs()

    training.closure.model_fn = interrupted
    handler = lambda signum, frame: heard.append(signum)
    signal.signal(signal.SIGINT, handler)
    training.step()
    assert signal.getsignal(signal.SIGINT) is handler
    assert heard == [signal.SIGINT, "after"] * (expected.calls // 2)
    assert not differences(expected.everything(), training.everything())


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_without_a_handler_nothing_is_put_in_its_place(handler: signal.Handlers) -> None:
    training, seen = Training("hvp"), []
    outputs = training._outputs

    def looking() -> Tensor:
        seen.append(signal.getsignal(signal.SIGINT))
        return outputs()

    training.closure.model_fn = looking
    signal.signal(signal.SIGINT, handler)
    training.step()
    assert seen == [handler]


def test_a_handler_that_the_closure_sets_stays() -> None:
    training = Training("hvp")
    outputs, handler = training._outputs, lambda signum, frame: None

    def setting() -> Tensor:
        signal.signal(signal.SIGINT, handler)
        return outputs()

    training.closure.model_fn = setting
    training.step()
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_between_two_evaluations_waits_for_the_next() -> None:
    heard: list[str] = []

    def block() -> None:
        with defer_interrupts():
            signal.raise_signal(signal.SIGINT)
            heard.append("held")
            with deliver_interrupts():
                heard.append("let through")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert heard == ["held"]


def test_a_measurement_in_a_closure_is_held_on_its_own() -> None:
    """The restoration of the inner step is not interrupted; the closure after it is."""
    heard: list[str] = []

    def block() -> None:
        with defer_interrupts(), deliver_interrupts():
            with defer_interrupts():
                signal.raise_signal(signal.SIGINT)
                heard.append("inner")
            heard.append("outer")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert heard == ["inner"]


def test_a_step_in_another_thread() -> None:
    """Python handles signals in the main thread, which may defer an interrupt itself."""
    expected = Training("finite_difference")
    expected.step()
    training, errors = Training("finite_difference"), []

    def run() -> None:
        try:
            training.step()
        except BaseException as error:
            errors.append(error)

    def block() -> None:
        with defer_interrupts():
            thread = threading.Thread(target=run)
            thread.start()
            signal.raise_signal(signal.SIGINT)
            thread.join()

    with pytest.raises(KeyboardInterrupt):
        block()
    assert training.calls == expected.calls  # it ended
    assert not errors
    assert same(expected.model.state_dict(), training.model.state_dict())
