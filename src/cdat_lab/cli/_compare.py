"""``cdat compare``: rules for the learning rate against each other on one task."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cdat_lab import registry
from cdat_lab.cli import _options, _session
from cdat_lab.claims import STATEMENTS
from cdat_lab.races import Race
from cdat_lab.studies import Study, eligible

DEFAULT_BASES = ("adam", "momentum")
DEFAULT_CONTENDERS = (
    "constant",
    "warmup-cosine",
    "armijo",
    "greedy",
    "cdat-1.9",
    "cdat-2-ema-0.9",
)


def compare(
    task: Annotated[str, typer.Argument(help="Name of a task; `cdat tasks` lists them.")],
    base: Annotated[
        list[str] | None,
        typer.Option(help="Base optimizer; repeatable.  [default: adam and momentum]"),
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            help="Rule for the rate, or 'all'; repeatable. `cdat-SIGMA` and `cdat-SIGMA-ema-DECAY` "
            "are rules too.  [default: six of them]"
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="jax, torch, numpy, or all frameworks installed.")
    ] = "all",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of each run.  [default: the task's budget]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a mini-batch.  [default: all data]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, weights and batches.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds, counted up from --seed.")
    ] = 1,
    out: _options.Out = None,
    jobs: _options.Jobs = None,
    resume: _options.Resume = False,
    with_: _options.With = None,
    dask: _options.Dask = None,
    quiet: _options.Quiet = False,
) -> None:
    """Train with every rule on a task; print a table and write an HTML report.

    Rates are tuned by factors of 2, then sqrt(2), each seed for itself.

    **Examples**

    `cdat compare digits`

    `cdat compare digits --base adam --contender constant --contender cdat-1.5 --seeds 3`

    `cdat compare spiral --with spiral.py --backend torch --batch-size 64`
    """
    _options.load_files(with_)
    factory = _options.checked("TASK", registry.find_task, task)
    problem = factory(seed)
    names = contender or list(DEFAULT_CONTENDERS)
    if names == ["all"]:
        names = list(registry.CONTENDERS)
    names = [_options.checked("--contender", registry.find_contender, n).name for n in names]
    if batch_size is not None and batch_size > len(problem.inputs):
        raise typer.BadParameter(
            f"must be at most {len(problem.inputs)}, the rows of {task}, got {batch_size}",
            param_hint="--batch-size",
        )
    races, notices = [], []
    for backend_name in _options.several_backends(backend):
        for base_name in dict.fromkeys(base or DEFAULT_BASES):
            _options.checked("--base", registry.find_base, base_name)
            kept, left_out = eligible(dict.fromkeys(names), base=base_name, backend=backend_name)
            notices += left_out
            if not kept:
                continue
            races.append(
                Race(
                    task=task,
                    base=base_name,
                    backend=backend_name,
                    contenders=tuple(kept),
                    steps=steps or problem.budget(base_name),
                    seeds=tuple(range(seed, seed + seeds)),
                    batch_size=batch_size,
                )
            )
    if not races:
        _options.fail(f"nothing to run: {'; '.join(dict.fromkeys(notices))}")
    folder = out or Path("cdat-results") / task
    arguments = [task, "--backend", backend, "--seed", str(seed), "--seeds", str(seeds)]
    for option, values in (("--base", base), ("--contender", contender), ("--with", with_)):
        for value in values or ():
            arguments += [option, str(value)]
    for option, number in (("--steps", steps), ("--batch-size", batch_size)):
        arguments += [option, str(number)] if number else []
    study = Study(
        title=f"Learning-rate tuners on {task}",
        command=f"cdat compare {shlex.join(arguments)}",
        races=tuple(sorted(races, key=lambda race: race.base != races[0].base)),
        claims=tuple(STATEMENTS),
    )
    _session.carry_out(
        study,
        folder,
        jobs=jobs,
        resume=resume,
        quiet=quiet,
        dask=dask,
        notices=tuple(dict.fromkeys(notices)),
    )
