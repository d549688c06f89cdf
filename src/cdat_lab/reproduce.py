"""The study behind ``cdat reproduce``: which races, sweeps and simulations test which claim."""

from __future__ import annotations

from collections.abc import Sequence

from cdat_lab.claims import STATEMENTS
from cdat_lab.studies import Study, Sweep, eligible
from cdat_lab.races import Race
from cdat_lab.registry import find_task
from cdat_lab.contenders import CONTENDERS

SHORT = ("constant", "armijo", "greedy", "cdat-1.9", "cdat-2-ema-0.9")
SETTINGS = {
    ("teacher-student", "gd"): ("A", "B"),
    ("teacher-student", "rmsprop"): ("A", "B"),
    ("digits", "adam"): ("A", "B"),
    ("digits", "momentum"): ("A", "B"),
}
"""Which claims each race of the short study is about."""

BATCH_SIZES = (32, 128, 512, None)
SIGMAS = (0.5, 1.0, 1.5, 1.9, 2.0, 2.1)
MINI_BATCH_TASK = "digits-1536"

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
"""The further races of the full study."""


def study(
    *, backend: str, seeds: Sequence[int], only: Sequence[str] = (), full: bool = False, command: str
) -> Study:
    """Return the study that tests the claims.

    Parameters
    ----------
    backend : str
        "jax", "torch" or "numpy".
    seeds : sequence of int
        Every run is made for each of them.
    only : sequence of str
        Letters of claims; by default all.
    full : bool
        More tasks, every contender, momentum in the sweep as well.
    command : str
        What to type to repeat it.

    Returns
    -------
    Study
    """
    wanted = tuple(claim for claim in STATEMENTS if not only or claim in only)
    pairs = [pair for pair, about in SETTINGS.items() if set(about) & set(wanted)]
    if full and pairs:
        pairs += MORE
    races = []
    for task, base in pairs:
        names, _ = eligible(tuple(CONTENDERS) if full else SHORT, base=base, backend=backend)
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
