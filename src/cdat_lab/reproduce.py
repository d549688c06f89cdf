"""The study behind ``cdat reproduce``: which races, sweeps and simulations test which claim."""

from __future__ import annotations

from collections.abc import Sequence

from cdat_lab.claims import STATEMENTS
from cdat_lab.races import Race
from cdat_lab.registry import find_task
from cdat_lab.studies import Study, Sweep, eligible

SHORT = ("constant", "warmup-cosine", "armijo", "greedy", "cdat-1.9", "cdat-2-ema-0.9")

SETTINGS = {
    ("teacher-student", "gd"): SHORT,
    ("teacher-student", "rmsprop"): (*SHORT, "cdat-2.1-ema-0.9"),
    ("digits", "adam"): SHORT,
    ("digits", "momentum"): SHORT,
}
"""The races of the short study with their contenders; all test claims A and B."""

BATCH_SIZES = (32, 128, 512, None)
SIGMAS = (0.5, 1.0, 1.5, 1.9, 2.0, 2.1)
MINI_BATCH_TASK = "digits-1536"

EVERY = (
    "constant",
    "warmup-constant",
    "warmup-cosine",
    "armijo",
    "zoom",
    "greedy",
    "on-edge",
    "cdat-1-ema-0.9",
    "cdat-1.9",
    "cdat-1.9-ema-0.9",
    "cdat-2",
    "cdat-2-ema-0.9",
    "cdat-guarded",
    "cdat-gauss-newton",
    "polyak",
    "hypergradient",
    "prodigy",
    "schedule-free",
    "cdat-2.1-ema-0.9",
)
"""The contenders of the full study."""

MORE = (
    ("digits-cross-entropy", "adam"),
    ("digits", "rmsprop"),
    ("teacher-student", "momentum"),
    ("teacher-student", "adam"),
    ("deep-linear", "gd"),
    ("deep-linear", "momentum"),
    ("characters", "adam"),
    ("patches", "adam"),
    ("patches", "momentum"),
)
"""The additional races of the full study."""


def study(
    *,
    backend: str,
    seeds: Sequence[int],
    only: Sequence[str] = (),
    full: bool = False,
    command: str,
) -> Study:
    """Return the study that tests the claims.

    Parameters
    ----------
    backend : str
        "jax", "torch" or "numpy".
    seeds : sequence of int
        Every run is repeated for each seed.
    only : sequence of str
        Letters of the claims to test; by default all.
    full : bool
        Add more tasks, more contenders, and a sweep with momentum.
    command : str
        The command line that repeats the study.

    Returns
    -------
    Study
    """
    wanted = tuple(claim for claim in STATEMENTS if not only or claim in only)
    settings = dict(SETTINGS) if set(wanted) & {"A", "B"} else {}
    if full and settings:
        settings = dict.fromkeys((*SETTINGS, *MORE), EVERY)
    races = []
    for (task, base), contenders in settings.items():
        names, _ = eligible(contenders, base=base, backend=backend)
        steps = find_task(task)(0).budget(base)
        races.append(Race(task, base, backend, tuple(names), steps, tuple(seeds)))
    sweeps = []
    if "C" in wanted:
        for base in ("adam", "momentum") if full else ("adam",):
            steps = find_task(MINI_BATCH_TASK)(0).budget(base)
            sweeps.append(
                Sweep(
                    MINI_BATCH_TASK,
                    base,
                    backend,
                    SIGMAS,
                    BATCH_SIZES,
                    decay=0.9,
                    steps=steps,
                    seeds=tuple(seeds),
                )
            )
    return Study(
        title="Stepping on the Edge: what holds on small problems",
        command=command,
        races=tuple(races),
        sweeps=tuple(sweeps),
        simulated="D" in wanted,
        claims=wanted,
    )
