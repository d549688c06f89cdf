"""Verdicts follow from the numbers: in the range for all seeds, some, or none."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import polars as pl
import pytest

from cdat_lab import claims, model
from cdat_lab.races import Key, Race, Result
from cdat_lab.studies import Study, Sweep
from tests.lab import made_up

RACE = Race("digits", "momentum", "jax", ("constant", "cdat-1.9", "cdat-2-ema-0.9"), 800, (0, 1))


def ending(key: Key, loss: float, product: float = 3.8) -> Result:
    """A made-up result whose run ends at a loss, with a rate times sharpness."""
    made = made_up.result(key)
    losses = np.geomspace(2.0, loss, key.steps + 1) if math.isfinite(loss) else [math.nan] * 801
    frame = made.run.frame.with_columns(
        full_loss=pl.Series(np.concatenate([losses[: key.steps // 2], losses[-1:].repeat(401)]))
        if math.isfinite(loss)
        else pl.Series([1.0, *losses[1:]]),
        learning_rate=pl.lit(0.5),
        sharpness=pl.lit(2 * product),
    )
    return dataclasses.replace(made, run=dataclasses.replace(made.run, frame=frame))


def outcomes(results: dict[Key, Result], race: Race = RACE) -> dict[str, claims.Verdict]:
    study = Study("title", "command", (race,), claims=("A", "B", "C", "D"))
    return {verdict.expected: verdict for verdict in claims.verdicts(study, results)}


@pytest.mark.parametrize(
    ("losses", "outcome"),
    [
        ((0.01, 0.02), "holds"),
        ((0.01, 0.09), "in part"),
        ((0.09, 0.2), "does not hold"),
        ((0.09, math.inf), "does not hold"),
    ],
)
def test_a_verdict_counts_the_seeds_in_the_range(losses: tuple[float, float], outcome: str) -> None:
    results = {}
    for seed, loss in enumerate(losses):
        results[RACE.key("constant", seed)] = ending(RACE.key("constant", seed), 0.1)
        results[RACE.key("cdat-1.9", seed)] = ending(RACE.key("cdat-1.9", seed), loss)
    found = outcomes(results)
    name = "CDAT 1.9 (no EMA): loss relative to the tuned constant at most 0.65"
    assert found[name].outcome == outcome
    expected = [loss / 0.1 for loss in losses]
    assert found[name].values == pytest.approx(expected)
    others = [v for key, v in found.items() if key != name]
    assert others
    assert {verdict.outcome for verdict in others} == {"unknown"}  # CDAT 2 was not run


def test_a_constant_rate_that_diverged_is_no_reference() -> None:
    """The other rules have neither beaten it nor lost to it."""
    names = ("constant", "cdat-1.9")
    ends = {("constant", 0): math.inf, ("constant", 1): 0.1}
    keys = [RACE.key(name, seed) for name in names for seed in RACE.seeds]
    name = "CDAT 1.9 (no EMA): loss relative to the tuned constant at most 0.65"
    found = outcomes({key: ending(key, ends.get((key.contender, key.seed), 0.01)) for key in keys})
    assert found[name].values == pytest.approx((0.1,))
    found = outcomes(
        {key: ending(key, math.inf if key.contender == "constant" else 0.01) for key in keys}
    )
    assert (found[name].outcome, found[name].measured) == ("unknown", "not measured")


@pytest.mark.parametrize(("product", "outcome"), [(3.8, "holds"), (3.5, "does not hold")])
def test_the_edge_is_required_within_five_percent(product: float, outcome: str) -> None:
    names = ("constant", "cdat-2-ema-0.9")
    keys = [RACE.key(name, seed) for name in names for seed in RACE.seeds]
    found = outcomes({key: ending(key, 0.1, product) for key in keys})
    assert found["CDAT 2 (EMA 0.9): rate x sharpness from 3.61 to 3.99"].outcome == outcome


def test_no_verdict_on_runs_of_another_length() -> None:
    race = dataclasses.replace(RACE, steps=60)
    results = {key: made_up.result(key) for key in race.result_keys()}
    assert not outcomes(results, race)


@pytest.mark.parametrize(
    ("best", "outcome"),
    [((0.5, 1.0, 2.0), "holds"), ((1.0, 0.5, 2.0), "does not hold"), ((1.0,) * 3, "does not hold")],
)
def test_the_best_sigma_must_rise_with_the_batch(best: tuple[float, ...], outcome: str) -> None:
    sweep = Sweep("digits", "adam", "jax", (0.5, 1.0, 2.0), (32, 128, None), 0.9, 800, (0, 1))
    results = {}
    for race, sigma in zip(sweep.races(), best, strict=True):
        for seed in sweep.seeds:
            results[race.key("constant", seed)] = ending(race.key("constant", seed), 0.1)
            for other in sweep.sigmas:
                key = race.key(sweep.contender(other), seed)
                results[key] = ending(key, 0.01 if other == sigma else math.inf)
    study = Study("title", "command", (), (sweep,), claims=("C",))
    (verdict,) = claims.verdicts(study, results)
    assert verdict.outcome == outcome
    assert verdict.values == best
    missing = sweep.races()[0].key("constant", 1)
    results[missing] = ending(missing, math.inf)
    (verdict,) = claims.verdicts(study, results)
    assert verdict.outcome == "unknown"
    del results[missing]
    (verdict,) = claims.verdicts(study, results)
    assert verdict.outcome == "unknown"


def test_the_joint_model_gives_the_known_sharpness() -> None:
    """The sharpness at T/2 and T of a pilot study, for the constant rate and sigma 1.9."""
    found = {s.contender.name: s for s in model.simulate(("constant", "cdat-1.9"))}
    ends = [found[name].sharpness[[2500, 5000], 0] for name in ("constant", "cdat-1.9")]
    np.testing.assert_allclose(ends, [[3.24, 4.00], [0.80, 1.99]], atol=5e-3)
