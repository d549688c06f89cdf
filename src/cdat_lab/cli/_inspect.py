"""Commands that inspect: ``cdat sharpness``, ``cdat tasks`` and ``cdat report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdat_lab import backends, registry, runs, terminal
from cdat_lab.backends import Problem
from cdat_lab.bases import BASES
from cdat_lab.cli import _options, _session
from cdat_lab.conduct import reopen
from cdat_lab.contenders import CONTENDERS
from cdat_lab.tasks import TASKS


def sharpness(
    task: Annotated[str, typer.Argument(help="Name of a task; `cdat tasks` lists them.")],
    base: Annotated[str, typer.Option(help="Base optimizer.")] = "gd",
    rule: Annotated[str, typer.Option(help="Learning-rate rule.")] = "constant",
    rate: Annotated[
        float, typer.Option(min=0.0, help="The constant rate, or the peak of a schedule.")
    ] = 0.01,
    steps: Annotated[int, typer.Option(min=1, help="Steps to train.")] = 400,
    records: Annotated[int, typer.Option(min=1, help="Approximate number of table rows.")] = 10,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a mini-batch.  [default: all data]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, weights and batches.")] = 0,
    backend: Annotated[
        str | None, typer.Option(help="jax, torch or numpy.  [default: the first installed]")
    ] = None,
    with_: _options.With = None,
) -> None:
    """Train once and print how the sharpness, the largest eigenvalue of the Hessian, changes.

    With RMSProp and Adam the Hessian is preconditioned. The last column is rate x sharpness
    relative to the edge of stability, so the edge is at 1.

    **Examples**

    `cdat sharpness teacher-student --rate 0.05 --steps 2000`

    `cdat sharpness digits --base adam --rule cdat-1.9`
    """
    _options.load_files(with_)
    problem = _options.checked("TASK", registry.find_task, task)(seed)
    contender = _options.checked("--rule", registry.find_contender, rule)
    optimizer = _options.checked("--base", registry.find_base, base)
    name = _options.one_backend(backend)
    if contender.rule is None:
        msg = f"must be a learning-rate rule, but {rule} is a complete optimizer"
        raise typer.BadParameter(msg, param_hint="--rule")
    _options.checked("--batch-size", problem.check_batch_size, batch_size)
    settings = contender.settings(optimizer)
    if contender.tuned is not None:
        settings[contender.tuned] = rate
    run = Problem(
        task=problem,
        base=optimizer,
        contender=contender,
        hyperparameters=settings,
        steps=steps,
        record_every=max(1, steps // records),
        sharpness=True,
        batch_size=batch_size,
        seed=seed,
    )
    with backends.single_threaded():
        trajectory = backends.load(name)(run)
    frame = runs.to_frame(run, trajectory, backend=name)
    terminal.show_sharpness(terminal.make_console(), run, frame)


def tasks(with_: _options.With = None) -> None:
    """List the tasks, base optimizers and rules that the other commands know.

    **Example**

    `cdat tasks`
    """
    _options.load_files(with_)
    console = terminal.make_console()
    described = [(name, factory(0).description) for name, factory in TASKS.items()]
    terminal.show_list(console, "Tasks", described)
    terminal.show_list(console, "Base optimizers", [(b.name, b.label) for b in BASES.values()])
    rules = [(c.name, c.label) for c in CONTENDERS.values()]
    terminal.show_list(console, "Learning-rate rules", rules)
    shown = [(b.name, b.describe()) for b in backends.BACKENDS.values()]
    terminal.show_list(console, "Backends", shown)


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder that `cdat compare` or `cdat reproduce` wrote to.")
    ],
    with_: _options.With = None,
    quiet: _options.Quiet = False,
) -> None:
    """Write the report of a folder again from its runs, without training.

    Runs from other versions and damaged files are left out, with a notice.

    **Example**

    `cdat report cdat-results/reproduce`
    """
    _options.load_files(with_)
    findings = _options.checked("DIR", reopen, folder)
    for notice in findings.notices:
        typer.echo(f"note: {notice}", err=True)
    _session.present(findings, folder, quiet=quiet)
