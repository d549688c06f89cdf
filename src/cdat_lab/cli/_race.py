"""``cdat race``: a suite of races with one verdict."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cdat_lab import self_tuning, standings
from cdat_lab.cli import _options, _session


def race(
    suite: Annotated[str, typer.Argument(help="Name of the suite: self-tuning.")],
    full: Annotated[
        bool,
        typer.Option("--full", help="All settings and contenders; an hour or more."),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A task, 'development' or 'judgement'; repeatable.  [default: all]"),
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(help="Contender; repeatable.  [default: those of the suite]"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds for every run.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    check: Annotated[
        bool,
        typer.Option("--check", help="Exit with status 1 if the self-tuning rule fails a check."),
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(help="jax, torch or numpy.  [default: the first installed]"),
    ] = None,
    out: _options.Out = None,
    jobs: _options.Jobs = None,
    resume: _options.Resume = False,
    with_: _options.With = None,
    dask: _options.Dask = None,
    quiet: _options.Quiet = False,
) -> None:
    """Race learning rates with nothing to choose against tuned ones, on many mini-batch tasks.

    The settings are split into development and judgement. The short form has ten settings.

    **Examples**

    `cdat race self-tuning`

    `cdat race self-tuning --full --resume`

    `cdat race self-tuning --full --only development --contender constant --contender self-tuning`
    """
    _options.load_files(with_)
    if suite != self_tuning.NAME:
        msg = f"there is no suite {suite!r}; choose {self_tuning.NAME}"
        raise typer.BadParameter(msg, param_hint="SUITE")
    chosen = _options.one_backend(backend)
    arguments = [suite, "--backend", chosen, "--seeds", str(seeds), "--first-seed", str(first_seed)]
    arguments += ["--full"] if full else []
    for option, values in (("--only", only), ("--contender", contender), ("--with", with_)):
        for value in values or ():
            arguments += [option, str(value)]
    plan, notices = _options.checked(
        "--only or --contender",
        lambda: self_tuning.study(
            backend=chosen,
            seeds=range(first_seed, first_seed + seeds),
            full=full,
            only=only or (),
            contenders=tuple(contender or ()),
            command=f"cdat race {shlex.join(arguments)}",
        ),
    )
    folder = out or Path("cdat-results") / suite
    findings = _session.carry_out(
        plan, folder, jobs=jobs, resume=resume, quiet=quiet, dask=dask, notices=notices
    )
    found = standings.checks(standings.ratios(findings))
    if check and not (found and all(each.passed for each in found)):
        missed = [f"{each.required}: {each.measured}" for each in found if not each.passed]
        _options.fail("; ".join(missed) or "the self-tuning rule did not run")
