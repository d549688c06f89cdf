"""Saving and loading: bit-exact, checked before anything changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from cdat_core import linesearch, tuners
from cdat_torch import CDAT, TunedOptimizer
from tests.torch.models import mlp


def make(rule=None, base=torch.optim.Adam, **options):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = mlp(3, 5, 1, dtype=torch.float32)
    # From so few products another start vector gives another sharpness.
    options = {"sharpness_matvecs": 2, **options}
    return model, TunedOptimizer(base(model.parameters()), rule or tuners.cdat(), **options)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    x = torch.linspace(-1, 1, 24).reshape(8, 3)
    return [float(optimizer.step(lambda: (model(x) - 1).square().mean())) for _ in range(steps)]


EDGE = tuners.sharpness_edge(0.5)
RULES = {"cdat": tuners.cdat(), "search": linesearch.backtracking(), "edge": EDGE}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_resume_is_bit_exact(tmp_path: Path, rule, base, every: int) -> None:  # type: ignore[no-untyped-def]
    model, optimizer = make(rule, base, every=every)
    train(model, optimizer, 5)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    expected = train(model, optimizer, 7)

    resumed_model, resumed = make(rule, base, every=every)
    saved = torch.load(path, weights_only=True)
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert train(resumed_model, resumed, 7) == expected
    for p, q in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_tuner_is_stored_as_python_numbers() -> None:
    model, optimizer = make()
    train(model, optimizer, 2)
    group = optimizer.state_dict()["param_groups"][0]
    assert isinstance(group["tuned_lr"], float)
    assert {type(number) for number in group["tuner"]["state"].values()} == {float, int}
    assert isinstance(optimizer.param_groups[0]["tuned_lr"], torch.Tensor)  # live: on the device


def test_another_tuners_state_is_refused_and_changes_nothing() -> None:
    model, optimizer = make()
    train(model, optimizer, 2)
    other_model, other = make(tuners.constant(0.1))
    train(other_model, other, 3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="tuner state"):
        other.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)


def test_a_refused_state_names_its_entry() -> None:
    model, optimizer = make(EDGE)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["exp_avg_sq"] = -torch.ones(5)
    expected = (
        r"state_dict\['state'\]\[1\]\['exp_avg_sq'\] must be .* of shape \(5,\), finite and >= 0"
    )
    with pytest.raises(ValueError, match=expected):
        optimizer.load_state_dict(state)


def test_another_number_of_groups_is_refused() -> None:
    _, optimizer = make()
    state = optimizer.state_dict()
    state["param_groups"] = state["param_groups"] * 2
    with pytest.raises(ValueError, match="must hold 1 parameter groups, got 2"):
        optimizer.load_state_dict(state)


def test_a_state_with_the_tuner_in_some_groups_only_is_refused() -> None:
    def grouped() -> TunedOptimizer:
        params = mlp(3, 5, 1, dtype=torch.float32).parameters()
        return TunedOptimizer(torch.optim.Adam([{"params": [p]} for p in params]), tuners.cdat())

    optimizer, before = grouped(), grouped().state_dict()
    state = copy.deepcopy(before)
    del state["param_groups"][1]["tuner"]
    expected = r"state_dict\['param_groups'\]\[1\]\['tuner'\] is missing, but other groups have it"
    with pytest.raises(ValueError, match=expected):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict() == before


def test_an_unknown_index_is_named() -> None:
    _, optimizer = make()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][7] = {}
    expected = r"keys of state_dict\['state'\] must be parameter indices, got 7"
    with pytest.raises(ValueError, match=expected):
        optimizer.load_state_dict(state)


def test_a_plain_optimizers_state_loads_with_a_cold_tuner() -> None:
    torch.manual_seed(0)
    plain_model = mlp(3, 5, 1, dtype=torch.float32)
    plain = torch.optim.Adam(plain_model.parameters(), lr=0.05)
    plain_model(torch.ones(2, 3)).sum().backward()
    plain.step()
    model, optimizer = make()
    with pytest.warns(UserWarning, match="tuner starts cold"):
        optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert float(optimizer._rule.state.weight) == 0.0
    torch.testing.assert_close(
        [s["exp_avg"] for s in optimizer.state.values()],
        [s["exp_avg"] for s in plain.state.values()],
    )
    assert train(model, optimizer, 3)[-1] > 0


def test_a_plain_optimizers_state_loads_with_a_cold_eigenvector() -> None:
    """One product from the old vector would be far off; twenty from a new one are not."""
    model, optimizer = make(EDGE, sharpness_matvecs=1)
    train(model, optimizer, 3)
    other_model, other = make(EDGE, sharpness_matvecs=1)
    plain = torch.optim.Adam(mlp(3, 5, 1).parameters())
    with pytest.warns(UserWarning, match="tuner starts cold"):
        other.load_state_dict(plain.state_dict())
    other_model.load_state_dict(model.state_dict())
    other.base.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    train(model, optimizer, 1)
    train(other_model, other, 1)
    assert float(optimizer.last.sharpness) < 0.99 * float(other.last.sharpness)


def test_the_eigenvector_is_no_state_of_the_base() -> None:
    model, optimizer = make(EDGE)
    blank = copy.deepcopy(optimizer.state_dict())
    assert not optimizer.state  # where Adam looks whether it has to begin
    train(model, optimizer, 2)
    names = {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state_dict()["state"][0]) == names | {"sharpness_vector"}
    assert all(set(state) == names for state in optimizer.state.values())
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(set(state) == names for state in optimizer.state.values())
    _, other = make(tuners.constant(0.1))
    other.load_state_dict(optimizer.state_dict())  # a rule that has no use for it
    assert all(set(state) == names for state in other.state.values())
    optimizer.load_state_dict(blank)
    assert not optimizer.state
    assert train(model, optimizer, 1)[0] > 0


def test_a_deep_copy_trains_on_its_own() -> None:
    model, optimizer = make(EDGE)
    train(model, optimizer, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert isinstance(twin, TunedOptimizer)
    assert twin.param_groups[0]["params"][0] is next(twin_model.parameters())
    assert train(twin_model, twin, 3) == train(model, optimizer, 3)


def test_cdat_is_a_preset() -> None:
    model, optimizer = make(tuners.cdat(1.5, 0.8))
    preset_model = mlp(3, 5, 1, dtype=torch.float32)
    preset_model.load_state_dict(model.state_dict())
    preset = CDAT(torch.optim.Adam(preset_model.parameters()), sigma=1.5, decay=0.8)
    assert train(preset_model, preset, 4) == train(model, optimizer, 4)


def _set(path, value):
    """Return a function that changes one entry of a state_dict."""

    def change(state_dict):
        *first, last = path
        at = state_dict
        for key in first:
            at = at[key]
        at[last] = value

    return change


GROUP, VECTOR = ("param_groups", 0), "sharpness_vector"


def both():  # type: ignore[no-untyped-def]
    """CDAT that needs the sharpness too, for a state with everything in it."""
    tuner = tuners.cdat(1.0)
    return tuner._replace(needs=tuner.needs | {"sharpness"})


SPOILT = {
    "NaN average": _set((*GROUP, "tuner", "state", "numerator"), float("nan")),
    "negative average": _set((*GROUP, "tuner", "state", "denominator"), -1.0),
    "string": _set((*GROUP, "tuner", "state", "rate"), "0.1"),
    "negative count": _set((*GROUP, "tuner", "skipped"), -1),
    "infinite multiplier": _set((*GROUP, "lr"), float("inf")),
    "negative rate": _set((*GROUP, "tuned_lr"), -0.1),
    "tuner without a field": _set((*GROUP, "tuner"), {"state": None}),
    "NaN moment": _set(("state", 0, "exp_avg"), torch.full((4, 3), torch.nan).double()),
    "moment of another shape": _set(("state", 0, "exp_avg"), torch.zeros(3, 4).double()),
    "state that is a string": _set(("state", 0, "exp_avg"), "zeros"),
    "unknown parameter": _set(("state", 17), {}),
    "infinite eigenvector": _set(("state", 0, VECTOR), torch.full((4, 3), torch.inf).double()),
    "eigenvector of another shape": _set(("state", 3, VECTOR), torch.zeros(2).double()),
    "eigenvector that is a number": _set(("state", 0, VECTOR), 1.0),
    "negative second moment": _set(("state", 0, "exp_avg_sq"), -torch.ones(4, 3).double()),
    "negative number of steps": _set(("state", 0, "step"), torch.tensor(-1.0)),
    "NaN number of steps": _set(("state", 0, "step"), float("nan")),
    "no number of steps": _set(("state", 0, "step"), None),
    "list of steps": _set(("state", 0, "step"), [3.0]),
    "steps of another shape": _set(("state", 0, "step"), torch.ones(7)),
    "moment in a list": _set(("state", 0, "exp_avg"), [0.0]),
    "state in a list": _set(("state",), []),
    "no groups": _set(("param_groups",), None),
    "group that is a number": _set(GROUP, 1.0),
    "group without parameters": _set((*GROUP, "params"), None),
    "NaN decay": _set((*GROUP, "betas"), (0.9, float("nan"))),
    "string decay": _set((*GROUP, "betas"), ("0.9", 0.999)),
    "one decay": _set((*GROUP, "betas"), (0.9,)),
    "infinite eps": _set((*GROUP, "eps"), float("inf")),
    "multiplier that is a flag": _set((*GROUP, "lr"), True),
    "no rate": lambda state_dict: state_dict["param_groups"][0].pop("tuned_lr"),
    "no eigenvector but its name": _set(("state", 0, VECTOR), None),
    "tuner that is a number": _set((*GROUP, "tuner"), 0.1),
    "tuner state that is a number": _set((*GROUP, "tuner", "state"), 0.1),
}


@pytest.mark.parametrize("steps", [0, 2], ids=["a fresh optimizer", "after steps"])
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_state_is_refused_and_nothing_changes(spoil, steps: int) -> None:  # type: ignore[no-untyped-def]
    def trained(steps: int) -> TunedOptimizer:
        model, x = mlp(3, 4, 1), torch.randn(8, 3, dtype=torch.float64)
        optimizer = TunedOptimizer(torch.optim.Adam(model.parameters()), both())
        for _ in range(steps):
            optimizer.step(lambda: model(x).square().mean())
        return optimizer

    state_dict, optimizer = copy.deepcopy(trained(3).state_dict()), trained(steps)
    before = copy.deepcopy(optimizer.state_dict())
    spoil(state_dict)
    with pytest.raises(ValueError, match="state_dict"):
        optimizer.load_state_dict(state_dict)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    optimizer.load_state_dict(before)


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("rule", [tuners.cdat(1.0), EDGE], ids=["cdat", "edge"])
def test_distributed_checkpointing_resumes_bit_for_bit(tmp_path: Path, rule, base) -> None:  # type: ignore[no-untyped-def]
    """It creates the state of a new optimizer by a step with zero gradients at rate 0."""
    x = torch.randn(8, 3)

    def run(model, optimizer):  # type: ignore[no-untyped-def]
        return [float(optimizer.step(lambda: model(x).square().mean())) for _ in range(5)]

    model, optimizer = make(rule, base)
    run(model, optimizer)
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(saved, checkpoint_id=tmp_path)
    expected = run(model, optimizer)

    again, other = make(rule, base)
    before = [p.detach().clone() for p in again.parameters()]
    blank = dict(zip(("model", "optimizer"), get_state_dict(again, other), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), before, strict=True))
    dcp.load(blank, checkpoint_id=tmp_path)
    set_state_dict(
        again, other, model_state_dict=blank["model"], optim_state_dict=blank["optimizer"]
    )
    assert run(again, other) == expected


def test_a_search_needs_its_entry_of_the_tuner_too() -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer = TunedOptimizer(torch.optim.SGD([w]), linesearch.backtracking())
    optimizer.step(lambda: w.square().sum())
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["tuner"]["state"]
    with pytest.raises(ValueError, match=r"\['tuner'\]\['state'\] is missing"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_numbers_may_come_as_tensors(shape: tuple[int, ...]) -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = CDAT(torch.optim.SGD([w]), sigma=0.5)
    optimizer.step(lambda: w.square().sum())
    saved = optimizer.state_dict()
    tuner = saved["param_groups"][0]["tuner"]
    tensors = {
        name: torch.full(shape, number, dtype=torch.float64)
        for name, number in tuner["state"].items()
    }
    saved["param_groups"][0]["tuner"] = {
        "state": tensors,
        "skipped": torch.full(shape, 2),
        "step": torch.full(shape, 1),
        "due": torch.full(shape, 0),
        "averaged_steps": torch.full(shape, 0),
    }
    optimizer.load_state_dict(saved)
    loaded = optimizer.state_dict()["param_groups"][0]["tuner"]
    assert loaded == {**tuner, "skipped": 2}
