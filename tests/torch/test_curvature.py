"""The measurement against a dense Hessian, operation by operation."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cdat_core
from cdat_torch import CDAT, TensorListSpace, hvp, measure
from tests.torch.models import dense_hessian, flat, mlp, parameters, random_like


class Attention(nn.Module):
    """A causal block of scaled dot-product attention."""

    def __init__(self, width: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = (t.reshape(split).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width)).mean(1)


def block(kind: str) -> tuple[nn.Module, Tensor]:
    x = torch.randn(12, 5, dtype=torch.float64)
    middle = {
        "layer norm": nn.LayerNorm(7),
        "batch norm": nn.BatchNorm1d(7),
        "dropout": nn.Dropout(0.4),
        "group norm": nn.GroupNorm(7, 7, affine=True),
        "gelu": nn.GELU(),
    }
    if kind == "attention":
        return Attention().double(), torch.randn(4, 5, 6, dtype=torch.float64)
    if kind == "convolution":
        head = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten())
        return nn.Sequential(head, nn.Linear(9, 3)).double(), x
    layers = nn.Sequential(nn.Linear(5, 7), middle[kind], nn.Tanh(), nn.Linear(7, 3))
    return layers.double(), x


@pytest.mark.parametrize(
    ("kind", "rtol"),
    [
        ("layer norm", 1e-10),
        ("batch norm", 1e-10),
        ("group norm", 1e-10),
        ("dropout", 1e-10),
        ("gelu", 1e-10),
        ("convolution", 1e-10),
        ("attention", 1e-6),
    ],
)
def test_measurement_matches_a_dense_hessian(kind: str, rtol: float) -> None:
    model, x = block(kind)
    y = torch.randint(0, 3, (len(x),))
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm1d):  # batch statistics; no buffers under torch.func
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    hessian = dense_hessian(reference, lambda m: F.cross_entropy(m(x), y), seed=3)
    params = parameters(model)
    u = random_like(params)

    torch.manual_seed(3)
    measurement = measure(lambda: F.cross_entropy(model(x), y), params, u)

    expected = flat(u) @ hessian @ flat(u)
    scale = (flat(u).abs() @ hessian.abs() @ flat(u).abs()).item()
    assert abs(measurement.curvature - expected) <= rtol * max(abs(expected), 1e-3 * scale)
    torch.manual_seed(3)
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    torch.testing.assert_close(measurement.slope, flat(list(grads)) @ flat(u), rtol=1e-10, atol=0)


def test_digits_network_matches_its_dense_hessian() -> None:
    model = mlp(64, 48, 48, 10)
    x = torch.randn(32, 64, dtype=torch.float64)
    target = F.one_hot(torch.randint(0, 10, (32,)), 10).double()

    def loss(m: nn.Module) -> Tensor:
        return 0.5 * (m(x) - target).square().sum(1).mean()

    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def value(w: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(w.split(sizes), shapes, strict=True)]
        z = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,))
        return 0.5 * (z - target).square().sum(1).mean()

    params = parameters(model)
    w = flat([p.detach() for p in params])
    column = lambda e: torch.func.jvp(torch.func.grad(value), (w,), (e,))[1]
    hessian = torch.func.vmap(column, chunk_size=512)(torch.eye(len(w)).to(w))
    for _ in range(3):
        u = random_like(params)
        measurement = measure(lambda: loss(model), params, u)
        torch.testing.assert_close(
            measurement.curvature, flat(u) @ hessian @ flat(u), rtol=1e-10, atol=0
        )
    product = hvp(lambda: loss(model), params)(u)
    torch.testing.assert_close(flat(list(product)), hessian @ flat(u), rtol=1e-10, atol=1e-12)


def test_finite_differences_match_double_backward_on_a_smooth_network() -> None:
    model, x = mlp(5, 8, 3), torch.randn(20, 5, dtype=torch.float64)
    params = parameters(model)
    u = random_like(params)
    exact = measure(lambda: model(x).square().mean(), params, u, curvature="hvp")
    difference = measure(lambda: model(x).square().mean(), params, u, curvature="finite_difference")
    torch.testing.assert_close(difference.curvature, exact.curvature, rtol=1e-7, atol=0)
    torch.testing.assert_close(difference.slope, exact.slope)


def test_finite_differences_of_a_steep_loss_in_float32() -> None:
    """The slopes are thousands of times their difference: they must not be rounded to float32.

    On a quadratic there is no truncation. What remains is the rounding of the gradients, here
    about 1e-5; inner products in float32 alone gave 1e-3.
    """
    a, b, u = (torch.rand(2**16) for _ in range(3))
    w = torch.randn(2**16, requires_grad=True)
    loss_fn = lambda: (0.5 * a * w**2 + 100 * b * w).sum()
    curvature = measure(loss_fn, [w], [u], curvature="finite_difference").curvature
    torch.testing.assert_close(curvature, (a.double() * u.double() ** 2).sum(), rtol=5e-5, atol=0)


def test_finite_differences_hold_one_copy_of_the_parameters_and_one_gradient() -> None:
    w = torch.randn(2**18, requires_grad=True)
    u, held = [torch.randn(2**18)], []

    def loss_fn() -> Tensor:
        tensors = [t for t in gc.get_objects() if type(t) is Tensor]
        held.append(len({t.data_ptr() for t in tensors if t.numel() == w.numel()} - known))
        return (w**4).sum()

    known = {u[0].data_ptr(), w.data_ptr()}
    measure(loss_fn, [w], u, curvature="finite_difference")
    assert held == [0, 2, 2]


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=str
)
def test_low_precision_is_close_to_float64_and_scalars_stay_wide(
    dtype: torch.dtype, rtol: float
) -> None:
    # The relative errors that engineering measurements of automatic differentiation gave: 1e-4
    # (float32) and 5e-2 (bfloat16). Weights and data are representable in bfloat16.
    model = mlp(6, 16, 3, dtype=torch.bfloat16)
    x = torch.randn(32, 6, dtype=torch.bfloat16)
    u = random_like(parameters(model))
    wide = copy.deepcopy(model).double()
    model = model.to(dtype)
    low = measure(
        lambda: model(x.to(dtype)).float().square().mean(),
        parameters(model),
        [t.to(dtype) for t in u],
    )
    high = measure(
        lambda: wide(x.double()).square().mean(), parameters(wide), [t.double() for t in u]
    )
    assert {field.dtype for field in low[:3]} == {torch.float64}
    torch.testing.assert_close(low.curvature, high.curvature, rtol=rtol, atol=0)


def test_parameters_the_loss_ignores_count_as_constants() -> None:
    used, unused = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    frozen = torch.ones(2, dtype=torch.float64)
    direction = [torch.ones(2, dtype=torch.float64)] * 3
    measurement = measure(lambda: (used**3).sum(), [used, unused, frozen], direction)
    assert [float(field) for field in measurement[:3]] == [2.0, 6.0, 12.0]
    product = hvp(lambda: (used**3).sum(), [used, unused, frozen])(direction)
    assert [t.tolist() for t in product] == [[6.0, 6.0], [0.0, 0.0], [0.0, 0.0]]


def test_a_linear_loss_has_no_curvature() -> None:
    w = torch.ones(2, requires_grad=True)
    assert float(measure(lambda: w.sum(), [w], [torch.ones(2)]).curvature) == 0.0
    assert float(measure(lambda: (w**2).sum(), [w], [torch.zeros(2)]).curvature) == 0.0


class OnceDifferentiable(torch.autograd.Function):
    """The cube, without a second derivative."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def test_auto_falls_back_to_finite_differences_with_one_warning() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    u = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    with pytest.warns(UserWarning, match="finite differences") as caught:
        measurement = measure(lambda: OnceDifferentiable.apply(w).sum(), [w], u)
    assert len(caught) == 1
    torch.testing.assert_close(float(measurement.curvature), 12.0, rtol=1e-8, atol=0)
    assert w.tolist() == [1.0, 2.0]
    with pytest.raises(NotImplementedError, match="OnceDifferentiable is marked"):
        measure(lambda: OnceDifferentiable.apply(w).sum(), [w], u, curvature="hvp")


def test_finite_differences_restore_bits_buffers_and_random_state() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1))
    x = torch.randn(16, 4)
    once = copy.deepcopy(model)
    torch.manual_seed(5)
    once(x)
    after_one_forward = torch.get_rng_state()
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(5)
    measure(
        lambda: model(x).square().mean(),
        parameters(model),
        random_like_without_rng(model),
        curvature="finite_difference",
    )
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for (name, found), expected in zip(model.named_buffers(), once.buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert torch.equal(torch.get_rng_state(), after_one_forward)


class Interrupted(nn.Sequential):
    """A network whose second forward pass, the first of finite differences, fails at its end."""

    def __init__(self, *layers: nn.Module, error: BaseException) -> None:
        super().__init__(*layers)
        self.error, self.calls = error, 0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return y


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_a_displaced_evaluation_leaves_no_trace(error: BaseException) -> None:
    layers = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1)
    model, x = Interrupted(*layers, error=error), torch.randn(16, 4)
    before = copy.deepcopy(model.state_dict())
    params, grads = parameters(model), [torch.randn_like(p) for p in model.parameters()]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    copies = [grad.clone() for grad in grads]
    u = random_like(params)

    def closure() -> Tensor:
        if model.calls:  # what a user's closure may do: it must reach no gradient of the step
            for p in params:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        return model(x).square().mean()

    random_state = torch.get_rng_state()
    with pytest.raises(type(error)):
        measure(closure, params, u, curvature="finite_difference")
    assert model.calls == 2
    for name, found in model.state_dict().items():
        assert torch.equal(found, before[name]), name
    assert torch.equal(torch.get_rng_state(), random_state)
    for p, grad, values in zip(params, grads, copies, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, values)


def random_like_without_rng(model: nn.Module) -> list[Tensor]:
    return [torch.linspace(-1, 1, p.numel()).reshape(p.shape) for p in model.parameters()]


def test_power_iteration_on_a_network_finds_the_dominant_eigenvalue() -> None:
    model, x = mlp(3, 4, 2), torch.randn(10, 3, dtype=torch.float64)
    params = parameters(model)
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(model, lambda m: m(x).square().mean()))
    expected = eigenvalues[eigenvalues.abs().argmax()]
    space = TensorListSpace()
    product = hvp(lambda: model(x).square().mean(), params)
    result = cdat_core.power_iteration(product, random_like(params), num_matvecs=300, space=space)
    torch.testing.assert_close(result.eigenvalue, expected, rtol=1e-8, atol=0)
    assert int(result.num_matvecs) == 300


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda w: None, TypeError, "loss_fn must return the loss as a tensor, got None"),
        (lambda w: w.sum().item(), TypeError, "not loss.item"),
        (lambda w: w**2, ValueError, r"real scalar, got shape \(2,\)"),
        (lambda w: w.sum().detach(), ValueError, "without a graph"),
        (lambda w: torch.ones((), requires_grad=True) * 2, ValueError, "does not depend on any"),
    ],
)
def test_what_a_loss_must_be(loss_fn, error, message) -> None:  # type: ignore[no-untyped-def]
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(error, match=message):
        measure(lambda: loss_fn(w), [w], [torch.ones(2)])


def test_bad_arguments_are_named() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="curvature must be one of .* got 'exact'"):
        measure(lambda: w.sum(), [w], [torch.ones(2)], curvature="exact")
    with pytest.raises(ValueError, match="direction must have the shapes of params"):
        measure(lambda: w.sum(), [w], [torch.ones(3)])
    with pytest.raises(ValueError, match="direction must hold 1 tensors like params, got 2"):
        measure(lambda: w.sum(), [w], [torch.ones(2)] * 2)
    with pytest.raises(ValueError, match="at least one tensor that requires grad"):
        measure(lambda: w.sum(), [torch.ones(2)], [torch.ones(2)])


def test_the_product_refuses_what_it_would_silently_drop() -> None:
    """Behind a linear loss PyTorch raises nothing for a once-differentiable function."""
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="once_differentiable"):
        hvp(lambda: OnceDifferentiable.apply(w).sum(), [w])


def test_the_old_name_of_double_backward_still_works_with_a_warning() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    u = [torch.tensor([0.0, 1.0])]
    with pytest.warns(DeprecationWarning, match='"hessian" is deprecated') as caught:
        old = measure(lambda: (w**3).sum(), [w], u, curvature="hessian")
    assert [warning.filename for warning in caught] == [__file__]
    assert old == measure(lambda: (w**3).sum(), [w], u, curvature="hvp")

    with pytest.warns(DeprecationWarning, match='"hessian" is deprecated') as caught:
        optimizer = CDAT(torch.optim.SGD([w]), curvature="hessian")
    assert [warning.filename for warning in caught] == [__file__]
    optimizer.step(lambda: (w**3).sum())
    assert optimizer.last is not None
    assert optimizer.last.method == "hvp"


def test_the_method_of_the_other_adapter_is_explained() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="got 'forward'; \"forward\" is a method of cdat_jax"):
        measure(lambda: (w**3).sum(), [w], [torch.ones(2)], curvature="forward")


def test_hyperparameters_are_keyword_only() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="positional"):
        CDAT(torch.optim.SGD([w]), 1.9)  # type: ignore[misc]
    with pytest.raises(TypeError, match="sigm"):
        CDAT(torch.optim.SGD([w]), sigm=1.9)
