"""The form without a closure: backward, clipping, accumulation, GradScaler."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from cdat_core import linesearch, tuners
from cdat_torch import CDAT, TunedOptimizer
from cdat_torch.curvature.replay import recording, registry
from tests.torch.models import mlp

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
    "momentum": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p),
}


def problem():
    torch.manual_seed(3)
    model = mlp(4, 8, 3)
    return model, torch.randn(24, 4, dtype=torch.float64), torch.randint(0, 3, (24,))


def assert_same_run(left, right):
    (model, optimizer), (other, expected) = left, right
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)
    for name in ("value", "slope", "curvature", "learning_rate"):
        found, wanted = getattr(optimizer.last, name), getattr(expected.last, name)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0, msg=name)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("base", BASES)
def test_backward_equals_the_closure_and_micro_batches_the_whole(base, parts, every):
    model, x, y = problem()
    other = copy.deepcopy(model)
    options = {"sigma": 1.0, "decay": 0.9, "every": every}
    ours = CDAT(BASES[base](model.parameters()), **options)
    theirs = CDAT(BASES[base](other.parameters()), **options)
    for _ in range(6):
        ours.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            ours.backward(F.cross_entropy(model(a), b) / parts)
        value = ours.step()
        expected = theirs.step(lambda: F.cross_entropy(other(x), y))
        torch.testing.assert_close(value, expected)
        if theirs.last.curvature is None:
            assert ours.last.curvature is None
        else:
            assert_same_run((model, ours), (other, theirs))
    assert float(ours.last.learning_rate) > 0


def test_clipping_changes_the_direction_but_not_the_slope_of_the_loss():
    """With gradient descent at sigma 1 the clipped direction is shorter and its rate longer."""
    model, x, y = problem()
    other = copy.deepcopy(model)
    steps = []
    for net, limit in ((model, 0.1), (other, None)):
        optimizer = CDAT(BASES["sgd"](net.parameters()), sigma=1.0, decay=0.0)
        optimizer.backward(F.cross_entropy(net(x), y))
        if limit is not None:
            assert clip_grad_norm_(net.parameters(), limit) > limit
        optimizer.step()
        steps.append(optimizer.last)
    clipped, plain = steps
    assert clipped.learning_rate > 1.5 * plain.learning_rate
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)


def test_two_losses_on_one_graph():
    model, x, y = problem()
    other = copy.deepcopy(model)
    ours = CDAT(BASES["sgd"](model.parameters()), sigma=1.0, decay=0.0)
    theirs = CDAT(BASES["sgd"](other.parameters()), sigma=1.0, decay=0.0)
    outputs = model(x)
    ours.backward(F.cross_entropy(outputs, y))
    ours.backward(0.1 * outputs.square().mean())
    ours.step()

    def both():
        outputs = other(x)
        return F.cross_entropy(outputs, y) + 0.1 * outputs.square().mean()

    theirs.step(both)
    assert_same_run((model, ours), (other, theirs))


class Saved:
    """What a graph keeps of a tensor; unlike a node of the graph it can be watched."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # with its graph it would keep itself alive


@pytest.mark.parametrize("rule", [tuners.cdat(), tuners.sharpness_edge()], ids=["cdat", "edge"])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("end", ["step", "zero_grad"])
def test_graphs_are_freed(end, held, rule):
    """After a step even if the caller still holds the loss.

    Double backward, for the sharpness, leaves what the loss itself saved.
    """
    model, x, y = problem()
    optimizer = TunedOptimizer(BASES["adamw"](model.parameters()), rule)
    watched = []

    def pack(tensor):
        saved = Saved(tensor)
        watched.append((weakref.ref(saved), tuple(tensor.shape)))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = F.cross_entropy(model(x), y)
        optimizer.backward(loss)
    gc.collect()
    alive = lambda: [shape for reference, shape in watched if reference() is not None]
    assert len(alive()) > 5
    if not held:
        del loss
    getattr(optimizer, end)()
    gc.collect()
    if not held or "sharpness" not in rule.needs:
        assert not alive()
    elif end == "step":
        assert alive() == [(24, 3), (24,), ()]  # the log-probabilities, labels, and their number


def test_several_losses_that_are_not_replayed_exactly_are_differentiated_twice(monkeypatch):
    rule = registry.OPERATION_RULES["TanhBackward0"]
    wrong = lambda *args: rule.apply(*args)._replace(second_order=torch.tensor(1e3))
    monkeypatch.setitem(
        registry.OPERATION_RULES, "TanhBackward0", dataclasses.replace(rule, apply=wrong)
    )
    monkeypatch.setattr(recording, "_VERIFIED", set())
    model, x, y = problem()
    other = copy.deepcopy(model)
    ours = CDAT(BASES["sgd"](model.parameters()), sigma=1.0, decay=0.0)
    theirs = CDAT(BASES["sgd"](other.parameters()), sigma=1.0, decay=0.0, curvature="hvp")
    for part in (slice(0, 12), slice(12, 24)):
        ours.backward(F.cross_entropy(model(x[part]), y[part]) / 2)
    with pytest.warns(UserWarning, match="TanhBackward0") as caught:
        ours.step()
    assert len(caught) == 1
    assert ours.last.method == "hvp"
    theirs.step(lambda: F.cross_entropy(other(x), y))
    assert_same_run((model, ours), (other, theirs))


def test_zero_grad_discards_a_step_that_did_not_come():
    model, x, y = problem()
    other = copy.deepcopy(model)
    ours = CDAT(BASES["sgd"](model.parameters()), sigma=1.0, decay=0.0)
    theirs = CDAT(BASES["sgd"](other.parameters()), sigma=1.0, decay=0.0)
    ours.backward(1e6 * F.cross_entropy(model(x), y))
    ours.zero_grad()
    ours.backward(F.cross_entropy(model(x), y))
    ours.step()
    theirs.step(lambda: F.cross_entropy(other(x), y))
    assert_same_run((model, ours), (other, theirs))


def scaled_run(steps, scaler, spoil=()):
    model, x, y = problem()
    model, x = model.float(), x.float()
    optimizer = CDAT(BASES["momentum"](model.parameters()), sigma=1.0, decay=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if step in spoil:
            loss = loss * torch.inf
        optimizer.backward(loss, scaler=scaler)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return model, optimizer


def test_grad_scaler_changes_nothing():
    """The scale is a power of two, so float32 rounds the same."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    (model, ours), (other, theirs) = scaled_run(5, scaler), scaled_run(5, None)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for name in ("value", "slope", "curvature", "learning_rate"):
        found, wanted = getattr(ours.last, name), getattr(theirs.last, name)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0, msg=name)


def test_a_step_that_the_scaler_skips_discards_the_measurement():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, optimizer = scaled_run(4, scaler, spoil={1, 2})
    other, expected = scaled_run(2, torch.amp.GradScaler("cpu", init_scale=2.0**8))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert int(optimizer.last.skipped) == int(expected.last.skipped) == 0


def test_grad_scaler_with_a_closure_is_refused():
    model, x, y = problem()
    model, x = model.float(), x.float()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = CDAT(BASES["sgd"](model.parameters()))
    optimizer.backward(F.cross_entropy(model(x), y), scaler=scaler)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError, match="closure must not be given to GradScaler.step"):
        scaler.step(optimizer, lambda: F.cross_entropy(model(x), y))
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (linesearch.backtracking(), {}, "a line search evaluates the loss again"),
        (tuners.cdat(), {"curvature": "finite_difference"}, 'curvature="finite_difference" eval'),
    ],
)
def test_what_needs_a_closure_says_so(rule, options, message):
    model, x, y = problem()
    optimizer = TunedOptimizer(BASES["sgd"](model.parameters()), rule, **options)
    with pytest.raises(ValueError, match=message):
        optimizer.backward(F.cross_entropy(model(x), y))


def test_bad_losses_are_refused():
    model, x, y = problem()
    optimizer = CDAT(BASES["sgd"](model.parameters()))
    loss = F.cross_entropy(model(x), y)
    with pytest.raises(TypeError, match="loss must return the loss as a tensor, got 1.0"):
        optimizer.backward(1.0)
    with pytest.raises(ValueError, match="loss must .* real scalar"):
        optimizer.backward(model(x))
    with pytest.raises(ValueError, match="loss must have a graph"):
        optimizer.backward(loss.detach())
    optimizer.backward(loss)
    with pytest.raises(TypeError, match="use one of the two"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))


def test_a_rule_that_needs_no_loss_steps_on_plain_gradients():
    """The usual loop, with loss.backward()."""
    model, x, y = problem()
    other = copy.deepcopy(model)
    ours = TunedOptimizer(torch.optim.Adam(model.parameters()), tuners.constant(0.01))
    theirs = torch.optim.Adam(other.parameters(), lr=0.01)
    for optimizer, net in ((ours, model), (theirs, other)):
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_as_dict_gives_numbers_for_a_logger():
    model, x, y = problem()
    optimizer = CDAT(BASES["sgd"](model.parameters()), every=2)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    numbers = optimizer.last.as_dict()
    assert list(numbers) == ["value", "slope", "curvature", "learning_rate", "skipped"]
    assert all(isinstance(number, float) for number in numbers.values())
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert "curvature" not in optimizer.last.as_dict()


def test_no_memory_grows_over_many_steps():
    """Counted in live tensors after each step."""
    model, x, y = problem()
    optimizer = CDAT(torch.optim.Adam(model.parameters()), sigma=1.0)
    counts = []
    gc.freeze()  # what exists already is neither searched nor counted
    try:
        for _ in range(30):
            optimizer.zero_grad()
            optimizer.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            gc.collect()
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    finally:
        gc.unfreeze()
    assert len(set(counts[5:])) == 1
