"""The cost of a full CDAT step over a plain Adam step, on an MLP of 1024-wide layers.

Contenders take turns within each round, and the figure is the median over rounds of the ratio
within a round: on a noisy machine a ratio of neighbours is steadier than one of separate runs.

    python benchmarks/step_cost.py [--rounds 40] [--threads N] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from cdat_core import tuners

SIZES = (784, 1024, 1024, 10)
BATCH = 512
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "CDAT": (tuners.cdat(1.9, initial_learning_rate=1e-4, max_growth=1.1), {}),
    "CDAT, every=10": (
        tuners.cdat(1.9, initial_learning_rate=1e-4, max_growth=1.1),
        {"every": 10},
    ),
    "constant, through the wrapper": (tuners.constant(1e-3), {}),
}

Step = Callable[[], None]


def problem() -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    layers = [
        (
            rng.normal(size=(fan_in, fan_out)).astype(np.float32) / np.float32(fan_in) ** 0.5,
            np.zeros(fan_out, dtype=np.float32),
        )
        for fan_in, fan_out in pairwise(SIZES)
    ]
    x = rng.normal(size=(BATCH, SIZES[0])).astype(np.float32)
    return layers, x, rng.integers(0, SIZES[-1], size=BATCH)


def jax_steps() -> dict[str, Step]:
    """Return the jitted steps under JAX, each on parameters of its own."""
    import jax
    import jax.numpy as jnp
    import optax

    import cdat_jax

    layers, x, y = problem()
    batch = (jnp.asarray(x), jnp.asarray(y))

    def loss(params: Any, batch: Any) -> jax.Array:
        x, labels = batch
        for i, (weight, bias) in enumerate(params):
            x = x @ weight + bias
            x = jax.nn.relu(x) if i + 1 < len(params) else x
        return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()

    def make(solver: Any) -> Step:
        @jax.jit
        def update(params: Any, state: Any, batch: Any) -> Any:
            value, grad = jax.value_and_grad(loss)(params, batch)
            updates, state = solver.update(
                grad, state, params, value=value, grad=grad, value_fn=loss, batch=batch
            )
            return optax.apply_updates(params, updates), state

        current = [jax.tree.map(jnp.asarray, layers)]
        current.append(solver.init(current[0]))

        def step() -> None:
            current[:] = jax.block_until_ready(update(*current, batch))

        return step

    steps = {"Adam": make(optax.with_extra_args_support(optax.adam(1e-3)))}
    for name, (rule, options) in RULES.items():
        solver = optax.chain(optax.adam(1.0), cdat_jax.scale_by_tuner(rule, **options))
        steps[name] = make(solver)
    return steps


def torch_steps(device: str) -> dict[str, Step]:
    """Return the steps under PyTorch, each on a model of its own."""
    import torch
    from torch import nn

    import cdat_torch

    _, x, y = problem()
    inputs, labels = torch.tensor(x, device=device), torch.tensor(y, device=device)

    def model() -> nn.Module:
        torch.manual_seed(0)
        layers = [
            layer
            for fan_in, fan_out in pairwise(SIZES)
            for layer in (nn.Linear(fan_in, fan_out), nn.ReLU())
        ]
        return nn.Sequential(*layers[:-1]).to(device)

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    def plain() -> Step:
        net = model()
        optimizer = torch.optim.Adam(net.parameters())

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), labels).backward()
            optimizer.step()
            wait()

        return step

    def tuned(rule: Any, options: dict[str, Any]) -> Step:
        net = model()
        base = torch.optim.Adam(net.parameters())
        optimizer = cdat_torch.TunedOptimizer(base, rule, **options)

        def step() -> None:
            optimizer.step(lambda: nn.functional.cross_entropy(net(inputs), labels))
            wait()

        return step

    return {"Adam": plain(), **{name: tuned(*rule) for name, rule in RULES.items()}}


def ratios(steps: dict[str, Step], rounds: int) -> dict[str, tuple[float, float]]:
    """Return, for each contender, the mean milliseconds and the ratio to Adam.

    The ratio is the median over blocks of ten rounds, so that `every=10` pays for its measurement.
    """
    for _ in range(3):
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    blocks = range(0, rounds, 10)
    result = {}
    for name, times in seconds.items():
        per_block = [sum(times[i : i + 10]) / sum(seconds["Adam"][i : i + 10]) for i in blocks]
        result[name] = (1e3 * statistics.mean(times), statistics.median(per_block))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="a multiple of ten")
    parser.add_argument("--threads", type=int, default=None, help="threads for torch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="for torch")
    options = parser.parse_args()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    print(f"MLP {'-'.join(map(str, SIZES))}, batch {BATCH}, float32; step / plain Adam step")
    for framework, steps in (("JAX", jax_steps()), ("PyTorch", torch_steps(options.device))):
        print(f"\n{framework:32} {'ms':>8} {'ratio':>7}")
        for name, (milliseconds, ratio) in ratios(steps, options.rounds).items():
            print(f"{name:32} {milliseconds:8.2f} {ratio:7.2f}")


if __name__ == "__main__":
    main()
