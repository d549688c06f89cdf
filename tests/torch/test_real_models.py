"""Layers and features of real PyTorch models, each against a dense Hessian of a plain twin.

The twin has the same parameters in the same order but is written with elementary operations, so
that forward over reverse can differentiate it and no kernel is shared.
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from cdat_core import tuners
from cdat_torch import CDAT, CompositeLoss, TunedOptimizer, measure
from cdat_torch.kernels import say_once
from cdat_torch.side_effects import random_state, temporary_values, without_side_effects
from tests.torch.models import (
    CLASSES,
    WIDTH,
    Classifier,
    ManualAttention,
    dense_hessian,
    dense_hessian_same_masks,
    flat,
    mlp,
    parameters,
    random_like,
    with_manual_attention,
)

HEADS, LENGTH, BATCH = 2, 5, 4
LossOf = Callable[[nn.Module], Tensor]


class SelfAttention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def encoder_layer(dropout: float) -> nn.Module:
    return nn.TransformerEncoderLayer(
        WIDTH, HEADS, 8, dropout=dropout, activation="gelu", batch_first=True
    )


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype), torch.randint(0, CLASSES, (BATCH,))


def assert_matches(
    model: nn.Module,
    loss: LossOf,
    twin: nn.Module,
    *,
    rtol: float = 1e-10,
    twin_loss: LossOf | None = None,
    curvature: str = "auto",
    seed: int = 3,
) -> None:
    """Compare the curvature of `model` with that of the dense Hessian of `twin`."""
    assert [p.shape for p in model.parameters()] == [p.shape for p in twin.parameters()]
    params = parameters(model)
    u = random_like(params)
    wide = copy.deepcopy(twin).double()
    hessian = dense_hessian_same_masks(wide, twin_loss or loss, seed=seed)
    v = flat(u).double()
    expected, scale = v @ hessian @ v, v.abs() @ hessian.abs() @ v.abs()
    torch.manual_seed(seed)
    found = measure(lambda: loss(model), params, u, curvature=curvature)
    assert found.curvature.dtype == torch.float64
    assert abs(expected) > 1e-3 * scale  # else the comparison would say little
    torch.testing.assert_close(found.curvature, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["attention", "encoder layer"])
def test_attention(kind: str, dropout: float) -> None:
    body = SelfAttention(dropout) if kind == "attention" else encoder_layer(dropout)
    model = Classifier(body).double()
    x, y = data()
    loss = lambda m: F.cross_entropy(m(x), y)
    assert_matches(model, loss, with_manual_attention(model))


def test_an_encoder_in_eval_mode_does_not_take_its_fast_path() -> None:
    encoder = nn.TransformerEncoder(encoder_layer(0.3), 1)
    model = Classifier(encoder).double().eval()
    x, y = data()
    assert torch.backends.mha.get_fastpath_enabled()
    twin = with_manual_attention(model).train()  # training without dropout: never the fast path
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, ManualAttention):
            module.dropout = 0.0

    def loss(m: nn.Module) -> Tensor:
        assert not torch.backends.mha.get_fastpath_enabled()
        return F.cross_entropy(m(x), y)

    plain = lambda m: F.cross_entropy(m(x), y)
    assert_matches(model, loss, twin, twin_loss=plain, curvature="hvp")
    assert_matches(model, plain, twin)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda c: c.__name__)
def test_recurrent_layers(layer: type[nn.Module], dtype: torch.dtype) -> None:
    model = Classifier(layer(WIDTH, 4, 2, batch_first=True, dropout=0.3), 4).to(dtype)
    x, y = data(dtype)
    assert_matches(
        model,
        lambda m: F.cross_entropy(m(x), y),
        model,
        twin_loss=lambda m: F.cross_entropy(m(x.double()), y),
        rtol=1e-10 if dtype == torch.float64 else 1e-4,
    )
    assert torch.backends.mkldnn.enabled


class WeightNormed(nn.Module):
    """A linear layer with its weight written as g v / |v|."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.g = nn.Parameter(torch.rand(WIDTH, 1) + 0.5)
        self.v = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.g * self.v / self.v.square().sum(1, keepdim=True).sqrt(), self.bias)


@pytest.mark.parametrize("old", [True, False])
def test_weight_norm(old: bool) -> None:
    # The double backward of PyTorch's fused kernel is wrong by about ten percent here.
    linear = nn.Linear(WIDTH, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        linear = nn.utils.weight_norm(linear) if old else parametrizations.weight_norm(linear)
    model = Classifier(nn.Sequential(linear, nn.Tanh())).double()
    twin = Classifier(nn.Sequential(WeightNormed(), nn.Tanh())).double()
    twin.load_state_dict(dict(zip(twin.state_dict(), model.state_dict().values(), strict=True)))
    x, y = data()
    assert_matches(model, lambda m: F.cross_entropy(m(x), y), twin)


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, *, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.body = nn.Linear(WIDTH, WIDTH), body
        self.use_reentrant: bool | None = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.use_reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("kind", ["feed forward", "attention", "weight norm"])
def test_activation_checkpointing(kind: str) -> None:
    body = {
        "feed forward": nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(0.3)),
        "attention": encoder_layer(0.3),
        "weight norm": parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    }[kind]
    model = Classifier(
        Checkpointed(body, use_reentrant=False), 8 if kind == "feed forward" else WIDTH
    ).double()
    x, y = data()
    twin = with_manual_attention(model)
    if kind == "weight norm":
        twin.body.body = WeightNormed().double()
        twin.load_state_dict(dict(zip(twin.state_dict(), model.state_dict().values(), strict=True)))
    twin.body.use_reentrant = None
    assert_matches(model, lambda m: F.cross_entropy(m(x), y), twin)


@pytest.mark.parametrize("curvature", ["auto", "finite_difference"])
def test_reentrant_checkpointing_is_refused_with_the_alternative(curvature: str) -> None:
    model = Classifier(Checkpointed(nn.Linear(WIDTH, WIDTH), use_reentrant=True)).double()
    x, y = data()
    params = parameters(model)
    with pytest.raises(RuntimeError, match="pass use_reentrant=False to torch.utils.checkpoint"):
        measure(
            lambda: F.cross_entropy(model(x), y), params, random_like(params), curvature=curvature
        )


def batch_norm_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, CLASSES)
    ).double()


def without_running_statistics(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return twin


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_runs_uncompiled_for_the_second_derivative(backend: str) -> None:
    torch._dynamo.reset()
    compilations = []
    lookup = torch._dynamo.lookup_backend(backend)

    def counting(graph, inputs):  # type: ignore[no-untyped-def]
        compilations.append(graph)
        return lookup(graph, inputs)

    model = batch_norm_network()
    compiled = torch.compile(model, backend=counting)
    x, y = torch.randn(12, WIDTH, dtype=torch.float64), torch.randint(0, CLASSES, (12,))
    loss = lambda m: F.cross_entropy(m(x), y)
    hessian = dense_hessian(without_running_statistics(model), loss)
    params, statistics = parameters(compiled), model[1]
    for step in range(1, 4):
        loss(compiled).backward()  # a step without a measurement
        u = random_like(params)
        found = measure(lambda: loss(compiled), params, u)
        torch.testing.assert_close(found.curvature, flat(u) @ hessian @ flat(u), rtol=1e-10, atol=0)
        assert int(statistics.num_batches_tracked) == 2 * step
    assert len(compilations) == 1
    u = random_like(params)
    expected = flat(u) @ hessian @ flat(u)
    difference = measure(lambda: loss(compiled), params, u, curvature="finite_difference")
    torch.testing.assert_close(difference.curvature, expected, rtol=1e-6, atol=0)
    assert int(statistics.num_batches_tracked) == 7  # buffers of compiled modules are restored too
    composite = CompositeLoss(lambda: compiled(x), lambda z: F.cross_entropy(z, y))
    plain = CompositeLoss(lambda: model(x), lambda z: F.cross_entropy(z, y))
    twins = [measure(c, params, u, curvature="gauss_newton") for c in (composite, plain)]
    torch.testing.assert_close(twins[0].curvature, twins[1].curvature, rtol=1e-10, atol=0)
    assert int(statistics.num_batches_tracked) == 9
    assert len(compilations) == 1


@pytest.mark.parametrize("curvature", ["hvp", "gauss_newton"])
def test_autocast_comes_close_to_float32(curvature: str) -> None:
    model = mlp(6, 32, 3, dtype=torch.float32)
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    params = parameters(model)
    u = random_like(params)
    expected = measure(
        CompositeLoss(lambda: model(x), lambda z: F.cross_entropy(z, y)),
        params,
        u,
        curvature=curvature,
    )

    def low() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    composite = CompositeLoss(low, lambda z: F.cross_entropy(z.float(), y))
    inside = measure(composite, params, u, curvature=curvature)
    with torch.autocast("cpu", torch.bfloat16):  # keeps low-precision copies of the weights
        around = measure(
            CompositeLoss(lambda: model(x), lambda z: F.cross_entropy(z, y)),
            params,
            u,
            curvature=curvature,
        )
    for found in (inside, around):
        assert {field.dtype for field in found[:3]} == {torch.float64}
        # the relative error of bfloat16 that engineering measurements gave
        torch.testing.assert_close(found.curvature, expected.curvature, rtol=5e-2, atol=0)
    assert inside.curvature != expected.curvature


def test_other_values_are_seen_under_autocast() -> None:
    model = mlp(6, 3, dtype=torch.float32)
    x, params = torch.randn(4, 6), parameters(model)
    there = [p.detach() + 1.0 for p in params]
    other = copy.deepcopy(model)
    for p, value in zip(other.parameters(), there, strict=True):
        p.data.copy_(value)
    with torch.autocast("cpu", torch.bfloat16):
        here = model(x)
        with temporary_values(params, there):
            found = model(x)
        torch.testing.assert_close(found, other(x), rtol=0, atol=0)
        torch.testing.assert_close(model(x), here, rtol=0, atol=0)


class Cube(torch.autograd.Function):
    """x**3 with a backward that can be differentiated, decorated for mixed precision."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class OnceCube(Cube):
    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def test_custom_functions() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    u = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    assert float(measure(lambda: Cube.apply(w).sum(), [w], u).curvature) == 12.0
    with pytest.warns(UserWarning, match="OnceCube is marked once_differentiable"):
        found = measure(lambda: OnceCube.apply(w).sum(), [w], u)
    torch.testing.assert_close(float(found.curvature), 12.0, rtol=1e-8, atol=0)
    with pytest.raises(NotImplementedError, match="OnceCube"):
        measure(lambda: OnceCube.apply(w).sum(), [w], u, curvature="hvp")


class OneHot(nn.Module):
    """Embedding or EmbeddingBag as a product with a matrix of counts."""

    def __init__(self, weight: Tensor, indices: Tensor, *, mean: bool, padding: int = -1) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        rows = F.one_hot(indices, len(weight)).to(weight.dtype)
        if padding >= 0:
            rows[..., padding] = 0.0
        self.rows = rows.mean(1) if mean else rows

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ self.weight


def test_embedding_with_a_padding_row() -> None:
    indices, y = torch.randint(0, 7, (BATCH, LENGTH)), torch.randint(0, CLASSES, (BATCH,))
    indices[0, :2] = 2
    model = nn.Sequential(nn.Embedding(7, WIDTH, padding_idx=2), nn.Flatten(), nn.Tanh())
    model.append(nn.Linear(LENGTH * WIDTH, CLASSES)).double()
    twin = copy.deepcopy(model)
    twin[0] = OneHot(model[0].weight, indices, mean=False, padding=2)
    params = parameters(model)
    u = random_like(params)
    u[0][2] = 0.0  # what every base optimizer gives for a row without gradient
    loss = lambda m: F.cross_entropy(m(indices), y)
    expected = flat(u) @ dense_hessian(twin, loss) @ flat(u)
    for method, rtol in (("hvp", 1e-10), ("finite_difference", 1e-6)):
        found = measure(lambda: loss(model), params, u, curvature=method)
        torch.testing.assert_close(found.curvature, expected, rtol=rtol, atol=0)


class Largest(nn.Module):
    """EmbeddingBag with the mode "max"."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, indices: Tensor) -> Tensor:
        return self.weight[indices].amax(1)


def bag_network(mode: str) -> nn.Sequential:
    bag = nn.EmbeddingBag(7, WIDTH, mode=mode)
    return nn.Sequential(bag, nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()


def test_embedding_bag() -> None:
    """PyTorch has no second derivative, but the replay needs none for linear operations."""
    indices, y = torch.randint(0, 7, (BATCH, LENGTH)), torch.randint(0, CLASSES, (BATCH,))
    model = bag_network("mean")
    twin = copy.deepcopy(model)
    twin[0] = OneHot(model[0].weight, indices, mean=True)
    assert_matches(model, lambda m: F.cross_entropy(m(indices), y), twin)


def test_embedding_bag_falls_back_to_finite_differences_with_one_warning() -> None:
    indices, y = torch.randint(0, 7, (BATCH, LENGTH)), torch.randint(0, CLASSES, (BATCH,))
    model = bag_network("max")
    twin = copy.deepcopy(model)
    twin[0] = Largest(model[0].weight)
    with pytest.warns(UserWarning, match="finite differences") as caught:
        assert_matches(model, lambda m: F.cross_entropy(m(indices), y), twin, rtol=1e-6)
    assert len(caught) == 1


def brute_force_ctc(log_probs: Tensor, targets: list[list[int]]) -> Tensor:
    """The sum over all alignments; blank is class 0."""
    losses = []
    length, _, classes = log_probs.shape
    for n, target in enumerate(targets):
        paths = []
        for path in itertools.product(range(classes), repeat=length):
            if [c for c, _ in itertools.groupby(path) if c != 0] == target:
                paths.append(sum(log_probs[t, n, c] for t, c in enumerate(path)))
        losses.append(-torch.logsumexp(torch.stack(paths), 0) / len(target))
    return torch.stack(losses).mean()


def test_ctc_falls_back_to_finite_differences_with_one_warning() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
    x, targets = torch.randn(4, 2, WIDTH, dtype=torch.float64), [[1, 2], [2, 2]]
    scores = lambda m: m(x).log_softmax(-1)
    lengths = torch.tensor([4, 4]), torch.tensor([2, 2])
    with pytest.warns(UserWarning, match="finite differences") as caught:
        assert_matches(
            model,
            lambda m: F.ctc_loss(scores(m), torch.tensor(targets), *lengths),
            model,
            twin_loss=lambda m: brute_force_ctc(scores(m), targets),
            rtol=1e-6,
        )
    assert len(caught) == 1


class Tied(nn.Module):
    """Embedding and head share their weight; one layer is frozen and one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, WIDTH)
        self.frozen, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.free = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(torch.tanh(self.free(torch.tanh(self.frozen(self.embedding(indices))))))


@pytest.mark.parametrize("curvature", ["auto", "finite_difference"])
def test_tied_frozen_and_unused_parameters(curvature: str) -> None:
    model = Tied().double()
    indices = torch.randint(0, 7, (9,))
    loss = lambda m: F.cross_entropy(m(indices), indices.flip(0))
    hessian = dense_hessian(model, loss)
    params = parameters(model)
    u = random_like(params)
    masked = [v if p.requires_grad else torch.zeros_like(v) for p, v in zip(params, u, strict=True)]
    found = measure(lambda: loss(model), params, u, curvature=curvature)
    expected = flat(masked) @ hessian @ flat(masked)
    rtol = 1e-10 if curvature == "auto" else 1e-6
    torch.testing.assert_close(found.curvature, expected, rtol=rtol, atol=0)


class Replacing(nn.Module):
    """A running mean whose buffer is another tensor after each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = x.detach().mean(0) if self.mean is None else 0.9 * self.mean + x.mean(0)
        self.mean = self.mean.detach()
        self.calls = self.calls + 1
        return x


@pytest.mark.parametrize("curvature", ["hvp", "gauss_newton", "finite_difference"])
def test_side_effects_are_those_of_one_forward(curvature: str) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(LENGTH * WIDTH, 7), nn.BatchNorm1d(7), nn.Dropout(0.4), Replacing()
    )
    model.append(nn.Linear(7, CLASSES)).double()
    once = copy.deepcopy(model)
    x, y = data()
    u = random_like(parameters(model))
    model[1].weight.grad = torch.ones_like(model[1].weight)
    grad, before = model[1].weight.grad, [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(5)
    once(x)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    loss = CompositeLoss(lambda: model(x), lambda z: F.cross_entropy(z, y))
    measure(loss, parameters(model), u, curvature=curvature)
    assert torch.equal(torch.get_rng_state(), state)
    expected = dict(once.named_buffers())
    assert {name for name, _ in model.named_buffers()} == set(expected)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert model[1].weight.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert model[1].bias.grad is None


def test_a_buffer_that_did_not_exist_is_gone_again() -> None:
    module = Replacing()
    with without_side_effects([], random_state([])):
        module(torch.ones(2, 3))
        assert module.mean is not None
    assert module.mean is None
    assert float(module.calls) == 0.0


def test_the_change_of_kernels_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    w = torch.ones(2, requires_grad=True)
    with caplog.at_level(logging.INFO, logger="cdat_torch"):
        measure(lambda: (w**2).sum(), [w], [w.detach()], curvature="finite_difference")
        assert not caplog.records
        for _ in range(2):
            measure(lambda: (w**2).sum(), [w], [w.detach()], curvature="hvp")
    assert [r.levelno for r in caplog.records] == [logging.INFO]
    assert "math kernel" in caplog.text


def test_manual_attention_is_attention() -> None:
    model = SelfAttention().double()
    x, _ = data()
    twin = with_manual_attention(model)
    assert isinstance(twin.attention, ManualAttention)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-12, atol=1e-12)


class Shared(nn.Module):
    """Two modules count in a shared buffer."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self.register_buffer("counts", counts)

    def forward(self, x: Tensor) -> Tensor:
        self.counts += 1
        return x


def test_a_shared_buffer_is_put_back_to_its_first_value() -> None:
    counts = torch.zeros(3)
    model = nn.Sequential(Shared(counts), Shared(counts))
    with without_side_effects([], random_state([])):
        model(torch.ones(2))
        assert counts.tolist() == [2.0, 2.0, 2.0]
    assert counts.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.filterwarnings("ignore")  # of the compiler, which sees Python of its own
def test_steps_that_run_compiled_are_compiled_once() -> None:
    """Hooks on all modules would recompile them, so such steps have none."""
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    compiled = torch.compile(model, backend=backend)
    optimizer = TunedOptimizer(torch.optim.SGD(model.parameters()), tuners.constant(0.1))
    x = torch.randn(8, 3)
    for _ in range(3):
        optimizer.step(lambda: compiled(x).square().mean())
        compiled(x)  # outside of a step
    assert len(graphs) == 1


def test_the_warnings_filters_are_as_before_after_a_step():
    """Compiled modules warn about the hook that records buffers; the filter for that is removed."""
    model = torch.compile(nn.Linear(3, 1), backend="eager")
    optimizer = CDAT(torch.optim.SGD(model.parameters()))
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inside = list(warnings.filters)
        optimizer.step(lambda: model(torch.ones(4, 3)).square().mean())
        assert warnings.filters == inside
    assert warnings.filters == before
    assert not caught
