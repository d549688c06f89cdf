"""Commands as a user types them, and the files they write."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from cdat_lab import backends
from cdat_lab.cli import app

SMALL = ["--steps", "25", "--contender", "constant", "--contender", "armijo"]
SMALL += ["--contender", "cdat-1.9", "--base", "adam", "--base", "momentum"]


def invoked(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a short comparison under all installed frameworks."""
    folder = tmp_path_factory.mktemp("compare")
    return folder, invoked("compare", "digits", *SMALL, "--jobs", "1", "--out", str(folder))


def by_settings(folder: Path, backend: str) -> dict[str, pl.DataFrame]:
    """The runs of a backend by their names without backend and digest."""
    found = {}
    for path in (folder / "runs").glob(f"*-{backend}-*.parquet"):
        frame = pl.read_parquet(path)
        name = path.name.replace(f"-{backend}-", "-").rsplit("-", 1)[0]
        rate = frame["learning_rate"][0] if "constant" in name else 0
        found[f"{name} {rate} {frame['sharpness'].null_count()}"] = frame
    return found


def test_the_backends_agree_step_by_step(compared: tuple[Path, str]) -> None:
    pytest.importorskip("torch", reason="compares two backends")
    pytest.importorskip("jax", reason="compares two backends")
    ours, theirs = (by_settings(compared[0], backend) for backend in ("jax", "torch"))
    pairs = ours.keys() & theirs.keys()
    assert len(pairs) >= 14  # four grids of at least five, four rules without one
    compared_pairs = 0
    for name in pairs:
        one, two = ours[name], theirs[name]
        if not one["loss"].is_finite().all() or one["loss"].max() > 10 * one["loss"][0]:
            continue  # a diverging run amplifies rounding errors without bound
        compared_pairs += 1
        for column in ("loss", "full_loss", "learning_rate", "slope", "curvature", "sharpness"):
            a, b = one[column][:20], two[column][:20]
            assert a.is_null().equals(b.is_null()), (name, column)
            tolerance = 1e-6 if column == "sharpness" else 1e-8  # Lanczos stops before converging
            np.testing.assert_allclose(a.drop_nulls(), b.drop_nulls(), tolerance, err_msg=name)
        assert one["trials"].equals(two["trials"]), name
    assert compared_pairs >= 8


def test_numpy_takes_the_same_steps(compared: tuple[Path, str], tmp_path: Path) -> None:
    arguments = ["--steps", "25", "--contender", "cdat-1.9", "--contender", "armijo"]
    arguments += ["--base", "adam", "--backend", "numpy", "--jobs", "1", "--out", str(tmp_path)]
    invoked("compare", "digits", *arguments)
    framework = next(b.name for b in backends.available() if b.name != "numpy")
    ours, theirs = by_settings(tmp_path, "numpy"), by_settings(compared[0], framework)
    assert len(ours) == 2
    for name, frame in ours.items():
        for column in ("loss", "learning_rate"):
            np.testing.assert_allclose(
                frame[column][:20], theirs[name][column][:20], 1e-8, err_msg=name
            )


def test_the_terminal_names_backends_contenders_and_report(compared: tuple[Path, str]) -> None:
    output = compared[1]
    assert output.startswith("backends: ")
    for expected in ("Adam", "Momentum", "CDAT 1.9", "constant rate", "report:"):
        assert expected in output
    if len(backends.available()) > 2:
        assert "the losses under jax and torch differ by less than" in output


def test_the_report_is_one_file_that_loads_nothing(compared: tuple[Path, str]) -> None:
    page = (compared[0] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|img|iframe|link)[^>]+(src|href)=[\"']?(https?:)?//", page)


def test_the_report_can_be_written_again_from_its_folder(compared: tuple[Path, str]) -> None:
    folder = compared[0]
    before = {name: (folder / name).read_bytes() for name in ("table.csv", "verdicts.csv")}
    for name in before:
        (folder / name).unlink()
    invoked("report", str(folder))
    for name, content in before.items():
        assert (folder / name).read_bytes() == content


def test_mini_batches_are_the_same_under_every_backend(tmp_path: Path) -> None:
    frames = []
    for name in [b.name for b in backends.available()]:
        arguments = ["--steps", "20", "--batch-size", "64", "--contender", "cdat-1.5-ema-0.9"]
        arguments += ["--base", "adam", "--backend", name, "--out", str(tmp_path / name), "-q"]
        invoked("compare", "digits", *arguments)
        (path,) = (tmp_path / name / "runs").glob("*.parquet")
        frames.append(pl.read_parquet(path))
    assert frames[0]["loss"].n_unique() > 15
    for other in frames[1:]:
        for column in ("loss", "full_loss", "learning_rate"):
            np.testing.assert_allclose(
                other[column].drop_nulls(), frames[0][column].drop_nulls(), rtol=1e-8
            )


SPIRAL = """
    import numpy as np
    from cdat_core import tuners
    from cdat_lab import Base, Contender, Task, register_base, register_contender, register_task

    def model(xp, params, inputs):
        return xp.tanh(inputs @ params[0]) @ params[1]

    def criterion(xp, outputs, targets):
        return xp.mean((outputs - targets) ** 2)

    def spiral(seed):
        rng = np.random.default_rng(seed)
        angle = rng.uniform(0, 6, (200, 1))
        inputs = angle * np.concatenate([np.cos(angle), np.sin(angle)], axis=1) / 6
        weights = (rng.standard_normal((2, 16)), rng.standard_normal((16, 1)) / 4)
        return Task("spiral", "a spiral <&>", inputs, np.sin(angle), weights, model, criterion)

    def halved(steps, factor):
        return tuners.cdat(factor, 0.5)

    register_task("spiral", spiral)
    register_contender(Contender("mine", "my <b>rule</b>", halved, {"factor": 0.5}))
    try:
        import torch
    except ImportError:
        torch = None
    try:
        import optax
    except ImportError:
        optax = None
    register_base(
        Base(
            "lion",
            "Lion",
            optax=optax and (lambda: optax.lion(1.0)),
            torch=torch and (lambda params: torch.optim.NAdam(params)),
        )
    )
"""


def test_your_own_task_rule_and_base_race_in_worker_processes(tmp_path: Path) -> None:
    file = tmp_path / "spiral.py"
    file.write_text(textwrap.dedent(SPIRAL))
    call = ["compare", "spiral", "--with", str(file), "--steps", "20", "--base", "lion"]
    call += ["--base", "gd", "--contender", "constant", "--contender", "mine", "--jobs", "2"]
    call += ["--out", str(tmp_path / "out")]
    # In another process: what is registered stays registered.
    done = run("cdat", call)
    assert done.returncode == 0, done.stderr
    assert "my <b>rule</b>" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "a spiral &lt;&amp;&gt;" in page
    assert "<b>rule</b>" not in page
    again = run("cdat", [*call, "--resume"])
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").iterdir()}
    file.write_text(file.read_text() + "\n# changed\n")
    changed = run("cdat", [*call, "--resume"])
    assert again.returncode == changed.returncode == 0
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2 * len(stamps)


def run(name: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    code = f"from cdat_lab.cli import app; app({list(arguments)!r}, prog_name={name!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_simulate_writes_a_report_of_the_joint_model(tmp_path: Path) -> None:
    output = invoked(
        "simulate",
        "--steps",
        "60",
        "--rule",
        "cdat-2",
        "--rule",
        "constant",
        "--out",
        str(tmp_path),
    )
    assert "CDAT 2 (no EMA)" in output
    assert (tmp_path / "report.html").is_file()


def test_sharpness_prints_the_edge() -> None:
    output = invoked("sharpness", "digits", "--steps", "20", "--records", "2", "--rate", "0.1")
    assert "edge of stability: rate x sharpness = 2" in output
    lines = [line.split() for line in output.splitlines() if re.match(r"\s+\d+ ", line)]
    assert [line[0] for line in lines] == ["0", "10", "20"]
    assert float(lines[1][1]) < float(lines[0][1])


def test_tasks_lists_tasks_bases_rules_and_backends() -> None:
    output = invoked("tasks")
    for name in ("teacher-student", "characters", "rmsprop", "armijo", "numpy"):
        assert name in output


@pytest.mark.parametrize(
    "command", ["compare", "race", "reproduce", "simulate", "sharpness", "tasks", "report"]
)
def test_help_has_examples(command: str) -> None:
    output = invoked(command, "--help")
    assert "Example" in output
    assert f"cdat {command}" in output


HIDE = """
    import sys

    class Without:
        def __init__(self, finder, hidden):
            self.finder, self.hidden = finder, hidden

        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in self.hidden:
                return None
            return self.finder.find_spec(name, path, target)

        def __getattr__(self, name):  # metadata is found through the same finders
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
    arguments = ["compare", "digits", *SMALL, "--jobs", "1", "--out", str(tmp_path)]
    done = run_without(hidden, arguments=arguments)
    assert done.returncode == 0, done.stderr
    assert f'not installed (pip install "cdat[{hidden}]")' in done.stdout
    assert f"{used} {importlib.metadata.version(used)}" in done.stdout
    alone, together = rows(tmp_path, used), rows(compared[0], used)
    assert alone == together
    assert len(alone) == 6  # two bases, three contenders


def rows(folder: Path, backend: str) -> list[str]:
    """The lines of the table that belong to one backend."""
    lines = (folder / "table.csv").read_text().splitlines()
    return [line for line in lines if f",{backend}," in line]


def test_without_any_framework_numpy_runs(tmp_path: Path) -> None:
    arguments = ["compare", "digits", "--steps", "5", "--contender", "cdat-1.9"]
    done = run_without("torch", "jax", "optax", arguments=[*arguments, "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert 'pip install "cdat[jax]"' in done.stdout


def test_without_any_backend_it_says_what_to_install(tmp_path: Path) -> None:
    arguments = ["compare", "digits", "--out", str(tmp_path)]
    done = run_without("torch", "jax", "optax", "autograd", arguments=arguments)
    assert done.returncode == 1
    assert 'pip install "cdat[jax]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "digit"], "did you mean digits"),
        (["compare", "../digits"], "there is no task '../digits'"),
        (["compare", "digits", "--backend", "mxnet"], "no backend 'mxnet'"),
        (["compare", "digits", "--base", "adom"], "did you mean adam"),
        (["compare", "digits", "--contender", "gredy"], "did you mean greedy"),
        (["compare", "digits", "--steps", "0"], "--steps"),
        (["compare", "digits", "--seed", "-1"], "--seed"),
        (["compare", "digits", "--batch-size", "513"], "at most 512"),
        (["compare", "digits", "--with", "nowhere.py"], "there is no file nowhere.py"),
        (["reproduce", "--only", "E"], "no claim 'E'"),
        (["simulate", "--rule", "prodigy"], "complete optimizer"),
        (["report", "nowhere"], "has no study.json"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert message in result.output
