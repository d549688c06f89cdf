"""``cdat reproduce``: test the claims of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdat_lab.claims import STATEMENTS
from cdat_lab.cli import _options, _session
from cdat_lab.reproduce import study


def reproduce(
    only: Annotated[
        str | None,
        typer.Option(
            metavar="CLAIMS", help="Only these claims, e.g. A or A,C.", show_default=False
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds for every run.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    full: Annotated[
        bool, typer.Option("--full", help="More tasks and contenders; takes hours.")
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(help="jax, torch or numpy.  [default: the first installed]"),
    ] = None,
    out: _options.Out = None,
    jobs: _options.Jobs = None,
    resume: _options.Resume = False,
    dask: _options.Dask = None,
    quiet: _options.Quiet = False,
) -> None:
    """Test the claims of "Stepping on the Edge" and write a report with verdicts.

    A: full batch, greedy tuners lose to a tuned constant rate. B: CDAT near sigma 2 wins. C: the
    best sigma falls as the batch shrinks. D: a joint model of rate and sharpness explains it.

    **Examples**

    `cdat reproduce`

    `cdat reproduce --only C --seeds 5 --backend torch`

    `cdat reproduce --resume`
    """
    wanted = tuple(dict.fromkeys(part.strip().upper() for part in (only or "").split(",") if part))
    for claim in wanted:
        if claim not in STATEMENTS:
            msg = f"there is no claim {claim!r}; choose one of: {', '.join(STATEMENTS)}"
            raise typer.BadParameter(msg, param_hint="--only")
    chosen = _options.one_backend(backend)
    numbers = tuple(range(first_seed, first_seed + seeds))
    arguments = [f"--backend {chosen}", f"--seeds {seeds}", f"--first-seed {first_seed}"]
    arguments += [f"--only {','.join(wanted)}"] if wanted else []
    arguments += ["--full"] if full else []
    plan = study(
        backend=chosen,
        seeds=numbers,
        only=wanted,
        full=full,
        command=" ".join(["cdat reproduce", *arguments]),
    )
    folder = out or Path("cdat-results") / "reproduce"
    _session.carry_out(plan, folder, jobs=jobs, resume=resume, quiet=quiet, dask=dask)
