"""Use an installed cdat: ``python .github/scripts/smoke_test.py 0.1.0 [jax] [torch] [lab]``.

The first argument is the version that must be installed; the others name the packages to use in
addition to the core. Run it where ``src`` is not importable.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path


def core(version: str) -> None:
    """Minimise a function through SciPy."""
    import cdat_core

    assert cdat_core.__version__ == importlib.metadata.version("cdat") == version
    assert Path(cdat_core.__file__).is_relative_to(sysconfig.get_path("purelib"))
    assert Path(cdat_core.__file__).with_name("py.typed").exists()

    import numpy as np
    from scipy.optimize import minimize, rosen, rosen_der

    import cdat_core.scipy

    method = cdat_core.scipy.tuned(cdat_core.linesearch.backtracking())
    start = np.array([-1.2, 1.0])
    result = minimize(rosen, start, jac=rosen_der, method=method, options={"maxiter": 50})
    assert result.fun < rosen(start)


def jax() -> None:
    """Take steps around Adam."""
    import jax
    import jax.numpy as jnp
    import optax

    import cdat_jax

    def loss_fn(w):
        return ((jnp.sin(w) - 0.5) ** 2).mean()

    solver = cdat_jax.cdat(optax.adam(1.0), initial_learning_rate=1e-3, max_growth=1.1)
    params = jnp.linspace(-1.0, 1.0, 5)
    first, state = loss_fn(params), solver.init(params)
    for _ in range(10):
        value, grad = jax.value_and_grad(loss_fn)(params)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=loss_fn
        )
        params = optax.apply_updates(params, updates)
    assert loss_fn(params) < first


def torch() -> None:
    """Take steps around Adam."""
    import torch

    import cdat_torch

    weights = torch.linspace(-1.0, 1.0, 5, requires_grad=True)
    adam = torch.optim.Adam([weights])
    optimizer = cdat_torch.CDAT(adam, initial_learning_rate=1e-3, max_growth=1.1)

    def closure():
        return ((weights.sin() - 0.5) ** 2).mean()

    losses = [optimizer.step(closure) for _ in range(10)]
    assert losses[-1] < losses[0]


def lab() -> None:
    """List the tasks by the command."""
    command = Path(sysconfig.get_path("scripts"), "cdat")
    listed = subprocess.run([command, "tasks"], check=True, capture_output=True, text=True).stdout
    assert "digits" in listed


if __name__ == "__main__":
    core(sys.argv[1])
    for package in sys.argv[2:]:
        {"jax": jax, "torch": torch, "lab": lab}[package]()
    sys.stdout.write(f"cdat {' '.join(sys.argv[1:])} works\n")
