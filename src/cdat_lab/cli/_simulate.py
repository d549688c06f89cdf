"""``cdat simulate``: the joint model of rate and sharpness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdat_lab import model, registry
from cdat_lab.claims import verdicts
from cdat_lab.cli import _options, _session
from cdat_lab.findings import Findings
from cdat_lab.studies import Study


def simulate(
    rule: Annotated[
        list[str] | None,
        typer.Option(help="Learning-rate rule; repeatable.  [default: the rules of claim D]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of the model.")] = model.STEPS,
    rate: Annotated[
        float, typer.Option(min=0.0, help="The constant rate, or the peak of a schedule.")
    ] = model.CONSTANT_RATE,
    out: _options.Out = None,
    with_: _options.With = None,
    quiet: _options.Quiet = False,
) -> None:
    """Run the joint model of learning rate and sharpness (claim D) under several rules.

    **Examples**

    `cdat simulate`

    `cdat simulate --rule cdat-1.95 --rule cdat-2 --steps 10000`
    """
    _options.load_files(with_)
    rules = rule or list(model.RULES)
    for name in rules:
        _options.checked("--rule", registry.find_contender, name)
    folder = _options.writable(out or Path("cdat-results") / "simulate")
    arguments = [f"--rule {name}" for name in rule or ()]
    study = Study(
        title="The joint model of learning rate and sharpness",
        command=" ".join(["cdat simulate", *arguments, f"--steps {steps}", f"--rate {rate:g}"]),
        races=(),
        simulated=True,
        claims=("D",),
    )
    simulations = tuple(
        _options.checked("--rule", lambda: model.simulate(rules, steps=steps, learning_rate=rate))
    )
    default = (rule, steps, rate) == (None, model.STEPS, model.CONSTANT_RATE)
    found = verdicts(study, {}, simulations) if default else ()
    findings = Findings(study, {}, simulations, found)
    _session.present(findings, folder, quiet=quiet)
