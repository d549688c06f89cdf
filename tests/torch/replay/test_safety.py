"""What happens where the graph cannot be replayed, or is not replayed exactly."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cdat_torch import CDAT, measure
from cdat_torch.replay import Mismatch, Recording, Unsupported, fallback, recording
from cdat_torch.replay.registry import RULES, Node, Pushed, Rule
from tests.torch.models import mlp, parameters, random_like
from tests.torch.replay.harness import assert_exact, differences, replay, vdot

X = torch.linspace(-1.0, 1.0, 60, dtype=torch.float64).sin().view(12, 5)
Y = torch.arange(12) % 3


@pytest.fixture(autouse=True)
def _nothing_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_VERIFIED", set())


class Cube(torch.autograd.Function):
    """An operation that no rule knows, with a second derivative."""

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


def network(middle: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), middle or nn.Tanh(), nn.Linear(7, 3)).double()


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(X), Y)


def double_backward(model: nn.Module, u: list[Tensor]) -> Tensor:
    params = parameters(model)
    g = torch.autograd.grad(closure_of(model)(), params, create_graph=True)
    return vdot(torch.autograd.grad(g, params, u), u)


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


def _wrong_tangent(node: Node, dx: Tensor) -> Pushed:
    return RIGHT.push(node, dx)._replace(tangents=1.5 * node.vjp(dx)[0])


def _wrong_second(node: Node, dx: Tensor) -> Pushed:
    right = RIGHT.push(node, dx)
    return right._replace(second=1.01 * right.second)


def _raises(node: Node, dx: Tensor) -> Pushed:
    return Pushed(node.saved("a tensor that PyTorch has renamed"))


RIGHT = RULES["TanhBackward0"]
WRONG = {"tangent": _wrong_tangent, "second order": _wrong_second, "raises": _raises}


@pytest.fixture(params=WRONG)
def wrong_rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "TanhBackward0", Rule(WRONG[request.param], adjoint=True))


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
    monkeypatch.setitem(RULES, "TanhBackward0", Rule(_wrong_tangent, adjoint=True))
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
    theirs = CDAT(torch.optim.Adam(other.parameters()), curvature="hessian")
    with pytest.warns(UserWarning, match="not replayed exactly.*TanhBackward0") as caught:
        pairs = [(step(model, ours, form), step(other, theirs, form)) for _ in range(3)]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert len(caught) == 1


@pytest.mark.parametrize("change", [lambda g: g.mul_(0.1), lambda g: g.zero_()])
def test_gradients_that_are_changed_in_place_do_no_harm(change) -> None:  # type: ignore[no-untyped-def]
    """Clipping reaches the tensors that backward has returned."""
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
    """Outside of a backward pass the segment runs again for each tensor that is read."""
    middle = Checkpointed()
    model = network(middle)
    u = random_like(parameters(model))
    with pytest.raises(RuntimeError, match="inside an activation checkpoint"):
        measure(closure_of(model), parameters(model), u, curvature="replay")
    middle.calls = 0
    measure(closure_of(model), parameters(model), u, curvature="hessian")
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


@pytest.mark.parametrize("form", ["closure", "backward", "measure"])
def test_nothing_is_left_of_a_step(form: str) -> None:
    """Without the collector of cycles, too."""
    model, x, y = mlp(4, 6, 3), torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    optimizer = CDAT(torch.optim.SGD(model.parameters(), lr=1.0), sigma=1.0)
    u = random_like(parameters(model))
    loss = lambda: F.cross_entropy(model(x), y)

    def once() -> None:
        if form == "closure":
            optimizer.step(loss)
        elif form == "backward":
            optimizer.zero_grad()
            optimizer.backward(loss())
            optimizer.step()
        else:
            measure(loss, parameters(model), u)

    def alive() -> int:
        return sum(issubclass(type(o), Tensor | Recording | Node) for o in gc.get_objects())

    once()
    gc.collect()
    gc.disable()
    try:
        counts = []
        for _ in range(4):
            for _ in range(100):
                once()
            counts.append(alive())
    finally:
        gc.enable()
    assert len(set(counts)) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda w: (w * torch.nan).tanh(),
        lambda w: w.tanh() * torch.inf,
        lambda w: (w - w.detach()).sqrt(),
        lambda w: (w - w.detach()).log(),
        lambda w: (w - w.detach()) ** 1.5,
        lambda w: w / (w - w.detach()),
        lambda w: torch.linalg.vector_norm(w - w.detach()),
        lambda w: (w * 1e200).exp(),
        lambda w: (w * 1e200).square() * w,
        lambda w: F.layer_norm(w * torch.inf, (4,)),
        lambda w: (w * torch.nan).softmax(-1),
        lambda w: w @ (w.view(4, 1) * torch.nan),
    ],
)
def test_what_is_not_finite_is_no_mismatch(function) -> None:  # type: ignore[no-untyped-def]
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    found = measure(lambda: function(w).sum(), [w], [torch.randn_like(w)], curvature="replay")
    assert not (torch.isfinite(found.curvature) and torch.isfinite(found.slope))


def test_what_cancels_is_no_mismatch() -> None:
    """Rounding is all that the second mean finds."""
    w = torch.randn(6, 4, requires_grad=True)

    def loss() -> Tensor:
        x = w - w.mean(0)
        return (x - x.mean(0)).sin().sum()

    found = measure(loss, [w], [torch.randn_like(w)], curvature="replay")
    assert torch.isfinite(found.curvature)


def test_the_first_sweep_draws_no_random_numbers_of_the_user() -> None:
    model, u = network(), random_like(parameters(network()))
    before = torch.get_rng_state()
    measure(closure_of(model), parameters(model), u, curvature="replay")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_direction_that_is_not_finite_is_no_mismatch() -> None:
    model = network()
    u = random_like(parameters(model))
    u[0][0, 0] = torch.nan
    found = measure(closure_of(model), parameters(model), u, curvature="replay")
    assert torch.isnan(found.curvature)


def test_a_batch_with_nan_is_skipped() -> None:
    model = network(nn.LayerNorm(7))
    optimizer = CDAT(torch.optim.Adam(model.parameters()), curvature="replay")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(lambda: F.cross_entropy(model(X * torch.nan), Y))
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)
    optimizer.step(closure_of(model))
    assert torch.isfinite(optimizer.last.curvature)


def test_half_precision_is_as_exact_as_double_backward() -> None:
    model = nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.SiLU(),
        nn.Unflatten(1, (4, 8)), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3),
        nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    precise = copy.deepcopy(model).double()
    x, y = torch.randn(64, 16), torch.randint(0, 5, (64,))
    params = parameters(model)

    def half() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x), y)

    ours, theirs = [], []
    for _ in range(8):
        u = random_like(params)
        wide = [t.double() for t in u]
        g = torch.autograd.grad(
            F.cross_entropy(precise(x.double()), y), parameters(precise), create_graph=True
        )
        product = torch.autograd.grad(g, parameters(precise), wide)
        scale = vdot(product, product).sqrt() * vdot(wide, wide).sqrt()
        expected = vdot(product, wide)
        for errors, way in ((ours, "replay"), (theirs, "hessian")):
            found = measure(half, params, u, curvature=way).curvature
            errors.append((found - expected) / scale)
    assert torch.stack(ours).norm() <= 2 * torch.stack(theirs).norm()


def test_ctrl_c_in_backward_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(nn.LayerNorm(7))
    params = parameters(model)
    loss = closure_of(model)()
    watched = Recording(loss, params)

    def interrupted() -> None:
        torch.autograd.grad(loss, params, retain_graph=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched.watching():
        interrupted()
    for node in watched._graph.nodes:
        node.detached()
    torch.autograd.grad(loss, params, retain_graph=True)
    assert all(node.adjoints == () for node in watched._graph.nodes)


@pytest.mark.parametrize("where", ["rule", "fallback"])
def test_ctrl_c_in_the_sweep_leaves_no_hooks(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = torch.lerp(a.sin(), b.cos(), 0.3).square().sum()
    expected = torch.autograd.grad(loss, [a, b], retain_graph=True)

    def interrupt(*args: object) -> Pushed:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "rule":
            patch.setitem(RULES, "PowBackward0", Rule(interrupt, adjoint=True))
        else:
            patch.setattr(fallback, "_derived", interrupt)
        with pytest.raises(KeyboardInterrupt):
            replay(loss, [a, b], [a.detach(), b.detach()])
    watched = Recording(loss, [a, b])
    found = torch.autograd.grad(loss, [a, b], retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(node.adjoints == () for node in watched._graph.nodes)
    again = replay(loss, [a, b], [a.detach(), b.detach()])
    torch.testing.assert_close(again[0], vdot(expected, [a.detach(), b.detach()]))
