"""The tutorial's recipe: a process killed during a save leaves the checkpoint before it intact."""

from __future__ import annotations

import ast
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cdat_torch import CDAT
from docs.run_snippets import python_blocks

ROOT = Path(__file__).parents[2]
MOMENTS = [0.0, 0.5, 0.95]


def recipe() -> tuple[Callable[..., None], Callable[..., None]]:
    """`save` and `load` from the tutorial, with its imports and nothing else."""
    namespace: dict[str, Any] = {}
    for _, code in python_blocks(ROOT / "docs" / "tutorial_torch.md"):
        for node in ast.parse(code).body:
            wanted = isinstance(node, ast.FunctionDef) and node.name in {"save", "load"}
            if wanted or isinstance(node, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([node], []), "tutorial_torch.md", "exec"), namespace)
    return namespace["save"], namespace["load"]


def parts() -> tuple[nn.Module, CDAT, Any, torch.Generator]:
    model = nn.Linear(1000, 1000)
    optimizer = CDAT(torch.optim.Adam(model.parameters()), sigma=1.0)
    optimizer.step(lambda: model(torch.ones(1, 1000)).square().mean())
    return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer), torch.Generator()


def mark(number: int, model: nn.Module, optimizer: CDAT, scheduler: Any, generator: Any) -> None:
    """Write the number into everything that a checkpoint contains."""
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(number)
            optimizer.state[p]["exp_avg"].fill_(number)
    optimizer.param_groups[0]["lr"] = float(number)
    scheduler.last_epoch = number
    generator.manual_seed(number)


def numbers(model: nn.Module, optimizer: CDAT, scheduler: Any, generator: Any) -> set[float]:
    """The numbers found there."""
    found = {float(x) for p in model.parameters() for x in p.detach().unique()}
    found |= {float(x) for s in optimizer.state.values() for x in s["exp_avg"].unique()}
    return found | {optimizer.param_groups[0]["lr"], scheduler.last_epoch, generator.initial_seed()}


def save_for_ever(path: Path) -> None:
    """What the process to be killed does; it prints the number of each finished save."""
    torch.set_num_threads(1)
    save, _ = recipe()
    everything = parts()
    for number in itertools.count(1):
        mark(number, *everything)
        save(path, *everything)
        print(number, flush=True)


@contextmanager
def saving(path: Path) -> Iterator[subprocess.Popen[str]]:
    code = "import sys; from pathlib import Path; from tests.torch import test_killed_while_saving"
    code += " as here; here.save_for_ever(Path(sys.argv[1]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def finished(process: subprocess.Popen[str]) -> int:
    """Wait for one more save and return its number."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the process has ended"
    return int(line)


def stop_within_a_save(process: subprocess.Popen[str], path: Path, fraction: float) -> int:
    """Stop the process when `fraction` of the temporary file is written; return its size."""
    beside, whole = path.with_suffix(".part"), path.stat().st_size
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if beside.stat().st_size < fraction * whole:
                continue
        except FileNotFoundError:
            continue
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        if beside.exists() and fraction * whole <= beside.stat().st_size < whole:
            return beside.stat().st_size
        process.send_signal(signal.SIGCONT)
        time.sleep(random.Random(deadline).uniform(0, 0.01))
    raise AssertionError("no save was caught")


@pytest.mark.parametrize("fraction", MOMENTS)
def test_a_process_killed_within_a_save_leaves_the_checkpoint_before(
    tmp_path: Path, fraction: float
) -> None:
    path = tmp_path / "run.pt"
    with saving(path) as process:
        known = finished(process)
        size = stop_within_a_save(process, path, fraction)
        process.kill()
        rest, _ = process.communicate()
    known = max([known, *map(int, rest.split())])

    torn = path.with_suffix(".part")
    assert torn.stat().st_size == size < path.stat().st_size
    with pytest.raises((RuntimeError, EOFError)):
        torch.load(torn, weights_only=True)
    save, load = recipe()
    again = parts()
    load(path, *again)
    assert numbers(*again) == {known}

    mark(known + 1, *again)  # and the run goes on, over the torn file
    save(path, *again)
    load(path, *parts())
    assert not torn.exists()


def test_a_process_killed_at_any_moment_leaves_one_that_loads(tmp_path: Path) -> None:
    _, load = recipe()
    pauses = random.Random(0)
    for attempt in range(2):
        path = tmp_path / f"{attempt}.pt"
        with saving(path) as process:
            known = finished(process)
            time.sleep(pauses.uniform(0, 0.2))
            process.kill()
            rest, _ = process.communicate()
        known = max([known, *map(int, rest.split())])
        again = parts()
        load(path, *again)
        assert numbers(*again) <= {known, known + 1}  # renamed, but not yet said so
        assert len(numbers(*again)) == 1
