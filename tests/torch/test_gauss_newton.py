"""The Gauss-Newton curvature against a dense Jacobian by reverse mode and closed forms."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from cdat_torch import CompositeLoss, measure
from cdat_torch.kernels import say_once
from tests.torch.models import CLASSES, WIDTH, Classifier, flat, mlp, parameters, random_like

LENGTH, BATCH = 5, 4


def dense_gauss_newton(
    params: list[Tensor], model_fn: Callable[[], Tensor], loss_fn: Callable[[Tensor], Tensor]
) -> Tensor:
    """J' H_loss J with one reverse pass for each output."""
    with sdpa_kernel(SDPBackend.MATH):
        z = model_fn()
    rows = [
        flat(
            list(
                torch.autograd.grad(
                    z,
                    params,
                    e.reshape(z.shape),
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
        )
        for e in torch.eye(z.numel()).to(z)
    ]
    jacobian = torch.stack(rows)
    hessian = torch.autograd.functional.hessian(loss_fn, z.detach()).reshape(2 * [z.numel()])
    return jacobian.T @ hessian @ jacobian


@pytest.fixture(autouse=True, params=[True, False], ids=["replay", "forward mode"])
def replayed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With a PyTorch under which graphs cannot be replayed, a forward-mode pass takes over."""
    monkeypatch.setattr("cdat_torch.curvature.replay.is_supported", lambda: request.param)
    return bool(request.param)


def gauss_newton(
    model_fn: Callable[[], Any],
    loss_fn: Callable[[Any], Tensor],
    params: list[Tensor],
    u: list[Tensor],
) -> Tensor:
    return measure(CompositeLoss(model_fn, loss_fn), params, u, curvature="gauss_newton").curvature


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def network(kind: str) -> nn.Module:
    encoder = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.3, batch_first=True)
    bodies: dict[str, Callable[[], nn.Module]] = {
        "encoder": lambda: Classifier(encoder),
        "encoder in eval mode": lambda: Classifier(encoder).eval(),
        "lstm": lambda: Classifier(nn.LSTM(WIDTH, 4, 2, batch_first=True, dropout=0.3), 4),
        "gru": lambda: Classifier(nn.GRU(WIDTH, 4, 2, batch_first=True, dropout=0.3), 4),
        "weight norm": lambda: Classifier(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
        "layer norm": lambda: Classifier(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        ),
        "checkpoint": lambda: Classifier(
            Checkpointed(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.3))
        ),
        "batch norm, dropout": lambda: nn.Sequential(
            nn.Flatten(),
            nn.Linear(LENGTH * WIDTH, 7),
            nn.BatchNorm1d(7),
            nn.Dropout(0.4),
            nn.Tanh(),
        ).append(nn.Linear(7, CLASSES)),
    }
    return bodies[kind]().double()


@pytest.mark.parametrize(
    "kind",
    [
        "encoder",
        "encoder in eval mode",
        "lstm",
        "gru",
        "weight norm",
        "layer norm",
        "checkpoint",
        "batch norm, dropout",
    ],
)
def test_matches_a_dense_gauss_newton_matrix_in_forward_mode(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    say_once.cache_clear()
    model = network(kind)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (BATCH,))
    loss_fn = lambda z: F.cross_entropy(z, y)
    params, twin = parameters(model), copy.deepcopy(model)
    torch.manual_seed(3)
    matrix = dense_gauss_newton(parameters(twin), lambda: twin(x), loss_fn)
    u = random_like(params)
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING, logger="cdat_torch"):
        found = gauss_newton(lambda: model(x), loss_fn, params, u)
    torch.testing.assert_close(found, flat(u) @ matrix @ flat(u), rtol=1e-10, atol=0)
    assert not caplog.records  # no second way was needed


def test_a_float32_lstm_has_a_forward_mode_derivative_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    say_once.cache_clear()
    model = network("lstm")
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    u = random_like(parameters(model))
    narrow = copy.deepcopy(model).float()
    torch.manual_seed(3)
    expected = gauss_newton(lambda: model(x), lambda z: z.square().sum(), parameters(model), u)
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING, logger="cdat_torch"):
        found = gauss_newton(
            lambda: narrow(x.float()), lambda z: z.square().sum(), parameters(narrow), u
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert torch.backends.mkldnn.enabled


class WithoutJvp(torch.autograd.Function):
    """The cube, without a forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Once(WithoutJvp):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def test_without_forward_mode_two_reverse_passes_give_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    say_once.cache_clear()
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.4), nn.Linear(5, 2))
    model.double()
    x = torch.randn(8, 4, dtype=torch.float64)
    params, twin = parameters(model), copy.deepcopy(model)
    u = random_like(params)
    loss_fn = lambda z: z.exp().sum()
    torch.manual_seed(3)
    matrix = dense_gauss_newton(parameters(twin), lambda: twin(x) ** 3, loss_fn)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING, logger="cdat_torch"):
        for _ in range(2):
            torch.manual_seed(3)
            found = gauss_newton(lambda: WithoutJvp.apply(model(x)), loss_fn, params, u)
            torch.testing.assert_close(found, flat(u) @ matrix @ flat(u), rtol=1e-10, atol=0)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    assert "no forward-mode derivative" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model[1].num_batches_tracked) == 2
    with pytest.raises(NotImplementedError, match="Once is marked once_differentiable") as caught:
        gauss_newton(lambda: Once.apply(model(x)), loss_fn, params, u)
    assert '"finite_difference" needs first derivatives only' in caught.value.__notes__[0]
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_on_a_linear_model_it_is_the_hessian() -> None:
    model = mlp(5, 3)
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randint(0, 3, (9,))
    params = parameters(model)
    u = random_like(params)
    loss = CompositeLoss(lambda: model(x), lambda z: F.cross_entropy(z, y))
    exact = measure(loss, params, u, curvature="hvp")
    found = measure(loss, params, u, curvature="gauss_newton")
    for a, b in zip(found[:3], exact[:3], strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_is_not_negative_where_the_hessian_is(dtype: torch.dtype) -> None:
    model = mlp(4, 6, 3, dtype=dtype)
    x, y = torch.randn(10, 4, dtype=dtype), torch.randint(0, 3, (10,))
    params = parameters(model)
    loss = CompositeLoss(lambda: model(x), lambda z: F.cross_entropy(z, y))
    signs = set()
    for _ in range(30):
        u = random_like(params)
        assert measure(loss, params, u, curvature="gauss_newton").curvature > 0
        signs.add(bool(measure(loss, params, u, curvature="hvp").curvature > 0))
    assert signs == {True, False}  # the model's own second derivatives matter here


def test_outputs_may_be_nested_and_hold_what_does_not_depend_on_the_parameters() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    u = [torch.tensor([1.0, -1.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)]

    def model_fn() -> dict[str, Any]:
        return {"a": (w**2, [other * w[0]]), "count": torch.tensor(4), "name": "x", "none": None}

    def loss_fn(z: dict[str, Any]) -> Tensor:
        (a, [b]), count = z["a"], z["count"]
        assert z["name"] == "x"
        assert z["none"] is None
        return (a**2).sum() * count + b.sum() ** 2

    # J u = (2, -4) and other * 1 + w0 * 1 = 4; H_loss = 8 and 2
    assert float(gauss_newton(model_fn, loss_fn, [w, other], u)) == 8 * (4 + 16) + 2 * 16


def test_weight_decay_belongs_to_the_outputs() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    u = [torch.tensor([1.0, 1.0], dtype=torch.float64)]
    inside = lambda z: z[0].square().sum() + 0.5 * z[1].square().sum()
    assert float(gauss_newton(lambda: (w**2, w), inside, [w], u)) == 2 * (4 + 16) + 2
    with pytest.raises(ValueError, match="let model_fn return them as a part of its outputs"):
        gauss_newton(lambda: w**2, lambda z: z.sum() + w.square().sum(), [w], u)


def test_what_reverse_mode_holds_constant_is_constant() -> None:
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    u = [torch.ones((), dtype=torch.float64)]

    def under_no_grad() -> Tensor:
        with torch.no_grad():
            constant = w**2
        return w * constant

    def under_nested_modes() -> Tensor:
        with torch.no_grad():
            square = w * w
            with torch.enable_grad():
                inner = w * square
            inner = 0 * inner + 4
        return w * inner

    for model_fn in (under_no_grad, lambda: w * (w**2).detach(), under_nested_modes):
        assert float(gauss_newton(model_fn, lambda z: z**2, [w], u)) == 2 * 4.0**2
    with pytest.raises(ValueError, match="must return outputs that depend on the parameters"):
        gauss_newton(lambda: w.detach(), lambda z: z * w, [w], u)


def test_a_linear_loss_has_no_gauss_newton_curvature() -> None:
    w = torch.ones(2, requires_grad=True)
    assert float(gauss_newton(lambda: w**3, lambda z: z.sum(), [w], [torch.ones(2)])) == 0.0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_model_leaves_no_trace(error: type[BaseException], replayed: bool) -> None:
    call = 1 if replayed else 2
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1))
    x, calls = torch.randn(8, 4), []

    def model_fn() -> Tensor:
        calls.append(None)
        z = model(x)
        if len(calls) == call:
            raise error
        return z

    params = parameters(model)
    u = random_like(params)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(error):
        gauss_newton(model_fn, lambda z: z.square().mean(), params, u)
    assert len(calls) == call
    for name, found in model.state_dict().items():
        assert torch.equal(found, before[name]), name
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in params)
    with forward_ad.dual_level():
        assert all(forward_ad.unpack_dual(p).tangent is None for p in params)


def test_another_loss_is_refused_before_it_is_evaluated() -> None:
    def closure() -> Tensor:
        raise AssertionError("evaluated")

    w = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"loss_fn must be a cdat_torch.CompositeLoss .* got <func"):
        measure(closure, [w], [torch.ones(2)], curvature="gauss_newton")
    with pytest.raises(TypeError, match="model_fn must be callable, got tensor"):
        CompositeLoss(w, torch.sum)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss_fn must be callable, got None"):
        CompositeLoss(lambda: w, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss_fn must return a real scalar"):
        gauss_newton(lambda: w, lambda z: z, [w], [torch.ones(2)])


def test_tied_frozen_and_unused_parameters() -> None:
    embedding, unused = nn.Embedding(5, 4).double(), nn.Linear(2, 2).double()
    frozen = nn.Linear(4, 4).double().requires_grad_(False)
    indices = torch.randint(0, 5, (9,))
    model_fn = lambda: F.linear(torch.tanh(frozen(embedding(indices))), embedding.weight)
    loss_fn = lambda z: F.cross_entropy(z, indices.flip(0))
    matrix = dense_gauss_newton([embedding.weight], model_fn, loss_fn)
    params = [embedding.weight, frozen.weight, unused.weight]
    u = random_like(params)
    expected = flat(u[:1]) @ matrix @ flat(u[:1])
    found = gauss_newton(model_fn, loss_fn, params, u)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert [p.requires_grad for p in params] == [True, False, True]
