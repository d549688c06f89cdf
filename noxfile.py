"""Every check is a session: ``nox`` runs the default ones; ``nox -s demo`` compares six rules.

Sessions share virtual environments: ``env(core)`` has no framework, ``env(jax)`` and ``env(torch)``
have one, ``env(all)`` has everything. One run of nox installs each at most once.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import nox

nox.needs_version = ">=2026.10.20"  # runs sessions in parallel
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True
if len(sys.argv) == 1:  # the default run; a session that is named shows its output as it comes
    nox.options.parallel = 2

PYPROJECT = nox.project.load_toml("pyproject.toml")
SINGLE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
# XLA then compiles in about half the time, to slower code. It stops at a flag that it does not
# know, so this is only for the version in constraints.txt.
QUICK_COMPILATION = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
ENVIRONMENTS = {
    "core": (".", "test", "lint", "imports", "workflows"),
    "jax": (".[jax]", "test"),
    "torch": (".[torch]", "test"),
    "all": (".[all]", "test", "lab", "embedding", "jax_ecosystem", "types", "docs"),
}
FOLDERS = ("core", "jax", "torch", "distributed", "parity", "embedding", "lab")
TESTS = tuple(f"tests/{folder}" for folder in FOLDERS)
BITWISE = ("tests/jax",)
QUICK = (
    "core/test_imports.py",
    "core/test_tuner_laws.py",
    "core/test_curvature.py",
    "core/test_lanczos.py",
    "jax/test_curvature.py::test_exact_methods_match_the_dense_hessian",
    "jax/test_transform.py",
    "torch/replay/test_rules.py::test_slope_and_curvature_are_exact",
    "torch/test_checkpoint.py::test_resume_is_bit_exact",
    "torch/test_curvature.py",
    "torch/test_optimizer.py",
    "parity/test_quadratics.py::test_measurement_equals_the_closed_form",
    "parity/test_rules.py",
    "parity/test_tanh_network.py::test_measurements_of_both_adapters_equal_each_other",
)
"""The laws of tuners, exact measurements, and whether backends agree: most faults show there."""


def install(session: nox.Session, package: str, *groups: str) -> None:
    """Install the package with its extras and the dependency groups, at the tested versions.

    pip installs torch, because uv ignores an index that pip is set to use, and would take the build
    with CUDA. uv installs the rest in a fraction of pip's time.
    """
    constraints = ("--constraint", "constraints.txt")
    torch = ["torch"] if "torch" in package or "all" in package else []
    session.install("--no-compile", *constraints, "uv", *torch)
    requirements = nox.project.dependency_groups(PYPROJECT, *groups) if groups else []
    everything = (*constraints, "--editable", package, *requirements)
    try:
        session.run_install("uv", "pip", "install", *everything)
    except nox.command.CommandFailed:  # uv does not read pip's settings: an index, a certificate
        session.install("--no-compile", *everything)


@nox.session(default=False, allow_parallel=True)
@nox.parametrize("name", list(ENVIRONMENTS), ids=list(ENVIRONMENTS))
def env(session: nox.Session, name: str) -> None:
    """Make an environment that sessions share."""
    install(session, *ENVIRONMENTS[name])


def session_in(
    environment: str, *, default: bool = True, one_core: bool = False
) -> Callable[..., nox.registry.Func]:
    """Register a session that runs in a shared environment, beside another one on one core."""

    def register(function: Callable[[nox.Session], None]) -> nox.registry.Func:
        @functools.wraps(function)
        def session_in_environment(session: nox.Session) -> None:
            folder = session.cache_dir.parent / f"env-{environment}"
            programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
            session.env["VIRTUAL_ENV"] = str(folder)
            session.env["PATH"] = os.pathsep.join([str(programs), os.environ["PATH"]])
            function(session)

        return nox.session(
            venv_backend="none",
            requires=[f"env({environment})"],
            default=default,
            allow_parallel=one_core,
        )(session_in_environment)

    return register


def run(session: nox.Session, program: str, *arguments: str, **environment: str) -> None:
    """Run a program of the environment of the session, shared or its own."""
    path = shutil.which(program, path=session.env.get("PATH") or session.bin)
    session.run(path or program, *arguments, env=SINGLE_THREAD | environment)


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run tests: those that the arguments after ``--`` name, or the default with these options.

    Tests that compare bits run apart, under XLA as users have it.
    """
    named = any(Path(argument.partition("::")[0]).exists() for argument in session.posargs)
    if named:
        run(session, "pytest", "--numprocesses=2", *session.posargs)
        return
    chosen = ("pytest", "--numprocesses=2", *arguments, *session.posargs)
    run(session, *chosen, "-m", "not bitwise", **QUICK_COMPILATION)
    if arguments[-1] in BITWISE:
        run(session, *chosen, "-m", "bitwise")


def pytest_each(session: nox.Session, *options: str, folders: Sequence[str] = TESTS) -> None:
    """Run the tests of each folder by itself; the arguments after ``--`` may name others."""
    for folder in session.posargs or folders:
        run(session, "pytest", "--numprocesses=2", "--dist=loadscope", *options, folder)


@session_in("core", one_core=True)
def lint(session: nox.Session) -> None:
    """Check the style, and that the core imports no framework (banned-api)."""
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")


@session_in("core", one_core=True)
def imports(session: nox.Session) -> None:
    """Check the import directions, and that the picture of the layout is current."""
    run(session, "lint-imports")
    run(session, "python", "docs/layout_picture.py", "--check")


@session_in("core", one_core=True)
def workflows(session: nox.Session) -> None:
    """Check the GitHub workflows, issue forms and other configuration of services."""
    github = Path(".github")
    schemas = {
        "github-workflows": sorted(github.glob("workflows/*.yml")),
        "github-issue-forms": sorted(github.glob("ISSUE_TEMPLATE/[0-9]*.yml")),
        "github-issue-config": [github / "ISSUE_TEMPLATE/config.yml"],
        "dependabot": [github / "dependabot.yml"],
        "readthedocs": [Path(".readthedocs.yaml")],
        "citation-file-format": [Path("CITATION.cff")],
    }
    for schema, files in schemas.items():
        run(session, "check-jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files))
    run(session, "zizmor", "--offline", "--persona=pedantic", ".github")


@session_in("core")
def core(session: nox.Session) -> None:
    """Test the core with no framework installed."""
    absent = (
        "import importlib.util as u; assert not any(map(u.find_spec, ('jax', 'torch', 'optax')))"
    )
    run(session, "python", "-c", absent)
    pytest(session, "tests/core")


@session_in("jax")
def jax(session: nox.Session) -> None:
    """Test the JAX adapter, without torch."""
    # Each module in one process, because its tests share compiled functions.
    pytest(session, "--dist=loadscope", "tests/jax")


@session_in("torch")
def torch(session: nox.Session) -> None:
    """Test the PyTorch adapter, without JAX."""
    pytest(session, "tests/torch")


@session_in("torch")
def distributed(session: nox.Session) -> None:
    """Test the PyTorch adapter in two and four processes."""
    pytest(session, "tests/distributed")


@session_in("all", one_core=True)
def types(session: nox.Session) -> None:
    """Check types with mypy --strict on src, all frameworks installed."""
    run(session, "mypy")


@session_in("all")
def parity(session: nox.Session) -> None:
    """Check that all backends compute the same thing."""
    pytest(session, "--dist=loadscope", "tests/parity")


@session_in("all")
def embedding(session: nox.Session) -> None:
    """Test the core under array frameworks without an adapter: the examples of the docs."""
    pytest(session, "tests/embedding")


@session_in("all")
def lab(session: nox.Session) -> None:
    """Test the lab and its command line."""
    pytest(session, "--dist=loadfile", "tests/lab")


@session_in("all")
def doctests(session: nox.Session) -> None:
    """Run the examples in docstrings, the README and the docs."""
    run(session, "pytest", "--numprocesses=2", "--doctest-modules", "src")
    pages = ["README.md", "CONTRIBUTING.md", *map(str, Path("docs").glob("*.md"))]
    run(session, "python", "docs/run_snippets.py", *pages)


@session_in("all", one_core=True)
def docs(session: nox.Session) -> None:
    """Build the documentation; warnings are errors."""
    options = ("-n", "-W", "--keep-going", "-b", "html")
    run(session, "sphinx-build", *options, "docs", "docs/_build/html")


@session_in("all", default=False)
def quick(session: nox.Session) -> None:
    """Run a fast selection of tests of the core, JAX, PyTorch and parity: under 90 seconds."""
    pytest(session, *(f"tests/{file}" for file in QUICK))


@session_in("all", default=False)
def full(session: nox.Session) -> None:
    """Run every test with every combination of its parameters."""
    pytest_each(session, "--full")


def floors() -> list[str]:
    """Return the requirements of the package and its extras, each at its lower bound."""
    project = PYPROJECT["project"]
    stated = [project["dependencies"], *project["optional-dependencies"].values()]
    return [each.replace(">=", "==") for each in itertools.chain(*stated) if ">=" in each]


@nox.session(default=False)
def oldest(session: nox.Session) -> None:
    """Test with the oldest versions that pyproject.toml states; posargs are folders of tests."""
    constraints = Path(session.create_tmp()) / "oldest.txt"
    constraints.write_text("\n".join(floors()), encoding="utf-8")
    requirements = nox.project.dependency_groups(PYPROJECT, "test", "lab")
    session.install("--constraint", str(constraints), "--editable", ".[all]", *requirements)
    pytest_each(session, folders=[folder for folder in TESTS if folder != "tests/embedding"])


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """Test with the newest versions, pre-releases included; posargs are folders of tests."""
    requirements = nox.project.dependency_groups(PYPROJECT, "test", "lab", "embedding")
    session.install("--pre", "--upgrade", "--editable", ".[all]", *requirements)
    pytest_each(session)


@session_in("all", default=False)
def coverage(session: nox.Session) -> None:
    """Measure the coverage of the default tests."""
    run(session, "coverage", "erase")
    pytest_each(session, "--cov", "--cov-append", "--cov-report=")
    run(session, "coverage", "report")


@session_in("all", default=False)
def jax_ecosystem(session: nox.Session) -> None:
    """Train with Flax, Equinox and Orbax under JAX, on four devices and in two processes."""
    pytest(session, "tests/jax_ecosystem")


@nox.session(default=False)
def integrations(session: nox.Session) -> None:
    """Run the recipes for Accelerate, Lightning and the Hugging Face Trainer."""
    install(session, ".[torch]", "test", "integrations")
    # Warnings of those packages are not ours to fix.
    session.run("pytest", "-W", "default", "tests/integrations", env=SINGLE_THREAD)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Compare six rules on digits under JAX and PyTorch; write the report."""
    install(session, ".[all]")
    session.run("cdat", "compare", "digits", *session.posargs)


@nox.session(default=False)
def reproduce(session: nox.Session) -> None:
    """Test the claims of the paper; write the report with a verdict on each."""
    install(session, ".[all]")
    session.run("cdat", "reproduce", *session.posargs)


@nox.session(default=False)
def bench_jax(session: nox.Session) -> None:
    """Print time, FLOPs and memory of a step under JAX, and of Optax's own methods."""
    install(session, ".[jax]")
    session.run("python", "benchmarks/jax_steps.py", *session.posargs)


@nox.session(default=False)
def bench_torch(session: nox.Session) -> None:
    """Print time and memory of a step under PyTorch, and of other packages."""
    install(session, ".[torch]")
    peers = ("gen-optim", "prodigyopt", "schedulefree", "scikit-learn")
    needed = ("einops", "linear_operator", "opt_einsum", "tqdm")  # by curvlinops
    session.install("--constraint", "constraints.txt", *peers, *needed)
    # Their requirements would bring torchvision, and with it another torch.
    curvlinops = ("curvlinops-for-pytorch", "backpack-for-pytorch", "einconv", "unfoldNd")
    # It is for Python 3.12 and later; without it the benchmark leaves that line out.
    taylor = ("jet-for-pytorch",) if sys.version_info >= (3, 12) else ()
    session.install("--no-deps", *curvlinops, *taylor)
    quiet = {**SINGLE_THREAD, "KINETO_LOG_LEVEL": "99"}
    session.run("python", "benchmarks/torch_steps.py", *session.posargs, env=quiet)
