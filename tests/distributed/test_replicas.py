"""Copies of one model in several processes: the step of the whole batch, the same in all."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cdat_core import linesearch, tuners
from cdat_torch import CDAT, TunedOptimizer
from tests.distributed.workers import run

STEPS = 5
RULES = {
    "cdat": tuners.cdat(1.0),
    "gen": tuners.gen(),
    "polyak": tuners.polyak(max_learning_rate=0.1),
    "zoom": linesearch.zoom(),
    "backtracking": linesearch.backtracking(),
}


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(24, 4, dtype=torch.float64), torch.randint(0, 3, (24,))


def numbers(model, optimizer):
    """What must agree: parameters and the last measurement, as plain numbers."""
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


def plain(rank, size, rule, options):
    return train(rank, size, rule, **options)


def assert_equal_to_one_process(size, rule, **options):
    found = run(size, plain, rule, options)
    for other in found[1:]:
        assert other == found[0]  # bit for bit
    options.pop("sizes", None)
    expected = train(0, 1, rule, **options)
    torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(expected[0]))
    (ours,), (theirs,) = found[0][1], expected[1]
    assert ours.keys() == theirs.keys()
    for name, number in theirs.items():
        assert ours[name] == pytest.approx(number, rel=1e-9), name


@pytest.mark.parametrize("rule", RULES)
def test_two_processes_take_the_step_of_the_whole_batch(rule):
    assert_equal_to_one_process(2, rule)


@pytest.mark.parametrize("form", ["closure", "backward", "accumulation"])
def test_four_processes_under_distributed_data_parallel(form):
    assert_equal_to_one_process(4, "cdat", wrapped=True, form=form)


def test_unequal_parts_weighed_by_their_size():
    assert_equal_to_one_process(2, "cdat", sizes=[6, 18])


def test_finite_differences():
    found = run(2, plain, "cdat", {"curvature": "finite_difference"})
    assert found[0] == found[1]
    expected = train(0, 1, "cdat", curvature="finite_difference")
    # A difference of two rounded gradients: each process has its own rounding.
    torch.testing.assert_close(
        torch.tensor(found[0][0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-7
    )


def faulty(rank, size, where):
    model, x, y = problem()
    base = torch.optim.Adam(model.parameters())
    optimizer = CDAT(base, sigma=1.0)
    inputs, labels = share(x, rank, size), share(y, rank, size)
    good = lambda: F.cross_entropy(model(inputs), labels)
    kink = lambda: (model[0].bias[0] - model[0].bias[0].detach()).clamp(min=0)
    broken = {
        "loss": lambda: good() * torch.nan,
        "gradient": lambda: good() + kink() ** 0.5,
        "curvature": lambda: good() + kink() ** 1.5,
    }[where]
    optimizer.step(good)
    before = [p.detach().clone() for p in model.parameters()]
    averages = list(optimizer._rule.state[:4])
    state = [s["exp_avg"].clone() for s in optimizer.state.values()]
    optimizer.step(broken if rank == 1 else good)
    same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    same = same and all(
        torch.equal(s["exp_avg"], t) for s, t in zip(optimizer.state.values(), state, strict=True)
    )
    same = same and averages == list(optimizer._rule.state[:4])
    skipped = int(optimizer.last.skipped)
    optimizer.step(good)
    return same, skipped, float(optimizer.last.learning_rate), int(optimizer.last.skipped)


@pytest.mark.parametrize("where", ["loss", "gradient", "curvature"])
def test_what_is_not_finite_in_one_process_skips_the_step_in_all(where):
    found = run(2, faulty, where)
    assert found[0] == found[1]
    same, skipped, rate, still_skipped = found[0]
    assert same
    assert (skipped, still_skipped) == (1, 1)
    assert rate > 0


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


def test_parameters_that_only_some_processes_use():
    found, expected = run(2, routed), routed(0, 1)
    assert found[0] == found[1]
    torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(expected[0]))
    assert found[0][2]
    assert expected[2]


def alone(rank, size):
    model, x, y = problem()
    optimizer = CDAT(torch.optim.SGD(model.parameters(), lr=1.0), process_group=False)
    part = share(x, rank, size), share(y, rank, size)
    optimizer.step(lambda: F.cross_entropy(model(part[0]), part[1]))
    return numbers(model, optimizer)


def test_a_process_may_keep_to_itself():
    first, second = run(2, alone)
    assert first != second


def forgetful(rank, size):
    model, x, y = problem()
    optimizer = CDAT(torch.optim.SGD(model.parameters(), lr=1.0))
    optimizer.backward(F.cross_entropy(model(x), y), sync=False)
    with pytest.raises(RuntimeError, match="sync=True"):
        optimizer.step()
    return True


def test_a_step_without_synchronised_gradients_is_refused():
    assert run(2, forgetful) == [True, True]


def dying(rank, size):
    model, x, y = problem()
    optimizer = CDAT(torch.optim.Adam(model.parameters()), sigma=1.0)
    closure = lambda: F.cross_entropy(model(share(x, rank, size)), share(y, rank, size))
    optimizer.step(closure)
    before = [p.detach().clone() for p in model.parameters()]
    state = [s["exp_avg"].clone() for s in optimizer.state.values()]
    if rank == 1:
        os._exit(9)
    with pytest.raises(RuntimeError):
        optimizer.step(closure)
    same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    return same and all(
        torch.equal(s["exp_avg"], t) for s, t in zip(optimizer.state.values(), state, strict=True)
    )


def test_a_process_that_dies_leaves_the_others_as_they_were():
    assert run(2, dying, survivors={0}) == [True]
