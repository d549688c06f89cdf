"""``cdat compare``: compare learning-rate rules on one task."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cdat_lab import comparison, registry
from cdat_lab.cli import _options, _session
from cdat_lab.contenders import CONTENDERS


def compare(
    task: Annotated[str, typer.Argument(help="Name of a task; `cdat tasks` lists them.")],
    base: Annotated[
        list[str] | None,
        typer.Option(help="Base optimizer; repeatable.  [default: adam and momentum]"),
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            help="Learning-rate rule, or 'all'; repeatable. `cdat-SIGMA` and "
            "`cdat-SIGMA-ema-DECAY` are rules too.  [default: six rules]"
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="jax, torch, numpy, or all: every framework installed.")
    ] = "all",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of each run.  [default: the task's budget]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a mini-batch.  [default: all data]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, weights and batches.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds, counting up from --seed.")
    ] = 1,
    out: _options.Out = None,
    jobs: _options.Jobs = None,
    resume: _options.Resume = False,
    with_: _options.With = None,
    dask: _options.Dask = None,
    quiet: _options.Quiet = False,
) -> None:
    """Train with every rule on a task; print a table and write an HTML report.

    Rates are tuned by factors of 2, then sqrt(2), separately for each seed.

    **Examples**

    `cdat compare digits`

    `cdat compare digits --base adam --contender constant --contender cdat-1.5 --seeds 3`

    `cdat compare spiral --with spiral.py --backend torch --batch-size 64`
    """
    _options.load_files(with_)
    _options.checked("TASK", registry.find_task, task)
    for name in base or ():
        _options.checked("--base", registry.find_base, name)
    names = tuple(contender or comparison.CONTENDERS)
    names = tuple(CONTENDERS) if "all" in names else names
    for name in names:
        _options.checked("--contender", registry.find_contender, name)
    arguments = [task, "--backend", backend, "--seed", str(seed), "--seeds", str(seeds)]
    for option, values in (("--base", base), ("--contender", contender), ("--with", with_)):
        for value in values or ():
            arguments += [option, str(value)]
    for option, number in (("--steps", steps), ("--batch-size", batch_size)):
        arguments += [option, str(number)] if number else []
    plan, notices = _options.checked(
        "--batch-size" if batch_size else "TASK",
        lambda: comparison.study(
            task,
            bases=base or comparison.BASES,
            contenders=names,
            backend_names=_options.several_backends(backend),
            steps=steps,
            batch_size=batch_size,
            seeds=range(seed, seed + seeds),
            command=f"cdat compare {shlex.join(arguments)}",
        ),
    )
    _session.carry_out(
        plan,
        out or Path("cdat-results") / task,
        jobs=jobs,
        resume=resume,
        quiet=quiet,
        dask=dask,
        notices=notices,
    )
