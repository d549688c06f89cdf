"""What a comparison showed, in sentences made of its numbers and nothing else."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import polars as pl

from cdat_lab import table
from cdat_lab.bases import BASES, Base
from cdat_lab.compare import Comparison
from cdat_lab.contenders import CONTENDERS

EARLY_STEPS = 20


class Finding(NamedTuple):
    """A topic and what there is to say about it."""

    topic: str
    text: str


def findings(comparison: Comparison) -> list[Finding]:
    """Return the winners, two claims of the paper, the edge, the backends and the limits."""
    found = [Finding(base.label, _lowest(comparison, base)) for base in BASES.values()]
    found += [
        Finding(
            "Greedy tuners",
            "The paper says that in full batch they lose to a tuned constant rate: "
            + _verdict(comparison, ("greedy", "armijo"), above=True),
        ),
        Finding(
            "CDAT",
            "The paper says that with sigma near 2 it beats a tuned constant rate: "
            + _verdict(comparison, ("cdat-1.9", "cdat-2.0"), above=False),
        ),
        Finding("Edge of stability", " ".join(_edge(comparison, base) for base in BASES.values())),
    ]
    if len(comparison.backends) > 1:
        found.append(Finding("Backends", _agreement(comparison)))
    found.append(
        Finding(
            "Limits",
            f"One task, one seed ({comparison.seed}), {comparison.steps} steps, rates tuned by "
            "factors of 2 on the final training loss: an example, no evidence for or against the "
            "claims in general. CDAT and the greedy rule run without start rate, growth cap or "
            "upper bound.",
        )
    )
    return found


def _lowest(comparison: Comparison, base: Base) -> str:
    """Say which contender ended lowest, once if the backends agree."""
    best = {b: table.winner(comparison, base.name, b) for b in comparison.backends}
    names = {result.job.contender for result in best.values()}
    shown = comparison.backends if len(names) > 1 else comparison.backends[:1]
    parts = []
    for backend in shown:
        run, contender = best[backend].run, best[backend].job.contender
        where = f"under {backend} " if len(shown) > 1 else ""
        part = (
            f"{where}{CONTENDERS[contender].label} ends lowest, at {table.number(run.final_loss)}"
        )
        constant = comparison.get(base.name, backend, "constant")
        factor = table.over_constant(comparison, best[backend])
        if factor is None:
            part += "; every constant rate diverged"
        elif contender != "constant":
            rate = table.power_of_two(table.tuned_value(constant))
            part += f", {factor:.2f} times the loss of the best constant rate ({rate})"
        parts.append(part)
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _verdict(comparison: Comparison, contenders: tuple[str, ...], *, above: bool) -> str:
    """Set a claim about the final loss over that of the tuned constant rate against the numbers."""
    parts, verdicts = [], []
    for base in BASES.values():
        shown = []
        for contender in contenders:
            factors = [
                table.over_constant(comparison, comparison.get(base.name, backend, contender))
                for backend in comparison.backends
            ]
            known = [factor for factor in factors if factor is not None]
            verdicts += [(factor > 1) == above for factor in known]
            rounded = sorted({f"{factor:.2f}" for factor in known})
            shown.append(f"{CONTENDERS[contender].label} {' to '.join(rounded) or 'unknown'}")
        parts.append(f"with {base.label}, {' and '.join(shown)}")
    if any(verdicts) and not all(verdicts):
        seen = "seen here in part"
    else:
        seen = "seen here" if any(verdicts) else "not seen here"
    return f"{seen}. Final loss over that of the constant rate: {'; '.join(parts)}."


def _edge(comparison: Comparison, base: Base) -> str:
    """Say where rate times sharpness ended, and the sharpness that tells the rules apart."""
    frame = (
        table.results(comparison)
        .filter(pl.col("base") == base.label, pl.col("tuned").is_null())
        .drop_nulls(["edge_ratio", "sharpness"])
        .sort("sharpness", maintain_order=True)
    )
    if frame.is_empty():
        return f"With {base.label} it is unknown."
    low, high = frame.row(0, named=True), frame.row(-1, named=True)
    ratios = frame["edge_ratio"].to_list()
    return (
        f"With {base.label}, rate x sharpness ends at {min(ratios):.2f} to {max(ratios):.2f} of "
        "the edge under the rules that tune themselves, while the sharpness itself is lowest under "
        f"{low['contender']}, {table.number(low['sharpness'])}, and highest under "
        f"{high['contender']}, {table.number(high['sharpness'])}."
    )


def _agreement(comparison: Comparison) -> str:
    """Compare the losses of the backends: early, where rounding has not grown, and at the end."""
    early = late = 0.0
    for base in BASES:
        for contender in CONTENDERS:
            results = [comparison.get(base, b, contender) for b in comparison.backends]
            if len({table.tuned_value(result) for result in results}) > 1:
                continue
            first = results[0].run.frame["loss"].to_numpy()
            for other in (result.run.frame["loss"].to_numpy() for result in results[1:]):
                with np.errstate(invalid="ignore"):
                    difference = np.abs(other - first) / np.abs(first)
                early = max(early, float(np.max(difference[:EARLY_STEPS], initial=0.0)))
                late = max(late, float(difference[-1]))
    return (
        f"Over the first {EARLY_STEPS} steps the losses under {' and '.join(comparison.backends)} "
        f"differ by less than {_magnitude(early)} of their size, in the end by less than "
        f"{_magnitude(late)}: rounding errors grow at the edge of stability."
    )


def _magnitude(difference: float) -> str:
    """Return a power of ten above the difference."""
    if not math.isfinite(difference):
        return "any number"
    return f"1e{math.floor(math.log10(difference)) + 1}" if difference else "1e-16"
