"""Sharded models: all processes take the step of one process on the whole batch."""

from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.autograd.function import once_differentiable
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_value_

from cdat_core import linesearch, tuners
from cdat_torch import CDAT, TunedOptimizer, further_differentiable, hvp, measure, sharpness
from tests.distributed.sharded_models import loss_of, problem, spread
from tests.distributed.workers import run

pytestmark = pytest.mark.timeout(300)  # several processes, each of which imports torch
STEPS = 3
RULES = {
    "constant": tuners.constant(0.02),
    "cdat": tuners.cdat(1.0),
    "zoom": linesearch.zoom(),
    "sharpness": tuners.sharpness_edge(1.0),
    "self-tuning": tuners.with_cooldown(tuners.every(tuners.self_tuning(0.5), 2), STEPS),
}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def flat(model):
    return torch.cat([whole(p.detach()).reshape(-1) for p in model.parameters()])


def averaged(model, optimizer):
    with optimizer.averaged():
        return flat(model)


def states(optimizer):
    return [whole(v.detach()).clone() for s in optimizer.state.values() for v in s.values()]


def prepared(size, way):
    """The model and this process's part of the batch."""
    model, x, y = problem()
    if way is None:
        return model, x, y, False
    parts, ours, group = spread(model, size, way)
    return model, x.chunk(parts)[ours], y.chunk(parts)[ours], group


def train(
    rank, size, way, *, rule="cdat", form="closure", every=None, curvature="auto", base="RMSprop"
):
    model, x, y, group = prepared(size, way)
    # RMSprop with a large eps: Adam would blow up the rounding of gradients that are all but zero.
    options = {"eps": 1e-3, "momentum": 0.5, "weight_decay": 0.1} if base == "RMSprop" else {}
    optimizer = TunedOptimizer(
        getattr(torch.optim, base)(model.parameters(), **options),
        RULES[rule],
        curvature=curvature,
        every=every,
        average=rule == "self-tuning",
        process_group=group,
    )
    history = []
    for _ in range(STEPS):
        if form == "closure":
            optimizer.step(lambda: loss_of(model, x, y))
        else:
            optimizer.zero_grad()
            parts = 1 if form == "backward" else 2
            for k, (a, b) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
                with further_differentiable():
                    loss = loss_of(model, a, b) / parts
                optimizer.backward(loss, sync=form != "accumulation" or k == parts - 1)
            # By value, because torch cannot clip the norm of mixed plain and sharded parameters.
            clip_grad_value_(model.parameters(), 0.01, foreach=False)
            optimizer.step()
        history.append(optimizer.last.as_dict())
    end = flat(model)
    if rule == "self-tuning":
        end = torch.cat([end, averaged(model, optimizer)])
    return end.tolist(), history


def faulty(rank, size, where):
    """Every process runs the model equally often, as fully_shard requires."""
    model, x, y, _ = prepared(size, "fsdp")
    optimizer = CDAT(torch.optim.Adam(model.parameters()), sigma=1.0)
    good = lambda: loss_of(model, x, y)

    def kink(power):
        loss = good()
        zero = loss - loss.detach()
        return zero.abs() ** power if rank == 1 else zero

    broken = {
        "loss": lambda: good() * (torch.nan if rank == 1 else 1.0),
        "gradient": lambda: good() + kink(0.5),
        "curvature": lambda: good() + kink(1.5),
    }[where]
    optimizer.step(good)
    before, averages = [flat(model), *states(optimizer)], list(optimizer._rule.state[:4])
    optimizer.step(broken)
    after = [flat(model), *states(optimizer)]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    same = same and averages == list(optimizer._rule.state[:4])
    skipped = int(optimizer.last.skipped)
    optimizer.step(good)
    return same, skipped, int(optimizer.last.skipped), float(optimizer.last.learning_rate)


def measured(rank, size, way):
    """The results of the functions of the package on the same model."""
    model, x, y, _ = prepared(size, way)
    loss_fn = lambda: loss_of(model, x, y)
    params = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    u = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
    u = [
        distribute_tensor(t, p.device_mesh, p.placements) if isinstance(p, DTensor) else t
        for t, p in zip(u, params, strict=True)
    ]
    numbers = []
    for curvature in ("auto", "finite_difference"):
        numbers += [float(s) for s in measure(loss_fn, params, u, curvature=curvature)[:3]]
    product = hvp(loss_fn, params)(u)
    pairs = zip(params, product, strict=True)
    laid_out = all(isinstance(p, DTensor) == isinstance(h, DTensor) for p, h in pairs)
    product = torch.cat([whole(t).reshape(-1) for t in product])
    largest = float(sharpness(loss_fn, params, num_matvecs=12))
    return numbers, product.tolist(), largest, laid_out


def low_precision(rank, size):
    model, x, y, group = prepared(size, None)
    model.float()
    if size > 1:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
        fully_shard(model, mp_policy=policy)
        x, y, group = x.chunk(size)[rank], y.chunk(size)[rank], None
    optimizer = CDAT(torch.optim.Adam(model.parameters()), sigma=1.0, process_group=group)
    losses = [float(optimizer.step(lambda: loss_of(model, x, y))) for _ in range(STEPS)]
    return losses, float(optimizer.last.curvature)


class Square(torch.autograd.Function):
    """Without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


def refused(rank, size):
    model, x, y, _ = prepared(size, "fsdp")
    with pytest.raises(ValueError, match="gauss_newton"):
        CDAT(torch.optim.SGD(model.parameters(), lr=1.0), curvature="gauss_newton")
    with pytest.raises(ValueError, match="process_group"):
        CDAT(torch.optim.SGD(model.parameters(), lr=1.0), process_group=False)
    optimizer = CDAT(torch.optim.SGD(model.parameters(), lr=1.0))
    before = flat(model)
    with pytest.raises(NotImplementedError) as error:
        optimizer.step(lambda: Square.apply(model(x)).mean())
    assert "finite_difference" in error.value.__notes__[0]
    assert torch.equal(before, flat(model))
    model, x, y, _ = prepared(size, "tensor")
    before = flat(model)
    optimizer = CDAT(torch.optim.SGD(model.parameters(), lr=1.0))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        optimizer.backward(loss_of(model, x, y))
    with pytest.raises(RuntimeError, match="further_differentiable"):
        optimizer.step()
    return torch.equal(before, flat(model))


def beside_another_model(rank, size):
    """Which parameters of another, unsharded model a step has sharded."""
    other, *_ = prepared(size, "fsdp")
    for module in (other, other.block):
        module.unshard()
    found = []
    for unsharded in (False, True):
        model, x, y, _ = prepared(size, "fsdp")
        base = torch.optim.SGD(model.parameters(), lr=1.0)
        if unsharded:  # the optimizer still finds the module of each parameter
            model.unshard()
        optimizer = CDAT(base, sigma=1.0)
        optimizer.step(functools.partial(loss_of, model, x, y))
        found.append(flat(model).tolist())
    return [isinstance(p, DTensor) for p in other.parameters()], found[0] == found[1]


def overlapping(rank, size):
    model, *_ = prepared(size, "tensor and data")
    with pytest.raises(ValueError, match="process_group"):
        CDAT(torch.optim.SGD(model.parameters(), lr=1.0))
    return all("tuned_lr" not in g for g in torch.optim.SGD(model.parameters()).param_groups)


def dying(rank, size):
    model, x, y, _ = prepared(size, "fsdp")
    optimizer = CDAT(torch.optim.Adam(model.parameters()), sigma=1.0)
    closure = lambda: loss_of(model, x, y)
    optimizer.step(closure)
    local = lambda: [p.to_local().detach().clone() for p in model.parameters()]
    before = local()
    moments = [s["exp_avg"].to_local().clone() for s in optimizer.state.values()]
    if rank == 1:
        os._exit(9)
    with pytest.raises(RuntimeError):
        optimizer.step(closure)
    after = [s["exp_avg"].to_local() for s in optimizer.state.values()]
    same = zip([*before, *moments], [*local(), *after], strict=True)
    return all(torch.equal(a, b) for a, b in same)


def parts_of(model, optimizer):
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def saving(rank, size, folder):
    model, x, y, _ = prepared(size, "fsdp")
    model.unused.requires_grad_(False)  # without a state, it could not be loaded
    base = torch.optim.RMSprop(model.parameters(), eps=1e-3)
    optimizer = CDAT(base, sigma=1.0, average=True)
    closure = lambda: loss_of(model, x, y)
    for _ in range(STEPS):
        optimizer.step(closure)
    dcp.save(parts_of(model, optimizer), checkpoint_id=folder)
    for _ in range(STEPS):
        optimizer.step(closure)
    return torch.cat([flat(model), averaged(model, optimizer)]).tolist()


def resuming(rank, size, folder, way="fsdp"):
    model, x, y, group = prepared(size, way)
    model.unused.requires_grad_(False)
    base = torch.optim.RMSprop(model.parameters(), eps=1e-3)
    optimizer = CDAT(base, sigma=1.0, average=True, process_group=group)
    before = flat(model)
    parts = parts_of(model, optimizer)
    untouched = torch.equal(before, flat(model))  # it takes a step with gradients of zero
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"]
    )
    for _ in range(STEPS):
        optimizer.step(lambda: loss_of(model, x, y))
    return torch.cat([flat(model), averaged(model, optimizer)]).tolist(), untouched


STEPPING = {
    "cdat": {},
    "every": {"every": 3},
    "backward": {"form": "backward"},
    "accumulation": {"form": "accumulation"},
    "synchronised accumulation": {"form": "synchronised", "every": 2},
    "differences": {"curvature": "finite_difference"},
    "zoom": {"rule": "zoom"},
    "sharpness": {"rule": "sharpness", "base": "SGD", "form": "synchronised", "every": STEPS},
    "constant": {"rule": "constant"},
    "self-tuning": {"rule": "self-tuning"},
    "adamw": {"base": "AdamW", "rule": "constant", "form": "backward"},
}
WAYS = {
    (2, "fsdp"): STEPPING,
    (2, "tensor"): (
        "cdat",
        "every",
        "self-tuning",
        "accumulation",
        "differences",
        "zoom",
        "sharpness",
    ),
    (2, "sequence"): ("cdat", "backward"),
    (4, "hsdp"): ("cdat", "accumulation", "differences"),
    (4, "tensor and data"): ("cdat", "accumulation"),
    (4, "tensor and fsdp"): ("cdat", "every", "differences"),
}
TRAINED = {(*way, case): STEPPING[case] for way, cases in WAYS.items() for case in cases}
FAULTS = ("loss", "gradient", "curvature")


def every_case(rank, size, folder=None):
    found = {
        key: train(rank, size, key[1], **options)
        for key, options in TRAINED.items()
        if key[0] == size
    }
    if size == 4:
        return {**found, "overlapping": overlapping(rank, size)}
    return {
        **found,
        **{f"bad {where}": faulty(rank, size, where) for where in FAULTS},
        **{f"measured {way}": measured(rank, size, way) for way in ("fsdp", "tensor")},
        "low precision": low_precision(rank, size),
        "refused": refused(rank, size),
        "beside another model": beside_another_model(rank, size),
        "saved": saving(rank, size, folder),
        "resumed": resuming(rank, size, folder),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def found(folder):
    """What each process found, by number of processes."""
    return {2: run(2, every_case, folder), 4: run(4, every_case)}


@pytest.mark.parametrize(("size", "way", "case"), TRAINED)
def test_the_step_is_that_of_one_process(found, size, way, case):
    results = [process[size, way, case] for process in found[size]]
    for other in results[1:]:
        assert other == results[0]  # bit for bit
    (params, history), (expected, reference) = results[0], train(0, 1, None, **STEPPING[case])
    tolerance = 1e-5 if case == "differences" else 1e-9  # a difference of rounded gradients
    torch.testing.assert_close(
        torch.tensor(params), torch.tensor(expected), rtol=tolerance, atol=1e-3 * tolerance
    )
    for ours, theirs in zip(history, reference, strict=True):
        assert ours.keys() == theirs.keys()
        for name, number in theirs.items():
            assert ours[name] == pytest.approx(number, rel=tolerance), name


@pytest.mark.parametrize("where", FAULTS)
def test_what_is_not_finite_in_one_process_skips_the_step_in_all(found, where):
    results = [process[f"bad {where}"] for process in found[2]]
    assert results[0] == results[1]
    same, skipped, still_skipped, rate = results[0]
    assert same
    assert (skipped, still_skipped) == (1, 1)
    assert rate > 0


@pytest.mark.parametrize("way", ["fsdp", "tensor"])
def test_the_functions_of_the_package(found, way):
    numbers, product, largest, laid_out = found[2][0][f"measured {way}"]
    assert found[2][1][f"measured {way}"] == found[2][0][f"measured {way}"]
    expected, expected_product, expected_largest, _ = measured(0, 1, None)
    assert numbers[:3] == pytest.approx(expected[:3], rel=1e-12)
    assert numbers[3:] == pytest.approx(expected[:3], rel=1e-6)
    torch.testing.assert_close(torch.tensor(product), torch.tensor(expected_product))
    assert largest == pytest.approx(expected_largest, rel=1e-9)
    assert laid_out


def test_mixed_precision_of_fsdp(found):
    mixed, mixed_curvature = found[2][0]["low precision"]
    single, curvature = low_precision(0, 1)
    assert mixed == pytest.approx(single, rel=0.02)
    assert mixed_curvature == pytest.approx(curvature, rel=0.2)


def test_what_cannot_be_measured_is_refused(found):
    assert [process["refused"] for process in found[2]] == [True, True]
    assert all(process["overlapping"] for process in found[4])


def test_another_model_under_fully_shard_is_left_alone(found):
    for process in found[2]:
        sharded, same = process["beside another model"]
        assert not any(sharded)
        assert same


def test_a_process_that_dies_leaves_the_others_as_they_were():
    assert run(2, dying, survivors={0}) == [True]


def test_a_checkpoint_resumes_bit_for_bit(found):
    for process in found[2]:
        assert process["resumed"] == (process["saved"], True)


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_a_checkpoint_goes_on_in_another_number_of_processes(found, folder):
    expected = torch.tensor(found[2][0]["saved"])
    alone, untouched = resuming(0, 1, folder, way=None)
    assert untouched
    torch.testing.assert_close(torch.tensor(alone), expected, rtol=1e-9, atol=1e-12)
    four = run(4, resuming, folder)
    assert four[1:] == four[:-1]
    torch.testing.assert_close(torch.tensor(four[0][0]), expected, rtol=1e-9, atol=1e-12)
