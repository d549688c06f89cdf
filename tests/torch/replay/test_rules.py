"""Every rule, and every operation of the fallback, against differences of gradients."""

from __future__ import annotations

import pytest
import torch

from cdat_torch.replay import recording
from cdat_torch.replay.fallback import CHECKED
from cdat_torch.replay.registry import RULES
from tests.torch.replay import (
    elementwise_cases,
    fallback_cases,
    loss_cases,
    product_cases,
    reduction_cases,
    structure_cases,
)
from tests.torch.replay.harness import (
    Case,
    assert_exact,
    names,
    problem,
    replay,
    unverified,
    variants,
)

_FILES = (elementwise_cases, fallback_cases, loss_cases, product_cases, reduction_cases,
          structure_cases)  # fmt: skip
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
    assert (True in fell_back) == (case.falls_back or case.node not in RULES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_first_sweep_confirms_the_rule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch computes for the operation must not look like a wrong rule."""
    monkeypatch.setattr(recording, "_VERIFIED", set())
    for variant in variants(case):
        loss, params = problem(case, variant)
        replay(loss(*params), params, [torch.randn_like(p) for p in params])
        assert recording._VERIFIED, variant


def test_every_operation_has_a_case() -> None:
    covered = {case.node for case in CASES}
    assert covered == RULES.keys() | CHECKED
    assert {case.node for case in CASES if case.falls_back} == RULES.keys() & CHECKED
