"""The only door: ``nox`` runs every default check, ``nox -s demo`` the main job."""

from __future__ import annotations

import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
# uv resolves torch to the builds with CUDA; pip honours the local index and cache.
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True

PYPROJECT = nox.project.load_toml("pyproject.toml")
SINGLE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


def install(session: nox.Session, package: str, *groups: str) -> None:
    """Install the package with its extras and the dependency groups, at the tested versions."""
    requirements = nox.project.dependency_groups(PYPROJECT, *groups) if groups else ()
    session.install("--constraint", "constraints.txt", "--editable", package, *requirements)


def pytest(session: nox.Session, *folders: str) -> None:
    arguments = session.posargs or folders
    session.run("pytest", "--numprocesses=2", *arguments, env=SINGLE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and the rule that the core imports no framework (banned-api)."""
    session.install(
        "--constraint", "constraints.txt", *nox.project.dependency_groups(PYPROJECT, "lint")
    )
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy --strict on src, all frameworks installed."""
    install(session, ".[all]", "types")
    session.run("mypy")


@nox.session
def imports(session: nox.Session) -> None:
    """Check the direction of imports between the packages."""
    install(session, ".", "imports")
    session.run("lint-imports")


@nox.session
def core(session: nox.Session) -> None:
    """Test the core with no framework installed."""
    install(session, ".", "test")
    absent = (
        "import importlib.util as u; assert not any(map(u.find_spec, ('jax', 'torch', 'optax')))"
    )
    session.run("python", "-c", absent)
    pytest(session, "tests/core")


@nox.session
def jax(session: nox.Session) -> None:
    """Test the JAX adapter, without torch."""
    install(session, ".[jax]", "test")
    pytest(session, "tests/jax")


@nox.session(default=False)
def jax_ecosystem(session: nox.Session) -> None:
    """Train with Flax, Equinox and Orbax under JAX, on four devices and in two processes."""
    install(session, ".[jax]", "test", "jax_ecosystem")
    pytest(session, "tests/jax_ecosystem")


@nox.session
def torch(session: nox.Session) -> None:
    """Test the PyTorch adapter, without JAX."""
    install(session, ".[torch]", "test")
    pytest(session, "tests/torch")


@nox.session
def distributed(session: nox.Session) -> None:
    """Train in several processes that share one step."""
    install(session, ".[torch]", "test")
    pytest(session, "tests/distributed")


@nox.session
def parity(session: nox.Session) -> None:
    """Prove that all backends compute the same thing."""
    install(session, ".[jax,torch]", "test")
    pytest(session, "tests/parity")


@nox.session
def embedding(session: nox.Session) -> None:
    """Run the core in frameworks that no package of cdat knows: the examples of the docs."""
    install(session, ".", "test", "embedding")
    pytest(session, "tests/embedding")


@nox.session
def lab(session: nox.Session) -> None:
    """Test the reproduction suite and its command line."""
    install(session, ".[all]", "test", "lab")
    pytest(session, "--dist=loadfile", "tests/lab")


@nox.session
def doctests(session: nox.Session) -> None:
    """Run the examples in docstrings, the README and the docs."""
    install(session, ".[all]", "test", "docs", "jax_ecosystem")
    session.run("pytest", "--doctest-modules", "src", env=SINGLE_THREAD)
    pages = ["README.md", "CONTRIBUTING.md", *map(str, Path("docs").glob("*.md"))]
    session.run("python", "docs/run_snippets.py", *pages)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; warnings are errors."""
    install(session, ".[all]", "docs")
    session.run(
        "sphinx-build", "-n", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html"
    )


@nox.session(default=False)
def integrations(session: nox.Session) -> None:
    """Run the recipes for Accelerate, Lightning and the Trainer of Hugging Face."""
    install(session, ".[torch]", "test", "integrations")
    # Warnings of those packages are not ours to fix.
    session.run("pytest", "-W", "default", "tests/integrations", env=SINGLE_THREAD)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Train a network on digits with every contender under JAX and PyTorch; write the report."""
    install(session, ".[all]")
    session.run("cdat", "compare", "digits", *session.posargs)


@nox.session(default=False)
def reproduce(session: nox.Session) -> None:
    """Test the claims of the paper; write the report with a verdict on each."""
    install(session, ".[all]")
    session.run("cdat", "reproduce", *session.posargs)


@nox.session(default=False)
def bench_jax(session: nox.Session) -> None:
    """Print time, FLOPs and memory of a step under JAX, beside Optax's own."""
    install(session, ".[jax]")
    session.run("python", "benchmarks/jax_steps.py", *session.posargs)


@nox.session(default=False)
def bench_torch(session: nox.Session) -> None:
    """Print time and memory of a step under PyTorch, beside other packages."""
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
