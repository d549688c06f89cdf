"""Input that must not disturb the replay, and the memory and hooks it must not leave behind."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdat_torch import CDAT, measure
from cdat_torch.curvature.replay import Recording, Unsupported, double_backward, recording
from cdat_torch.curvature.replay.registry import (
    OPERATION_RULES,
    Node,
    OperationRule,
    Pushforward,
    needs_adjoint,
)
from tests.torch.models import mlp, parameters, random_like
from tests.torch.replay.harness import replay, vdot
from tests.torch.replay.small import X, Y, closure_of, network


@pytest.fixture(autouse=True)
def _nothing_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_VERIFIED", set())


@pytest.mark.parametrize("form", ["closure", "backward", "measure"])
def test_nothing_is_left_of_a_step(form: str) -> None:
    """Not even for the garbage collector. In the end the slope is rounding error only."""
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
            for _ in range(50):
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
def test_values_that_are_not_finite_are_no_mismatch(function) -> None:  # type: ignore[no-untyped-def]
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    found = measure(lambda: function(w).sum(), [w], [torch.randn_like(w)], curvature="replay")
    assert not (torch.isfinite(found.curvature) and torch.isfinite(found.slope))


def test_cancellation_is_no_mismatch() -> None:
    """The second mean is rounding error only."""
    w = torch.randn(6, 4, requires_grad=True)

    def loss() -> Tensor:
        x = w - w.mean(0)
        return (x - x.mean(0)).sin().sum()

    found = measure(loss, [w], [torch.randn_like(w)], curvature="replay")
    assert torch.isfinite(found.curvature)


def test_the_first_sweep_leaves_the_random_state_alone() -> None:
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
        for errors, way in ((ours, "replay"), (theirs, "hvp")):
            found = measure(half, params, u, curvature=way).curvature
            errors.append((found - expected) / scale)
    assert torch.stack(ours).norm() <= 2 * torch.stack(theirs).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "grouped"])
def test_fused_attention_in_half_precision_is_as_exact_as_double_backward(
    dtype: torch.dtype, kind: str
) -> None:
    """Double backward runs the math kernel."""
    heads = 1 if kind == "grouped" else 2
    x = torch.randn(3, 10, 16).to(dtype)
    mask = torch.randn(10, 10).to(dtype)

    def loss_of(w: Tensor) -> Tensor:
        mixed = (x.to(w) @ w).reshape(3, 10, 2 + 2 * heads, 8).transpose(1, 2)
        q, k, v = mixed.split([2, heads, heads], 1)
        bias = mask.to(w) if kind == "mask" else None
        y = F.scaled_dot_product_attention(
            q, k, v, bias, is_causal=kind == "causal", enable_gqa=kind == "grouped"
        )
        return y.to(torch.promote_types(w.dtype, torch.float32)).square().mean()

    ours, theirs = [], []
    for _ in range(8):
        w, u = (torch.randn(16, 16 + 16 * heads).to(dtype) for _ in range(2))
        true = w.double().requires_grad_()
        expected = measure(lambda: loss_of(true), [true], [u.double()], curvature="hvp")  # noqa: B023
        w.requires_grad_()
        for errors, way in ((ours, "replay"), (theirs, "hvp")):
            found = measure(lambda: loss_of(w), [w], [u], curvature=way)  # noqa: B023
            errors.append((found.curvature - expected.curvature) / u.double().square().sum())
    assert torch.stack(ours).norm() <= 2 * torch.stack(theirs).norm()


def test_parameters_that_are_results_are_left_to_double_backward() -> None:
    """A replay would go on into the graph that computed them."""
    v = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w, x = v.exp(), torch.randn(5, 4, dtype=torch.float64)
    loss = lambda: (x @ w).tanh().square().sum()
    u = torch.randn_like(w)
    with pytest.raises(Unsupported, match="results of other operations"):
        measure(loss, [w], [u], curvature="replay")
    found, true = (measure(loss, [w], [u], curvature=way) for way in ("auto", "hvp"))
    torch.testing.assert_close(found.curvature, true.curvature)


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
        node.release()
    torch.autograd.grad(loss, params, retain_graph=True)
    assert all(node.adjoints == () for node in watched._graph.nodes)


@pytest.mark.parametrize("where", ["rule", "double_backward"])
def test_ctrl_c_in_the_sweep_leaves_no_hooks(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = torch.lerp(a.sin(), b.cos(), 0.3).square().sum()
    expected = torch.autograd.grad(loss, [a, b], retain_graph=True)

    def interrupt(*args: object) -> Pushforward:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "rule":
            patch.setitem(OPERATION_RULES, "PowBackward0", OperationRule(interrupt, needs_adjoint))
        else:
            patch.setattr(double_backward, "_differentiate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            replay(loss, [a, b], [a.detach(), b.detach()])
    watched = Recording(loss, [a, b])
    found = torch.autograd.grad(loss, [a, b], retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(node.adjoints == () for node in watched._graph.nodes)
    again = replay(loss, [a, b], [a.detach(), b.detach()])
    torch.testing.assert_close(again[0], vdot(expected, [a.detach(), b.detach()]))
