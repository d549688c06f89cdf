"""The comparison from the command line, and the files it leaves."""

from __future__ import annotations

import importlib.metadata
import math
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import array_api_strict
import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from cdat_lab import tasks
from cdat_lab.cli import app
from cdat_lab.storage import whole
from cdat_lab.tuning import tune

STEPS = "25"  # one length everywhere: the programs are then compiled once


def independent_loss_and_gradient(task: tasks.Task) -> tuple[float, list[np.ndarray]]:
    """The loss of the digits network and its gradient, written out by hand in numpy."""
    w1, b1, w2, b2, w3, b3 = task.params
    h1 = np.tanh(task.inputs @ w1 + b1)
    h2 = np.tanh(h1 @ w2 + b2)
    residual = h2 @ w3 + b3 - task.targets
    d3 = residual / len(residual)
    d2 = d3 @ w3.T * (1 - h2**2)
    d1 = d2 @ w2.T * (1 - h1**2)
    grads = [task.inputs.T @ d1, d1.sum(0), h1.T @ d2, d2.sum(0), h2.T @ d3, d3.sum(0)]
    return 0.5 * np.sum(residual**2) / len(residual), grads


def test_the_task_is_the_same_under_every_backend() -> None:
    torch = pytest.importorskip("torch", reason="compares the task under PyTorch")
    jax = pytest.importorskip("jax", reason="compares the task under JAX")
    task = tasks.load("digits", 0)
    assert task.inputs.shape == (512, 64)
    np.testing.assert_allclose(task.inputs.mean(axis=0), 0, atol=1e-12)
    value, grads = independent_loss_and_gradient(task)

    strict = [array_api_strict.asarray(a) for a in (*task.params, task.inputs, task.targets)]
    assert float(task.loss(strict[:-2], *strict[-2:])) == pytest.approx(value, rel=1e-12)

    params = [torch.tensor(p, requires_grad=True) for p in task.params]
    loss = task.loss(params, torch.tensor(task.inputs), torch.tensor(task.targets))
    assert float(loss.detach()) == pytest.approx(value, rel=1e-12)
    for ours, expected in zip(torch.autograd.grad(loss, params), grads, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-13)

    with jax.enable_x64(True):
        arrays = jax.tree.map(jax.numpy.asarray, (task.params, task.inputs, task.targets))
        found, gradient = jax.value_and_grad(task.loss)(*arrays)
        assert float(found) == pytest.approx(value, rel=1e-12)
        for ours, expected in zip(gradient, grads, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-13)


def test_a_seed_fixes_the_task() -> None:
    first, again, other = (tasks.digits(seed) for seed in (3, 3, 4))
    assert np.array_equal(first.params[0], again.params[0])
    assert np.array_equal(first.inputs, again.inputs)
    assert not np.array_equal(first.params[0], other.params[0])


@pytest.mark.parametrize("optimum", [-9, 0, 7])
def test_the_grid_grows_until_its_optimum_is_inside(optimum: int) -> None:
    tried: list[float] = []

    def final_loss(rate: float) -> float:
        tried.append(rate)
        return (math.log2(rate) - optimum) ** 2 if rate < 2.0 ** (optimum + 2) else math.nan

    grid = tune(final_loss, range(-2, 2))
    assert grid.rates[grid.best] == 2.0**optimum
    assert not grid.at_edge
    assert sorted(tried) == list(grid.rates)
    assert len(set(tried)) == len(tried)


def test_a_grid_that_cannot_grow_further_says_so() -> None:
    grid = tune(lambda rate: -rate, range(-1, 2), max_extensions=3)
    assert grid.at_edge
    assert len(grid.rates) == 6


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old and whole")
    code = f"""
        import os, signal
        from pathlib import Path
        from cdat_lab.storage import whole
        with whole(Path({str(path)!r})) as temporary:
            temporary.write_text("half a ")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old and whole"


def test_an_error_in_the_middle_of_a_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole(tmp_path / "result.txt") as temporary:
            temporary.write_text("half a ")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a short comparison under all installed backends."""
    folder = tmp_path_factory.mktemp("compare")
    arguments = ["compare", "digits", "--steps", STEPS, "--jobs", "2", "--out", str(folder)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_the_backends_agree_on_the_table(compared: tuple[Path, str]) -> None:
    pytest.importorskip("torch", reason="compares two backends")
    pytest.importorskip("jax", reason="compares two backends")
    runs = {path.name: pl.read_parquet(path) for path in (compared[0] / "runs").iterdir()}
    pairs = 0
    for name, frame in runs.items():
        if "-jax-" not in name:
            continue
        key = name.replace("-jax-", "-torch-").rsplit("-", 1)[0]
        twins = [other for other_name, other in runs.items() if other_name.startswith(key + "-")]
        for twin in twins:
            pairs += 1
            one, two = frame[:20], twin[:20]
            if not one["loss"].is_finite().all() or one["loss"].max() > 10 * one["loss"][0]:
                continue  # a diverging run multiplies rounding errors without end
            for column in ("loss", "learning_rate", "slope", "curvature", "sharpness"):
                assert one[column].is_null().equals(two[column].is_null()), (name, column)
                np.testing.assert_allclose(
                    one[column].drop_nulls(), two[column].drop_nulls(), rtol=1e-8, err_msg=name
                )
    assert pairs >= 12  # two bases, six contenders


def test_the_terminal_names_backends_contenders_and_report(compared: tuple[Path, str]) -> None:
    output = compared[1]
    assert output.startswith("backends: ")
    for expected in ("Adam", "Momentum", "CDAT 1.9", "CDAT 2.0", "constant rate", "report:"):
        assert expected in output


def test_the_report_is_one_file_that_loads_nothing(compared: tuple[Path, str]) -> None:
    page = (compared[0] / "report.html").read_text(encoding="utf-8")
    for heading in ("Results", "Tuning grids", "Configuration", "edge of stability"):
        assert heading in page
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<(script|img|iframe|link)[^>]+(src|href)=[\"']?(https?:)?//", page)
    assert "url(http" not in markup


HIDE = """
    import sys

    class Without:
        def __init__(self, finder, hidden):
            self.finder, self.hidden = finder, hidden

        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in self.hidden:
                return None
            return self.finder.find_spec(name, path, target)

        def __getattr__(self, name):  # metadata are found through the same finders
            return getattr(self.finder, name)

    def hide(*names):
        sys.meta_path[:] = [Without(finder, names) for finder in sys.meta_path]
"""


def run_without(*frameworks: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    call = f"""
    hide(*{frameworks!r})
    from cdat_lab.cli import app
    app({arguments!r})
    """
    code = textwrap.dedent(HIDE) + textwrap.dedent(call)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("hidden", "used"), [("torch", "jax"), ("jax", "torch")])
def test_with_one_framework_hidden_the_other_gives_the_same_table_and_is_named(
    tmp_path: Path, compared: tuple[Path, str], hidden: str, used: str
) -> None:
    pytest.importorskip(used, reason=f"runs under {used} alone")
    arguments = ["compare", "digits", "--steps", STEPS, "--jobs", "1", "--out", str(tmp_path)]
    done = run_without(hidden, arguments=arguments)
    assert done.returncode == 0, done.stderr
    assert f'not installed (pip install "cdat[{hidden}]")' in done.stdout
    assert f"{used} {importlib.metadata.version(used)}" in done.stdout
    alone, together = rows(tmp_path, used), rows(compared[0], used)
    assert alone == together
    assert len(alone) == 12  # two bases, six contenders
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == sorted(p.name for p in (compared[0] / "runs").glob(f"digits-{used}-*"))
    for name in names:
        one, two = (pl.read_parquet(folder / "runs" / name) for folder in (tmp_path, compared[0]))
        assert one.equals(two), name


def rows(folder: Path, backend: str) -> list[str]:
    """The lines of the table that belong to one backend."""
    lines = (folder / "table.csv").read_text().splitlines()
    return [line for line in lines if f",{backend}," in line]


def test_without_any_framework_it_says_what_to_install(tmp_path: Path) -> None:
    arguments = ["compare", "digits", "--out", str(tmp_path)]
    done = run_without("torch", "jax", "optax", arguments=arguments)
    assert done.returncode == 1
    assert 'pip install "cdat[jax]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "cats"], "no task 'cats'"),
        (["compare", "digits", "--backend", "mxnet"], "no backend 'mxnet'"),
        (["compare", "digits", "--steps", "0"], "--steps"),
        (["compare", "digits", "--seed", "-1"], "--seed"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output
