"""Contenders take turns, one step each; a figure is the median over rounds of the ratio in a round.

On a noisy machine a ratio of neighbours is steadier than one of separate runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

from cdat_core import tuners

Step = Callable[[], object]
REFERENCE = "Adam"
PERIOD = 10
WARM_UP = 3
SPARSE = 8
"""The self-tuning rule measures one step in eight from step 16 on."""


def time_ratios(steps: dict[str, Step], periods: dict[str, int], rounds: int) -> dict[str, str]:
    """Return the time of a step over that of the reference, with quartiles.

    A contender that measures every `period` steps is the weighted mean of the two medians.
    """
    seconds = time_rounds(steps, WARM_UP + rounds)
    found = {}
    for name, times in seconds.items():
        period, reference = periods[name], seconds[REFERENCE]
        pairs = list(enumerate(a / b for a, b in zip(times, reference, strict=True)))[WARM_UP:]
        if period == 1:
            low, middle, high = statistics.quantiles([ratio for _, ratio in pairs], n=4)
            found[name] = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        else:
            measuring = statistics.median(ratio for i, ratio in pairs if i % period == 0)
            others = statistics.median(ratio for i, ratio in pairs if i % period != 0)
            found[name] = f"{(measuring + (period - 1) * others) / period:.2f}"
    found[REFERENCE] = f"1 = {1e3 * statistics.median(seconds[REFERENCE][WARM_UP:]):.0f} ms"
    return found


def print_kinds(steps: dict[str, Step], rounds: int) -> None:
    """Print a table: steps without and with a measurement, and the mean of a run of 1,000 steps.

    All but the reference measure one step in `SPARSE`; the run follows the self-tuning rule.
    """
    seconds = time_rounds(steps, SPARSE * -(-rounds // SPARSE))
    schedule = tuners.self_tuning(total_steps=1000).measures or bool
    share = sum(bool(schedule(step)) for step in range(1000)) / 1000
    print("| step | held | measuring | mean of 1,000 steps |\n|---|---|---|---|")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[REFERENCE], strict=True)]
        measuring = statistics.median(ratios[SPARSE::SPARSE])
        held = statistics.median(r for i, r in enumerate(ratios[SPARSE:]) if i % SPARSE)
        mean = share * measuring + (1 - share) * held
        print(f"| {name} | {held:.3f} | {measuring:.2f} | {mean:.2f} |", flush=True)


def time_rounds(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each contender takes in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def parser(doc: str | None, tasks: Iterable[str], *, rounds: int) -> argparse.ArgumentParser:
    """Return the options that every comparison has."""
    options = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    options.add_argument("--rounds", type=at_least_a_period, default=rounds)
    options.add_argument("--tasks", nargs="+", choices=tuple(tasks), default=tuple(tasks))
    return options


def at_least_a_period(text: str) -> int:
    if int(text) < PERIOD:
        msg = f"must be at least {PERIOD}, got {text}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)
