"""Graphs that cannot be replayed, or are not replayed exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cdat_torch import CDAT, measure, pytorch_internals
from cdat_torch.curvature.replay import Mismatch, Recording, Unsupported, recording
from cdat_torch.curvature.replay.registry import (
    OPERATION_RULES,
    Node,
    OperationRule,
    Pushforward,
    needs_adjoint,
)
from tests.torch.models import parameters, random_like
from tests.torch.replay.harness import assert_exact, differences, replay, vdot
from tests.torch.replay.small import X, Y, closure_of, double_backward, network


@pytest.fixture(autouse=True)
def _nothing_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_VERIFIED", set())


class Cube(torch.autograd.Function):
    """An operation without a rule, but with a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


def test_an_unknown_operation_is_named() -> None:
    model = network(Unknown())
    with pytest.raises(Unsupported, match="CubeBackward has no rule"):
        Recording(closure_of(model)(), parameters(model))


def test_double_backward_takes_over_for_an_unknown_operation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = network(Unknown())
    u = random_like(parameters(model))
    found = measure(closure_of(model), parameters(model), u)
    torch.testing.assert_close(found.curvature, double_backward(model, u), rtol=1e-10, atol=0)
    assert "cannot be replayed (CubeBackward has no rule)" in caplog.text
    with pytest.raises(RuntimeError, match="CubeBackward has no rule"):
        measure(closure_of(model), parameters(model), u, curvature="replay")


def _wrong_tangent(node: Node, dx: Tensor) -> Pushforward:
    return RIGHT.apply(node, dx)._replace(tangents=1.5 * node.vjp(dx)[0])


def _wrong_second(node: Node, dx: Tensor) -> Pushforward:
    right = RIGHT.apply(node, dx)
    return right._replace(second_order=1.01 * right.second_order)


def _raises(node: Node, *arguments: Any) -> Any:
    return Pushforward(node.saved("a tensor that PyTorch has renamed"))


RIGHT = OPERATION_RULES["TanhBackward0"]
WRONG = {
    "tangent": OperationRule(_wrong_tangent, needs_adjoint),
    "second order": OperationRule(_wrong_second, needs_adjoint),
    "raises": OperationRule(_raises, needs_adjoint),
    "needs raises": OperationRule(RIGHT.apply, _raises),
    "hook raises": OperationRule(RIGHT.apply, needs_adjoint, reduce_adjoint=_raises),
}


@pytest.fixture(params=WRONG)
def wrong_rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATION_RULES, "TanhBackward0", WRONG[request.param])


@pytest.mark.usefixtures("wrong_rule")
def test_a_wrong_rule_is_named() -> None:
    model = network()
    u = random_like(parameters(model))
    with pytest.raises(Mismatch, match="the rule for TanhBackward0"):
        replay(closure_of(model)(), parameters(model), u)
    with pytest.raises(RuntimeError, match="the rule for TanhBackward0"):
        measure(closure_of(model), parameters(model), u, curvature="replay")


def test_a_wrong_tangent_is_noticed_in_a_graph_that_was_verified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The slope is compared in every step."""
    model = network()
    u = random_like(parameters(model))
    measure(closure_of(model), parameters(model), u, curvature="replay")
    monkeypatch.setitem(
        OPERATION_RULES, "TanhBackward0", OperationRule(_wrong_tangent, needs_adjoint)
    )
    with pytest.raises(Mismatch, match="the replayed slope is"):
        measure(closure_of(model), parameters(model), u, curvature="replay")


@pytest.mark.usefixtures("wrong_rule")
def test_double_backward_takes_over_from_a_wrong_rule_in_a_measurement() -> None:
    model = network()
    u = random_like(parameters(model))
    with pytest.warns(UserWarning, match="not replayed exactly.*TanhBackward0") as caught:
        found = measure(closure_of(model), parameters(model), u)
    assert len(caught) == 1
    torch.testing.assert_close(found.curvature, double_backward(model, u), rtol=1e-10, atol=0)


def step(model: nn.Module, optimizer: CDAT, form: str) -> list[Tensor]:
    """Take a step and return what it measured."""
    if form == "closure":
        optimizer.step(closure_of(model))
    else:
        optimizer.zero_grad()
        optimizer.backward(closure_of(model)())
        optimizer.step()
    last = optimizer.last
    return [last.value, last.slope, last.curvature, last.learning_rate]


@pytest.mark.usefixtures("wrong_rule")
@pytest.mark.parametrize("form", ["closure", "backward"])
def test_double_backward_takes_over_from_a_wrong_rule_in_a_step(form: str) -> None:
    model = network()
    other = copy.deepcopy(model)
    ours = CDAT(torch.optim.Adam(model.parameters()))
    theirs = CDAT(torch.optim.Adam(other.parameters()), curvature="hvp")
    with pytest.warns(UserWarning, match="not replayed exactly.*TanhBackward0") as caught:
        pairs = [(step(model, ours, form), step(other, theirs, form)) for _ in range(3)]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore:the autograd graph was not replayed exactly")
@pytest.mark.parametrize("name", ["saved", "output_metadata"])
@pytest.mark.parametrize("form", ["closure", "backward"])
@pytest.mark.parametrize("middle", [nn.Tanh, lambda: nn.BatchNorm1d(7)], ids=["tanh", "norm"])
def test_double_backward_takes_over_where_pytorch_lacks_a_private_name(
    name: str, form: str, middle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph, a hook of the backward pass or a rule finds out."""

    def missing(*args: Any) -> None:
        msg = "no such name"
        raise pytorch_internals.MissingInternal(msg)

    monkeypatch.setattr(pytorch_internals, name, missing)
    model = network(middle())
    other = copy.deepcopy(model)
    ours = CDAT(torch.optim.Adam(model.parameters()))
    theirs = CDAT(torch.optim.Adam(other.parameters()), curvature="hvp")
    for _ in range(2):
        found, wanted = step(model, ours, form), step(other, theirs, form)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    with pytest.raises(Unsupported, match="no such name"):
        measure(closure_of(model), parameters(model), parameters(model), curvature="replay")


def test_a_private_name_that_is_missing_is_named() -> None:
    node = torch.ones(2, requires_grad=True).exp().grad_fn
    with pytest.raises(pytorch_internals.MissingInternal, match="ExpBackward0 has no .*_saved_x"):
        pytorch_internals.saved(node, "x")
    with pytest.raises(pytorch_internals.MissingInternal, match="no attribute _input_metadata"):
        pytorch_internals.output_metadata(NoMetadata())


class NoMetadata:
    def name(self) -> str:
        return "Node"


@pytest.mark.parametrize("change", [lambda g: g.mul_(0.1), lambda g: g.zero_()])
def test_gradients_that_are_changed_in_place_do_no_harm(change) -> None:  # type: ignore[no-untyped-def]
    """Clipping changes the tensors that backward has returned."""
    model = nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 2), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 5), nn.LayerNorm(5), nn.Softmax(-1), nn.Linear(5, 3),
    ).double()  # fmt: skip
    params = parameters(model)
    u = random_like(params)
    expected = double_backward(model, u)
    loss = closure_of(model)()
    watched = Recording(loss, params)
    with watched.watching():
        grads = torch.autograd.grad(loss, params, retain_graph=True)
    for g in grads:
        change(g)
    _, curvature = watched.sweep(dict(zip(params, u, strict=True)))
    torch.testing.assert_close(curvature, expected, rtol=1e-9, atol=0)


def test_losses_that_share_a_graph() -> None:
    model = network()
    params, u = parameters(model), random_like(parameters(model))
    outputs = model(X)
    losses = [F.cross_entropy(outputs, Y), outputs.square().mean(), outputs.logsumexp(1).sum()]
    recordings = []
    for loss in losses:
        watched = Recording(loss, params)
        with watched.watching():
            torch.autograd.grad(loss, params, retain_graph=True)
        recordings.append(watched)
    along = dict(zip(params, u, strict=True))
    total = torch.stack([watched.sweep(along)[1] for watched in recordings]).sum()

    def together(*w: Tensor) -> Tensor:
        names = [name for name, _ in model.named_parameters()]
        y = torch.func.functional_call(model, dict(zip(names, w, strict=True)), (X,))
        return F.cross_entropy(y, Y) + y.square().mean() + y.logsumexp(1).sum()

    torch.testing.assert_close(total, vdot(differences(together, params, u), u), rtol=1e-9, atol=0)


def test_a_parameter_in_two_places() -> None:
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 3, 3])
    assert_exact(
        lambda w: (F.embedding(rows, w) @ w.t()).tanh().square().sum(), [w], [torch.randn_like(w)]
    )


def test_a_parameter_that_is_the_loss_and_one_that_does_not_move() -> None:
    w, v = (torch.randn((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert [float(t) for t in replay(w * 1, [w], [torch.ones_like(w)])[:2]] == [1.0, 0.0]
    loss = w.sin() * v
    watched = Recording(loss, [w, v])
    with watched.watching():
        torch.autograd.grad(loss, [w, v], retain_graph=True)
    slope, curvature = watched.sweep({w: torch.ones_like(w)})
    torch.testing.assert_close(slope, w.detach().cos() * v.detach())
    torch.testing.assert_close(curvature, -w.detach().sin() * v.detach())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = nn.Sequential(nn.Linear(7, 7), nn.GELU(), nn.LayerNorm(7)), 0

    def run(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=False)


def test_activation_checkpoints_are_left_to_double_backward(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Outside of a backward pass the segment would run again for each tensor that is read."""
    middle = Checkpointed()
    model = network(middle)
    u = random_like(parameters(model))
    with pytest.raises(RuntimeError, match="inside an activation checkpoint"):
        measure(closure_of(model), parameters(model), u, curvature="replay")
    middle.calls = 0
    measure(closure_of(model), parameters(model), u, curvature="hvp")
    usual, middle.calls = middle.calls, 0
    found = measure(closure_of(model), parameters(model), u)
    assert middle.calls == usual + 1
    assert "inside an activation checkpoint" in caplog.text
    torch.testing.assert_close(found.curvature, double_backward(model, u), rtol=1e-10, atol=0)

    middle.calls = 0
    optimizer = CDAT(torch.optim.SGD(model.parameters(), lr=1.0))
    for _ in range(3):
        optimizer.step(closure_of(model))
    assert middle.calls == 3 * usual + 1


def test_other_hooks_on_saved_tensors_are_no_obstacle() -> None:
    model = network()
    u = random_like(parameters(model))
    expected = double_backward(model, u)
    with torch.autograd.graph.save_on_cpu():
        found = measure(closure_of(model), parameters(model), u, curvature="replay")
    torch.testing.assert_close(found.curvature, expected, rtol=1e-10, atol=0)


@pytest.fixture
def compiler() -> Iterator[None]:
    """Reset the compiler, so that other tests run in a process that has compiled nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
def test_compiled_modules_are_replayed_uncompiled() -> None:
    model = network(nn.BatchNorm1d(7))
    compiled = torch.compile(model, backend="aot_eager")
    params, u = parameters(model), random_like(parameters(model))
    compiled(X)  # a step without a measurement
    found = measure(closure_of(compiled), params, u, curvature="replay")
    torch.testing.assert_close(found.curvature, double_backward(model, u), rtol=1e-10, atol=0)
    assert int(model[1].num_batches_tracked) == 3
