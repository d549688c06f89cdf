"""Every optimizer of ``torch.optim``: a constant rate gives the steps of the bare optimizer.

The cases are made from the classes of ``torch.optim`` and the arguments of their constructors, so a
class or an option that a later PyTorch adds fails here until somebody has looked at it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from cdat_core import tuners
from cdat_torch import CDAT, TunedOptimizer
from cdat_torch.base import base_step, fused_adam, groups
from cdat_torch.base.direction import base_direction
from cdat_torch.step import rate
from tests.torch.models import mlp

STEPS = 10
LR = 0.02
DEFAULT = 0.4
"""The lr of the wrapped optimizer; it must not matter."""
TOLERANCE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}
"""Float64; ``rate * u`` and ``lr * step`` round differently."""

REFUSED = {
    "LBFGS": "choose step lengths itself",
    "ASGD": "average the points it steps to",  # and its rate decreases by a law of its own
    "SparseAdam": "need sparse gradients",
}

VARIED: dict[str, tuple[Any, ...]] = {
    "weight_decay": (0.1,),
    "decoupled_weight_decay": (True,),
    "momentum": (0.9,),
    "nesterov": (True,),
    "dampening": (0.3,),
    "amsgrad": (True,),
    "centered": (True,),
    "maximize": (True,),
    "foreach": (True, False),
    "fused": (True, False),
    "lr_decay": (0.1,),
    "betas": ((0.5, 0.7),),
    "beta2_decay": (-0.5,),
    "d": (2.0,),
    "etas": ((0.3, 1.5),),
    "momentum_decay": (0.1,),
    "adjust_lr_fn": ("match_rms_adamw",),
    "initial_accumulator_value": (0.5,),
    "rho": (0.5,),
    "alpha": (0.5,),
    "eps": (),  # a tuple for some; nothing but a number in a formula
    "ns_coefficients": (),
    "ns_steps": (3,),
    "step_sizes": (),  # in units of the tuned rate: a test of its own
    "capturable": (),  # for CUDA graphs
    "differentiable": (),  # keeps the graph of the step, which has no use here
}


def classes() -> dict[str, type[Optimizer]]:
    """The optimizers that ``torch.optim`` exports."""
    found = {name: c for name, c in vars(torch.optim).items() if inspect.isclass(c)}
    return {name: c for name, c in found.items() if issubclass(c, Optimizer) and c is not Optimizer}


def options(c: type[Optimizer]) -> list[str]:
    return [name for name in inspect.signature(c).parameters if name not in {"params", "lr"}]


def cases() -> list[Any]:
    """Each option alone, each with weight decay, and options that need each other."""
    made = []
    for name, c in classes().items():
        if name in REFUSED:
            continue
        known = options(c)
        variants: list[dict[str, Any]] = [{}]
        for option in known:
            for value in VARIED.get(option, ()):
                variant = {option: value}
                if option in {"nesterov", "dampening"} and name == "SGD":
                    variant["momentum"] = 0.9
                variants.append(variant)
                if "weight_decay" in known and option != "weight_decay":
                    variants.append({**variant, "weight_decay": 0.1})
        if {"amsgrad", "maximize", "fused"} <= set(known):
            variants.append({"amsgrad": True, "maximize": True, "fused": True, "weight_decay": 0.1})
        if {"decoupled_weight_decay", "maximize"} <= set(known):
            variants.append({"decoupled_weight_decay": True, "maximize": True, "weight_decay": 0.1})
        for variant in variants:
            label = ", ".join(f"{option}={value}" for option, value in variant.items())
            made.append(pytest.param(c, variant, id=f"{name}({label})"))
    return made


every_case = pytest.mark.parametrize(("c", "chosen"), cases())
DENSE = [pytest.param(c, id=name) for name, c in classes().items() if name not in REFUSED]


def parts(c: type[Optimizer], model: nn.Sequential) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters in two groups; Muon takes matrices only."""
    first, second = list(model[0].parameters()), list(model[2].parameters())
    if c.__name__ == "Muon":
        return [p for p in first if p.ndim == 2], [p for p in second if p.ndim == 2]
    return first, second


class Pair:
    """The same model twice, one under a bare optimizer, one under a wrapped one."""

    def __init__(self) -> None:
        self.x = torch.randn(20, 5, dtype=torch.float64)
        self.y = torch.randn(20, 2, dtype=torch.float64)
        self.bare_model, self.model = mlp(5, 8, 2), mlp(5, 8, 2)
        self.model.load_state_dict(self.bare_model.state_dict())

    def loss(self, model: nn.Module) -> Tensor:
        return (model(self.x) - self.y).square().mean()

    def bare_step(self, bare: Optimizer) -> None:
        self.bare_model.zero_grad()
        self.loss(self.bare_model).backward()
        bare.step()

    def run(self, bare: Optimizer, tuned: TunedOptimizer, steps: int = STEPS) -> None:
        start = [p.detach().clone() for p in self.model.parameters()]
        for _ in range(steps):
            self.bare_step(bare)
            tuned.step(lambda: self.loss(self.model))
            self.check()
        moved = [p for p, q in zip(self.model.parameters(), start, strict=True) if (p != q).any()]
        assert len(moved) >= 2

    def check(self) -> None:
        for p, expected in zip(self.model.parameters(), self.bare_model.parameters(), strict=True):
            torch.testing.assert_close(p, expected, **TOLERANCE)


def test_every_class_is_listed() -> None:
    listed = {case.id for case in DENSE} | set(REFUSED)
    assert set(classes()) == listed
    assert {"SGD", "Adam", "Adafactor", "Rprop"} <= {case.id for case in DENSE}


@pytest.mark.parametrize("c", DENSE)
def test_every_option_is_listed(c: type[Optimizer]) -> None:
    assert set(options(c)) <= set(VARIED), "look at the new option and list it in VARIED"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_wrapped_is_refused(name: str) -> None:
    w = torch.ones(3, requires_grad=True)
    base = classes()[name]([w])
    before = {key: value for key, value in base.param_groups[0].items() if key != "params"}
    with pytest.raises(TypeError, match=f"base must not {REFUSED[name]}, got {name}; wrap "):
        TunedOptimizer(base, tuners.constant(0.1))
    after = {key: value for key, value in base.param_groups[0].items() if key != "params"}
    assert after == before


@every_case
def test_a_constant_rate_is_the_bare_optimizer(
    c: Callable[..., Optimizer], chosen: dict[str, Any]
) -> None:
    pair = Pair()
    bare_params, params = (
        [p for part in parts(c, model) for p in part] for model in (pair.bare_model, pair.model)
    )
    bare = c(bare_params, lr=LR, **chosen)
    tuned = TunedOptimizer(c(params, lr=DEFAULT, **chosen), tuners.constant(LR))
    pair.run(bare, tuned)


@pytest.mark.parametrize("c", DENSE)
def test_groups_keep_their_ratio_of_learning_rates(c: type[Optimizer]) -> None:
    pair = Pair()
    decay = {"weight_decay": 0.2} if "weight_decay" in options(c) else {}

    def made(model: nn.Sequential, lr: float) -> Optimizer:
        first, second = parts(c, model)
        groups = [{"params": first}, {"params": second, "lr": lr / 4, **decay}]
        return c(groups, lr=lr)  # type: ignore[call-arg]

    tuned = TunedOptimizer(made(pair.model, DEFAULT), tuners.constant(LR))
    assert [group["lr"] for group in tuned.param_groups] == [1.0, 0.25]
    pair.run(made(pair.bare_model, LR), tuned)


def schedule(optimizer: Optimizer) -> SequentialLR:
    """Warm-up over four steps, then a cosine over six."""
    warm_up = LinearLR(optimizer, start_factor=0.25, total_iters=4)
    cosine = CosineAnnealingLR(optimizer, T_max=6, eta_min=0.0)
    return SequentialLR(optimizer, [warm_up, cosine], milestones=[4])


# Rprop reads its learning rate in the first step only, so a scheduler does nothing to the bare one.
@pytest.mark.parametrize("c", [case for case in DENSE if case.id != "Rprop"])
def test_a_scheduler_drives_the_multiplier(c: type[Optimizer]) -> None:
    pair = Pair()

    def made(model: nn.Sequential, lr: float) -> Optimizer:
        first, second = parts(c, model)
        groups = [{"params": first}, {"params": second, "lr": lr / 2}]
        return c(groups, lr=lr)  # type: ignore[call-arg]

    bare = made(pair.bare_model, LR)
    tuned = TunedOptimizer(made(pair.model, DEFAULT), tuners.constant(LR))
    schedules = schedule(bare), schedule(tuned)
    seen = []
    for _ in range(STEPS):
        pair.bare_step(bare)
        tuned.step(lambda: pair.loss(pair.model))
        pair.check()
        for scheduler in schedules:
            scheduler.step()
        multipliers = [group["lr"] for group in tuned.param_groups]
        expected = [group["lr"] / LR for group in bare.param_groups]
        assert multipliers == pytest.approx(expected, rel=1e-13, abs=1e-15)
        assert float(tuned.param_groups[0]["tuned_lr"]) == LR
        seen.append(multipliers[0])
    # 1/4 to 1 in four steps, then half a period of the cosine in six
    assert seen == pytest.approx(
        [0.4375, 0.625, 0.8125, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873, 0.0], abs=1e-7
    )


def test_a_tensor_as_learning_rate_of_the_base() -> None:
    pair = Pair()
    bare = torch.optim.Adam(pair.bare_model.parameters(), lr=LR)
    base = torch.optim.Adam(pair.model.parameters(), lr=torch.tensor(DEFAULT))
    pair.run(bare, TunedOptimizer(base, tuners.constant(LR)))


def test_adafactor_leaves_the_limit_of_its_rate_to_the_tuner() -> None:
    # The bare one uses min(lr, 1 / sqrt(step)): from the fifth step on lr = 0.5 is above.
    pair, lr = Pair(), 0.5
    bare = torch.optim.Adafactor(pair.bare_model.parameters(), lr=lr)
    tuned = TunedOptimizer(torch.optim.Adafactor(pair.model.parameters()), tuners.constant(lr))
    pair.run(bare, tuned, steps=4)
    start = [p.detach().clone() for p in pair.model.parameters()]
    pair.bare_step(bare)
    tuned.step(lambda: pair.loss(pair.model))
    models = pair.model.parameters(), pair.bare_model.parameters(), start
    for p, limited, before in zip(*models, strict=True):
        torch.testing.assert_close(
            (p - before) / lr, (limited - before) * 5**0.5, rtol=1e-10, atol=1e-12
        )


def test_the_bounds_of_rprop_are_in_units_of_the_rate() -> None:
    pair = Pair()
    bounds = (0.5 * LR, 1.5 * LR)
    bare = torch.optim.Rprop(pair.bare_model.parameters(), lr=LR, step_sizes=bounds)
    base = torch.optim.Rprop(pair.model.parameters(), step_sizes=(0.5, 1.5))
    pair.run(bare, TunedOptimizer(base, tuners.constant(LR)))
    sizes = torch.cat([state["step_size"].flatten() for state in bare.state.values()])
    assert bool((sizes == bounds[0]).any())
    assert bool((sizes == bounds[1]).any())


@pytest.mark.laws
@every_case
@pytest.mark.parametrize("hooked", [False, True])
def test_the_state_is_that_of_the_bare_optimizer_and_of_good_steps_only(
    c: Callable[..., Optimizer],
    chosen: dict[str, Any],
    hooked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, whether the base steps twice, part by part, or once with a copy of its state.

    Where Adam leaves its implementation open, all counting steps but the first are those of the
    fused kernel.
    """
    monkeypatch.setattr(base_step, "_SMALL", 5)
    monkeypatch.setattr(fused_adam, "_CHUNK", 5)
    adam = c in (torch.optim.Adam, torch.optim.AdamW)
    left_open = adam and not {"fused", "foreach"} & set(chosen) and not hooked
    params = [torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4), (2, 3), (4, 4))]
    params = [p.requires_grad_() for p in params]
    bare_params = [p.detach().clone().requires_grad_() for p in params]
    bare = c(bare_params, lr=1.0, **chosen)
    base = c(params, **chosen)
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    if hooked:
        base.register_step_post_hook(count)
    tuned = CDAT(base, max_learning_rate=1e-2, initial_learning_rate=1e-2)

    def loss() -> Tensor:
        return sum(((p - 0.3) ** 4).sum() for p in params)  # type: ignore[return-value]

    for good in (False, True, True, False, True, True):
        before = [p.detach().clone() for p in params]
        # |x| ** 1.5 at zero: no value, no gradient, an infinite curvature
        kink = lambda at=before[1][0, 0]: (params[1][0, 0] - at).abs() ** 1.5
        tuned.step(loss if good else lambda: loss() + kink())  # noqa: B023
        assert bool(torch.isfinite(tuned.last.curvature)) == good
        assert good or all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        if good:
            for q, b in zip(bare_params, before, strict=True):
                q.detach().copy_(b)
                q.grad = 4 * (b - 0.3) ** 3
            bare.step()
            for group in bare.param_groups if left_open else ():
                group["fused"] = True
        assert len(base.state) == len(bare.state)
        for p, q in zip(params, bare_params, strict=True):
            torch.testing.assert_close(dict(base.state[p]), dict(bare.state[q]), rtol=0, atol=0)
    assert steps == (6 if hooked else 0)


@pytest.mark.laws
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_that_is_rehearsed_in_pieces_has_the_direction_of_the_whole(
    c: Callable[..., Optimizer],
    chosen: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also for parameters that are not contiguous, and with fused kernels."""
    if c is torch.optim.SGD and chosen.get("fused") and dtype is torch.bfloat16:
        pytest.skip("on a CPU PyTorch's fused SGD does not move 16 numbers in bfloat16, but 15")
    monkeypatch.setattr(base_step, "_SMALL", 5)
    monkeypatch.setattr(fused_adam, "_CHUNK", 5)
    shapes = ((3, 4), (2, 3), (4, 4))
    params = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    params = [p.requires_grad_() for p in (*params, torch.randn(4, 3, dtype=dtype).t().detach())]
    twins = [p.detach().clone().requires_grad_() for p in params]
    base, whole = c(params, **chosen), c(twins, **chosen)
    for group in (*base.param_groups, *whole.param_groups):
        groups.adopt(group, 1.0, torch.tensor(0.0))
    settings = copy.deepcopy([{**group, "params": None} for group in base.param_groups])
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        step = base_step.BaseStep(base, params)
        held = base_step.BaseStep(whole, twins, needs_state=True)
        rtol = 1e-12 if dtype is torch.float64 else 2**-6  # fused kernels round weight decay less
        torch.testing.assert_close(step.direction, held.direction, rtol=rtol, atol=rtol)
        with torch.no_grad():
            step.commit(torch.tensor(0.0), skip=torch.tensor(False))
    assert [{**group, "params": None} for group in base.param_groups] == settings
    assert [p for group in base.param_groups for p in group["params"]] == params


@pytest.mark.laws
@every_case
def test_steps_that_hold_the_rate_are_those_along_the_direction(
    c: Callable[..., Optimizer], chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a multiplier of a scheduler, and beside a frozen parameter with an old gradient."""

    def trained() -> list[Tensor]:
        torch.manual_seed(0)
        params = [torch.randn(4, 3, dtype=torch.float64).requires_grad_() for _ in range(2)]
        params[1].grad = torch.ones_like(params[1])
        params[1].requires_grad = False
        base = c(params, **chosen)
        tuned = CDAT(base, max_learning_rate=1e-2, initial_learning_rate=1e-2, every=3)
        for step in range(7):
            tuned.param_groups[0]["lr"] = 1.0 / (1 + step)
            if step == 4:
                params[1].grad = None
            gradient = 4 * (params[0].detach() - 0.3) ** 3
            tuned.step(lambda: ((params[0] - 0.3) ** 4).sum())
            torch.testing.assert_close(params[0].grad, gradient)
            assert (tuned.last.curvature is None) == bool(step % 3)
            assert tuned.param_groups[0]["lr"] == 1.0 / (1 + step)
        return [p.detach() for p in params]

    found = trained()
    monkeypatch.setattr(rate, "can_step_without_direction", lambda base: False)
    torch.testing.assert_close(found, trained(), rtol=1e-12, atol=1e-14)


# Adafactor reads the parameters, and its direction is a difference, which rounds.
@pytest.mark.parametrize("c", [case for case in DENSE if case.id != "Adafactor"])
def test_large_parameters_in_bfloat16_do_not_round_the_direction(c: type[Optimizer]) -> None:
    gradient = torch.randn(4, 3).bfloat16()
    directions = []
    for dtype in (torch.bfloat16, torch.float64):
        w = torch.full((4, 3), 1e4, dtype=dtype, requires_grad=True)
        w.grad = gradient.to(dtype)
        base = c([w], weight_decay=0.0) if "weight_decay" in options(c) else c([w])  # type: ignore[call-arg]
        directions.append(base_direction(base, [w])[0].double())
    largest = float(directions[1].abs().max())
    assert 0 < largest < 10  # far below 64, the spacing of bfloat16 at 1e4
    torch.testing.assert_close(directions[0], directions[1], rtol=0.03, atol=0.03 * largest)


def wrapped(
    c: Callable[..., Optimizer], chosen: dict[str, Any], model: nn.Sequential
) -> TunedOptimizer:
    params = [p for part in parts(c, model) for p in part]
    return TunedOptimizer(c(params, **chosen), tuners.cdat(1.0, max_learning_rate=LR))


@pytest.mark.laws
@every_case
def test_a_checkpoint_goes_on_in_a_new_optimizer(
    c: Callable[..., Optimizer], chosen: dict[str, Any]
) -> None:
    """What the checks of a state refuse is not the state of any optimizer.

    In float32, to which PyTorch casts all of a state that it loads: NAdam keeps a product in it.
    """
    pair = Pair()
    pair.model.float()
    pair.x, pair.y = pair.x.float(), pair.y.float()
    optimizer = wrapped(c, chosen, pair.model)
    for _ in range(2):
        optimizer.step(lambda: pair.loss(pair.model))
    again = copy.deepcopy(pair.model)
    resumed = wrapped(c, chosen, again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        optimizer.step(lambda: pair.loss(pair.model))
        resumed.step(lambda: pair.loss(again))
    for p, q in zip(pair.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.laws
@every_case
def test_the_step_of_distributed_checkpointing_moves_nothing(
    c: Callable[..., Optimizer], chosen: dict[str, Any]
) -> None:
    """It has zero gradients and rate 0; its purpose is to create the state."""
    model = mlp(5, 8, 2)
    optimizer = wrapped(c, chosen, model)
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.last is None
    assert float(optimizer.param_groups[0]["tuned_lr"]) == 0.0
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step(lambda: model(torch.ones(3, 5, dtype=torch.float64)).square().mean())
    assert int(optimizer.last.skipped) == 0
