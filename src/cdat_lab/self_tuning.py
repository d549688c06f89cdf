"""The suite `self-tuning`: what a learning rate with nothing to choose is worth, on mini-batches.

Each setting is a task with a base optimizer and a batch size. The settings are split into two
halves, once and before any result of the rule was seen:

- Development: a rule may be designed, searched and changed on these.
- Judgement: a rule is measured on these when it is finished.

The split follows the kinds of problems, so that each half says something about each kind. Of each
pair the first is in development: clean labels (digits; generated signals), wrong labels (digits;
signals), a convolutional network with augmentation (digits; signals), a character transformer with
AdamW and dropout (help texts; source text), an autoencoder (digits; photographs, denoising), a
variational autoencoder (digits; signals), matrix factorisation (ratings; word counts), a
physics-informed network (an ordinary; a partial differential equation), regression with outliers
(squared; robust loss), a recurrent network (plain; gated), a deep network without normalisation
(tanh; ReLU), a residual network with layer normalisation (generated data with wrong labels;
photographs), generalised linear models (logistic; Poisson regression). The remaining kinds could
not be split: a wide network is in development, contrastive learning in judgement. The two settings
of a pair differ in data, model or loss. Both halves have every base optimizer and batches from 16
to 256. Development has the digits and the plainer variant of each kind, on which rules tend to be
designed anyway; the constants of the self-tuning rule were first found on such problems.

The final loss is that at the last weights, because schedules decay to 0 there. Rates of the
baselines are tuned for each seed, by the training loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from cdat_lab import backends, costs, registry
from cdat_lab.races import Race
from cdat_lab.registry import find_base, find_contender, find_task
from cdat_lab.runs import Recording
from cdat_lab.studies import Study

NAME = "self-tuning"
Side = Literal["development", "judgement"]

OURS = "self-tuning"
REFERENCE = "constant"
UNTUNED = "adamw-0.001"
"""The rival that the check of the quick form compares with."""

TUNED = ("constant", "warmup-cosine", "wsd")
RIVALS = (
    "adamw-0.001",
    "adamw-0.01",
    "prodigy",
    "prodigy-cosine",
    "schedule-free-default",
    "dog",
    "mechanic",
)
"""Complete optimizers with nothing to choose; they replace the base optimizer of the setting."""

FULL = (*TUNED, OURS, "self-tuning-average", "cdat-2-ema-0.9", *RIVALS)
QUICK = ("constant", "warmup-cosine", OURS, "self-tuning-average", *RIVALS[:4])

RECORDING = Recording(records=10, sharpness=False, last_part=0.0)


class Setting(NamedTuple):
    """A task with a base optimizer and a batch size."""

    side: Side
    task: str
    base: str
    batch_size: int
    quick: bool = False


SETTINGS = (
    Setting("development", "digit-labels", "momentum", 64),
    Setting("development", "noisy-digits", "adam", 32, quick=True),
    Setting("development", "shifted-digits", "momentum", 64),
    Setting("development", "topics-transformer", "adamw", 16),
    Setting("development", "digit-autoencoder", "rmsprop", 128, quick=True),
    Setting("development", "digit-vae", "adam", 64),
    Setting("development", "ratings", "gd", 256),
    Setting("development", "oscillator", "adam", 64),
    Setting("development", "diabetes", "rmsprop", 16),
    Setting("development", "frequencies", "momentum", 32, quick=True),
    Setting("development", "deep-tanh", "gd", 64),
    Setting("development", "residual-teacher", "adamw", 64, quick=True),
    Setting("development", "tumours", "gd", 16, quick=True),
    Setting("development", "wide-spirals", "rmsprop", 32),
    Setting("judgement", "signal-labels", "gd", 32),
    Setting("judgement", "noisy-signals", "rmsprop", 16, quick=True),
    Setting("judgement", "warped-signals", "adam", 64),
    Setting("judgement", "source-transformer", "adamw", 16),
    Setting("judgement", "photo-denoiser", "adam", 128),
    Setting("judgement", "signal-vae", "rmsprop", 128),
    Setting("judgement", "co-occurrences", "momentum", 256),
    Setting("judgement", "burgers", "adam", 128, quick=True),
    Setting("judgement", "outliers", "momentum", 32, quick=True),
    Setting("judgement", "chaos", "adam", 32),
    Setting("judgement", "deep-relu", "momentum", 128),
    Setting("judgement", "residual-photos", "adamw", 32, quick=True),
    Setting("judgement", "counts", "gd", 64, quick=True),
    Setting("judgement", "contrastive", "adam", 64),
)


def side(task: str) -> Side | None:
    """Return the half of the split that a task belongs to; None if it is not in the suite."""
    return next((setting.side for setting in SETTINGS if setting.task == task), None)


def study(
    *,
    backend: str,
    seeds: Sequence[int],
    full: bool = False,
    only: Iterable[str] = (),
    contenders: Sequence[str] = (),
    command: str,
) -> tuple[Study, tuple[str, ...]]:
    """Return the study of the suite, and a reason for each contender that cannot run.

    Parameters
    ----------
    backend : str
        "jax", "torch" or "numpy".
    seeds : sequence of int
        Every run is repeated for each seed.
    full : bool
        All settings and contenders; otherwise ten settings and the main contenders.
    only : iterable of str
        Names of tasks, "development" or "judgement"; by default everything.
    contenders : sequence of str
        Names of contenders; by default those of the suite.
    command : str
        The command line that repeats the study.

    Returns
    -------
    tuple of Study and tuple of str

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    wanted = set(only)
    known = {setting.task for setting in SETTINGS} | {setting.side for setting in SETTINGS}
    for name in wanted - known:
        msg = f"there is no task or side {name!r} in this suite; choose from: {sorted(known)}"
        raise ValueError(msg)
    chosen = [
        setting
        for setting in SETTINGS
        if wanted & {setting.task, setting.side} or not wanted
        if full or setting.quick or setting.task in wanted
    ]
    names = tuple(dict.fromkeys((REFERENCE, *(contenders or (FULL if full else QUICK)))))
    kept, reasons = _runnable(names, backend)
    races = []
    for setting in chosen:
        steps = find_task(setting.task)(seeds[0]).budget(setting.base)
        plain = Race(
            setting.task,
            setting.base,
            backend,
            kept,
            steps,
            tuple(seeds),
            setting.batch_size,
            RECORDING,
        )
        races.append(plain)
        if OURS in kept:
            fewer = steps_at_equal_cost(steps, base=setting.base, backend=backend)
            races.append(
                Race(
                    setting.task,
                    setting.base,
                    backend,
                    (OURS,),
                    fewer,
                    tuple(seeds),
                    setting.batch_size,
                    RECORDING,
                )
            )
    title = "Self-tuning: nothing to choose, against tuned learning rates"
    return Study(title, command, tuple(races), suite=NAME), reasons


def _runnable(names: Iterable[str], backend: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the contenders that can run under a backend, and why the others cannot."""
    kept, reasons = [], []
    for name in names:
        optimizer = registry.find_contender(name).optimizer
        reason = None if optimizer is None else backends.package_obstacle(optimizer, backend)
        if reason is None:
            kept.append(name)
        else:
            reasons.append(reason)
    return tuple(kept), tuple(reasons)


def steps_at_equal_cost(steps: int, *, base: str, backend: str) -> int:
    """Return the length of a self-tuned run that costs as many gradients as a plain one.

    Parameters
    ----------
    steps : int
        Length of the plain run.
    base, backend : str
        For the rule, and the cost of a measurement.

    Returns
    -------
    int
        The cooldown ends there too.
    """
    contender = find_contender(OURS)
    assert contender.rule is not None
    length = steps
    while length > 1:
        rule = contender.rule(length, **contender.settings(find_base(base)))
        found = costs.of_steps(backend, length, rule, curvature=contender.curvature)
        excess = float(np.sum(found)) - steps
        if excess <= 0:
            break
        length -= max(1, int(excess / float(np.max(found))))
    return length
