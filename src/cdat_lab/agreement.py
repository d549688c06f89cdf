"""How closely the backends agree on the same runs."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from cdat_lab.findings import Findings
from cdat_lab.races import Key, Result

EARLY_STEPS = 20


def agreement(findings: Findings) -> str | None:
    """Return a sentence about the losses under several backends; None if there is only one.

    Runs that diverged, or whose tuned rates differ, are left out.
    """
    twins: dict[Key, list[Result]] = defaultdict(list)
    for key, result in findings.results.items():
        if not result.run.diverged:
            twins[key._replace(backend="")].append(result)
    backends = list(dict.fromkeys(key.backend for key in findings.results))
    early = late = 0.0
    pairs = 0
    for first, *others in twins.values():
        for other in others:
            if other.run.hyperparameters != first.run.hyperparameters:
                continue
            pairs += 1
            one, two = (r.run.frame["loss"].to_numpy() for r in (first, other))
            with np.errstate(invalid="ignore", divide="ignore"):
                difference = np.abs(two - one) / np.abs(one)
            early = max(early, float(np.max(difference[:EARLY_STEPS])))
            late = max(late, float(difference[-1]))
    if not pairs:
        return None
    return (
        f"Over the first {EARLY_STEPS} steps the losses under {' and '.join(backends)} differ by "
        f"less than {_magnitude(early)} (relative), at the end by less than {_magnitude(late)}: "
        "rounding errors grow at the edge of stability."
    )


def _magnitude(difference: float) -> str:
    """Return a power of ten above the difference."""
    if not math.isfinite(difference):
        return "any number"
    return f"1e{math.floor(math.log10(difference)) + 1}" if difference else "1e-16"
