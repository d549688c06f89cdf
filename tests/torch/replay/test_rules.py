"""Every rule, and every operation left to double backward, against differences of gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cdat_torch.curvature.replay import Unsupported, recording
from cdat_torch.curvature.replay.double_backward import CHECKED
from cdat_torch.curvature.replay.registry import OPERATION_RULES
from tests.examples import examples
from tests.torch.replay import (
    double_backward_cases,
    elementwise_cases,
    loss_function_cases,
    product_cases,
    reduction_cases,
    structure_cases,
)
from tests.torch.replay.harness import (
    Case,
    assert_exact,
    case,
    names,
    problem,
    replay,
    unverified,
    variants,
    vdot,
)

_FILES = (double_backward_cases, elementwise_cases, loss_function_cases, product_cases,
          reduction_cases, structure_cases)  # fmt: skip
CASES: list[Case] = [case for file in _FILES for case in file.CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_slope_and_curvature_are_exact(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    fell_back = set()
    for variant in variants(case):
        loss, params = problem(case, variant)
        u = [torch.randn_like(p) for p in params]
        assert case.node in names(loss(*params)), sorted(names(loss(*params)))
        with unverified(monkeypatch) as asked:
            try:
                assert_exact(loss, params, u)
            except Exception as error:
                error.add_note(str(variant))
                raise
        fell_back.add(case.node in asked)
    assert (True in fell_back) == (case.falls_back or case.node not in OPERATION_RULES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_first_sweep_confirms_the_rule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verification must not reject a right rule."""
    monkeypatch.setattr(recording, "_VERIFIED", set())
    for variant in variants(case):
        loss, params = problem(case, variant)
        replay(loss(*params), params, [torch.randn_like(p) for p in params])
        assert recording._VERIFIED, variant


def test_every_operation_has_a_case() -> None:
    covered = {case.node for case in CASES}
    assert covered == OPERATION_RULES.keys() | CHECKED
    assert {case.node for case in CASES if case.falls_back} == OPERATION_RULES.keys() & CHECKED


BINARY = [
    torch.add, torch.sub, torch.mul, torch.div, torch.rsub, torch.maximum, torch.atan2,
    lambda a, b: torch.addcmul(a, a, b),
    lambda a, b: torch.where(a > 0, a, b),
]  # fmt: skip
SIDES = st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.booleans()), max_size=3)


@given(op=st.sampled_from(BINARY), sides=SIDES, dropped=st.integers(0, 3))
@examples(40)
def test_any_two_shapes_that_broadcast(op, sides, dropped) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    left = tuple(1 if one else n for n, one, _ in sides)
    right = tuple(1 if one else n for n, _, one in sides)[dropped:]
    of = case("", op, left, right, domain="apart")
    for variant in variants(of):
        loss, params = problem(of, variant)
        assert_exact(loss, params, [torch.randn_like(p) for p in params])


@pytest.mark.parametrize("row", [2, -1])
def test_the_padding_row_of_an_embedding_is_a_constant(row: int) -> None:
    """As for double backward: that row has no gradient."""
    rows = torch.tensor([[2, 0, 2], [1, 4, 4]])
    padding = torch.zeros(5, 1, dtype=torch.bool)
    padding[row] = True
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    u = torch.randn_like(table)

    embedded = F.embedding(rows, table, padding_idx=row)
    slope, curvature, _ = replay(embedded.sin().sum(), [table], [u])

    (g,) = torch.autograd.grad(
        torch.where(padding, table.detach(), table)[rows].sin().sum(), table, create_graph=True
    )
    (product,) = torch.autograd.grad(g, table, u)
    torch.testing.assert_close(slope, vdot([g], [u]), rtol=1e-12, atol=0)
    torch.testing.assert_close(curvature, vdot([product], [u]), rtol=1e-12, atol=0)


def test_a_change_of_dtype_in_the_middle() -> None:
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    u = torch.randn_like(w)
    loss = w.sin().float().exp().double().square().sum()
    slope, curvature, _ = replay(loss, [w], [u])
    (g,) = torch.autograd.grad(w.sin().exp().square().sum(), w, create_graph=True)
    (product,) = torch.autograd.grad(g, w, u)
    torch.testing.assert_close(slope, vdot([g], [u]), rtol=1e-6, atol=0)
    torch.testing.assert_close(curvature, vdot([product], [u]), rtol=1e-6, atol=0)


def _bce(p: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy(p.sigmoid(), target.sigmoid())


def _logits(x: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, target.sigmoid())


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (_bce, "BinaryCrossEntropyBackward0"),
        (_logits, "BinaryCrossEntropyWithLogitsBackward0"),
    ],
)
def test_arguments_that_a_rule_leaves_out_are_named(function, operation) -> None:  # type: ignore[no-untyped-def]
    params = [torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss = function(*params)
    with pytest.raises(Unsupported, match=operation):
        replay(loss, params, params)


@pytest.mark.parametrize(
    "function",
    [
        F.relu, F.leaky_relu, F.relu6, F.elu, F.hardswish, F.softplus, torch.abs,
        lambda x: F.threshold(x, 1.0, 2.0),
        lambda x: x.clamp(-1, 3),
        lambda x: x.clamp_min(1),
        lambda x: x.amax(0),
        lambda x: x.max(0)[0],
        lambda x: torch.maximum(x, torch.ones_like(x)),
        lambda x: F.huber_loss(x, torch.zeros_like(x), reduction="none"),
        lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none"),
        lambda x: F.softplus(x, 1.0, 3.0),
    ],
)  # fmt: skip
def test_kinks_are_those_of_double_backward(function) -> None:  # type: ignore[no-untyped-def]
    """Inputs of exactly 0 are common behind a ReLU."""
    x = torch.tensor([-6.0, -3, -1, 0, 0, 1, 1, 3, 6, 20], dtype=torch.float64, requires_grad=True)
    u = torch.randn_like(x)
    loss = lambda: (function(x) * x).square().sum()
    (g,) = torch.autograd.grad(loss(), x, create_graph=True)
    (product,) = torch.autograd.grad(g, x, u)
    slope, curvature, _ = replay(loss(), [x], [u])
    torch.testing.assert_close(slope, vdot([g], [u]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(curvature, vdot([product], [u]), rtol=1e-12, atol=1e-12)
