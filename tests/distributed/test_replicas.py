"""Replicas in several processes: all take the step of the whole batch."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cdat_core import linesearch, tuners
from cdat_torch import CDAT, TunedOptimizer
from tests.distributed.workers import run

pytestmark = pytest.mark.timeout(300)  # several processes, each of which imports torch
STEPS = 5
RULES = {
    "cdat": tuners.cdat(1.0),
    "gen": tuners.gen(),
    "edge": tuners.sharpness_edge(1.0),
    "polyak": tuners.polyak(max_learning_rate=0.1),
    "zoom": linesearch.zoom(),
    "backtracking": linesearch.backtracking(),
}


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(24, 4, dtype=torch.float64), torch.randint(0, 3, (24,))


def numbers(model, optimizer):
    """The parameters and the last measurement, which must agree, as plain numbers."""
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return flat.tolist(), [optimizer.last.as_dict()]


def share(tensor, rank, size, sizes=None):
    sizes = [len(tensor) // size] * size if sizes is None else sizes
    return tensor.split(sizes)[rank]


def train(rank, size, rule, *, wrapped=False, form="closure", sizes=None, curvature="auto"):
    model, x, y = problem()
    net = DistributedDataParallel(model) if wrapped and size > 1 else model
    base = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    optimizer = TunedOptimizer(base, RULES[rule], curvature=curvature)
    inputs, labels = share(x, rank, size, sizes), share(y, rank, size, sizes)
    weight = len(inputs) * size / len(x)
    for _ in range(STEPS):
        if form == "closure":
            optimizer.step(lambda: weight * F.cross_entropy(net(inputs), labels))
            continue
        optimizer.zero_grad()
        parts = 2 if form == "accumulation" else 1
        for k, (a, b) in enumerate(zip(inputs.chunk(parts), labels.chunk(parts), strict=True)):
            loss = weight * F.cross_entropy(net(a), b, reduction="sum") / len(inputs)
            optimizer.backward(loss, sync=k == parts - 1)
        optimizer.step()
    return numbers(model, optimizer)


def faulty(rank, size, where, rule="cdat"):
    model, x, y = problem()
    base = torch.optim.Adam(model.parameters())
    optimizer = TunedOptimizer(base, RULES[rule])
    inputs, labels = share(x, rank, size), share(y, rank, size)
    good = lambda: F.cross_entropy(model(inputs), labels)
    kink = lambda: (model[0].bias[0] - model[0].bias[0].detach()).abs()
    broken = {
        "loss": lambda: good() * torch.nan,
        "gradient": lambda: good() + kink() ** 0.5,
        "curvature": lambda: good() + kink() ** 1.5,
    }[where]
    optimizer.step(good)
    before = [p.detach().clone() for p in model.parameters()]
    averages = optimizer._rule.state._replace(skipped=0)
    state = [s["exp_avg"].clone() for s in optimizer.state.values()]
    optimizer.step(broken if rank == 1 else good)
    same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    same = same and all(
        torch.equal(s["exp_avg"], t) for s, t in zip(optimizer.state.values(), state, strict=True)
    )
    same = same and averages == optimizer._rule.state._replace(skipped=0)
    skipped = int(optimizer.last.skipped)
    optimizer.step(good)
    return same, skipped, float(optimizer.last.learning_rate), int(optimizer.last.skipped)


class Routed(nn.Module):
    """Each process may use another expert."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x, expert):
        return self.shared(x) + torch.tanh(self.experts[expert](x))


def routed(rank, size):
    torch.manual_seed(0)
    model, (_, x, y) = Routed().double(), problem()
    optimizer = CDAT(torch.optim.SGD(model.parameters(), lr=1.0), sigma=1.0, decay=0.0)
    if size == 1:
        half = len(x) // 2
        first = lambda: F.cross_entropy(model(x[:half], 0), y[:half])
        closure = lambda: (first() + F.cross_entropy(model(x[half:], 1), y[half:])) / 2
    else:
        closure = lambda: F.cross_entropy(model(share(x, rank, 2), rank), share(y, rank, 2))
    optimizer.step(closure)
    unused = model.experts[2].weight.grad is None
    return *numbers(model, optimizer), unused


def alone(rank, size):
    model, x, y = problem()
    optimizer = CDAT(torch.optim.SGD(model.parameters(), lr=1.0), process_group=False)
    part = share(x, rank, size), share(y, rank, size)
    optimizer.step(lambda: F.cross_entropy(model(part[0]), part[1]))
    return numbers(model, optimizer)


def forgetful(rank, size):
    model, x, y = problem()
    optimizer = CDAT(torch.optim.SGD(model.parameters(), lr=1.0))
    optimizer.backward(F.cross_entropy(model(x), y), sync=False)
    with pytest.raises(RuntimeError, match="sync=True"):
        optimizer.step()
    return True


class Mortal(torch.optim.Adam):
    """It ends its process in the step once `doomed` is set."""

    doomed = False

    def step(self, closure=None):
        if self.doomed:
            os._exit(9)
        return super().step(closure)


def dying(rank, size, where):
    """Rank 1 dies before its step, in the step of its base, or in the second closure call."""
    model, x, y = problem()
    model = nn.Sequential(model, nn.Dropout(0.1), nn.BatchNorm1d(3)).double()
    rule = RULES["zoom"] if where == "trial" else RULES["cdat"]
    # With every=2 the next step holds the rate.
    optimizer = TunedOptimizer(Mortal(model.parameters()), rule, every=2)
    inputs, labels = share(x, rank, size), share(y, rank, size)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        if rank == 1 and where == "trial" and calls == 2:
            os._exit(9)
        return F.cross_entropy(model(inputs), labels)

    torch.manual_seed(rank)
    if where != "trial":
        optimizer.step(closure)
    look = lambda: copy.deepcopy(
        (
            model.state_dict(),
            [p.grad for p in model.parameters()],
            [optimizer.state[p] for p in model.parameters() if p in optimizer.state],
            torch.get_rng_state(),
            optimizer._rule.state,
        )
    )
    before = look()
    if rank == 1 and where == "gradient":
        os._exit(9)
    optimizer.base.doomed = rank == 1 and where == "base"
    with pytest.raises(RuntimeError):
        optimizer.step(closure)
    torch.testing.assert_close(look(), before, rtol=0, atol=0)
    return True


def too_many(rank, size):
    model, x, y = problem()
    optimizer = CDAT(torch.optim.SGD(model.parameters()), max_consecutive_skips=2)
    scale = torch.nan if rank == 1 else 1.0
    closure = lambda: F.cross_entropy(model(x), y) * scale
    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="2 steps in a row were skipped"):
        optimizer.step(closure)
    return True


# Starting processes takes seconds, so each set of processes runs all of its cases in turn.
TWO = {
    **{rule: (train, {"rule": rule}) for rule in RULES},
    "unequal": (train, {"rule": "cdat", "sizes": [6, 18]}),
    "differences": (train, {"rule": "cdat", "curvature": "finite_difference"}),
    **{f"bad {where}": (faulty, {"where": where}) for where in ("loss", "gradient", "curvature")},
    "bad sharpness": (faulty, {"where": "curvature", "rule": "edge"}),
    "routed": (routed, {}),
    "alone": (alone, {}),
    "forgetful": (forgetful, {}),
    "too many": (too_many, {}),
}
FORMS = ("closure", "backward", "accumulation")
FOUR = {
    f"{rule} {form}": (train, {"rule": rule, "wrapped": True, "form": form})
    for rule in ("cdat", "edge")
    for form in FORMS
}


def every_case(rank, size):
    cases = {2: TWO, 4: FOUR}[size]
    return {name: function(rank, size, **options) for name, (function, options) in cases.items()}


@pytest.fixture(scope="module")
def two():
    """What each of two processes found, by case."""
    return run(2, every_case)


@pytest.fixture(scope="module")
def four():
    return run(4, every_case)


def assert_like_one_process(found, name, cases, **tolerance):
    results = [process[name] for process in found]
    for other in results[1:]:
        assert other == results[0]  # bit for bit
    function, options = cases[name]
    alone = {key: value for key, value in options.items() if key != "sizes"}
    (flat, (ours,)), (expected_flat, (theirs,)) = results[0], function(0, 1, **alone)
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(torch.tensor(flat), torch.tensor(expected_flat), **tolerance)
    assert ours.keys() == theirs.keys()
    for key, number in theirs.items():
        assert ours[key] == pytest.approx(number, rel=tolerance["rtol"]), key


@pytest.mark.parametrize("case", [*RULES, "unequal"])
def test_two_processes_take_the_step_of_the_whole_batch(two, case):
    assert_like_one_process(two, case, TWO)


@pytest.mark.parametrize("case", FOUR)
def test_four_processes_under_distributed_data_parallel(four, case):
    assert_like_one_process(four, case, FOUR)


def test_finite_differences(two):
    """A difference of two rounded gradients: each process has its own rounding."""
    assert_like_one_process(two, "differences", TWO, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("where", ["loss", "gradient", "curvature", "sharpness"])
def test_what_is_not_finite_in_one_process_skips_the_step_in_all(two, where):
    found = [process[f"bad {where}"] for process in two]
    assert found[0] == found[1]
    same, skipped, rate, still_skipped = found[0]
    assert same
    assert (skipped, still_skipped) == (1, 1)
    assert rate > 0


def test_parameters_that_only_some_processes_use(two):
    (flat, info, unused), other = (process["routed"] for process in two)
    assert (flat, info, unused) == other
    expected, _, unused_by_one = routed(0, 1)
    torch.testing.assert_close(torch.tensor(flat), torch.tensor(expected))
    assert unused
    assert unused_by_one


def test_a_process_may_keep_to_itself(two):
    assert two[0]["alone"] != two[1]["alone"]


def test_a_step_without_synchronised_gradients_is_refused(two):
    assert two[0]["forgetful"]
    assert two[1]["forgetful"]


def test_too_many_skips_raise_in_all_processes(two):
    assert two[0]["too many"]
    assert two[1]["too many"]


@pytest.mark.parametrize("where", ["gradient", "base", "trial"])
def test_a_process_that_dies_leaves_the_others_as_they_were(where):
    """Parameters, gradients, base state, averages, statistics and random state."""
    assert run(2, dying, where, survivors={0}) == [True]


def saving(rank, size, folder):
    model, optimizer, closure = continued(rank, size)
    for _ in range(STEPS):
        optimizer.step(closure)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(parts, checkpoint_id=folder)
    for _ in range(STEPS):
        optimizer.step(closure)
    return numbers(model, optimizer)


def continued(rank, size):
    model, x, y = problem()
    optimizer = CDAT(torch.optim.Adam(model.parameters()), sigma=1.0)
    part = share(x, rank, size), share(y, rank, size)
    return model, optimizer, lambda: F.cross_entropy(model(part[0]), part[1])


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_a_checkpoint_of_two_processes_goes_on_in_one(tmp_path):
    found = run(2, saving, str(tmp_path))
    model, optimizer, closure = continued(0, 1)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=tmp_path)
    set_state_dict(
        model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"]
    )
    for _ in range(STEPS):
        optimizer.step(closure)
    flat, _ = numbers(model, optimizer)
    torch.testing.assert_close(torch.tensor(flat), torch.tensor(found[0][0]), rtol=1e-9, atol=1e-12)
