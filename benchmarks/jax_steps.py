"""The cost of a compiled step relative to plain Adam under JAX: time, FLOPs and memory.

See `turns` for how time is measured. FLOPs and temporary memory are what XLA reports for the
compiled step. XLA counts the body of a loop once, and of a condition the more expensive branch, so
FLOPs are left out for searches and for steps that do not always measure.

    python benchmarks/jax_steps.py [--rounds 40] [--cores 1] [--tasks mlp gelu resnet gpt]
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from turns import PERIOD, REFERENCE, SPARSE, Step, parser, print_kinds, time_ratios

import cdat_jax

LR = 1e-3
Params = Any


class Task(NamedTuple):
    params: Params
    loss: cdat_jax.CompositeLoss
    x: jax.Array
    y: jax.Array


def keys() -> Iterator[jax.Array]:
    key = jax.random.key(0)
    while True:
        key, fresh = jax.random.split(key)
        yield fresh


def task(model: Callable[[Params, jax.Array], jax.Array], params: Params, *batch: Any) -> Task:
    def cross_entropy(outputs: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

    return Task(params, cdat_jax.CompositeLoss(model, cross_entropy), *batch)


def linear(key: jax.Array, fan_in: int, fan_out: int) -> Params:
    weight = jax.random.normal(key, (fan_in, fan_out)) / fan_in**0.5
    return {"weight": weight, "bias": jnp.zeros(fan_out)}


def norm(width: int) -> Params:
    return {"gain": jnp.ones(width), "bias": jnp.zeros(width)}


def affine(layer: Params, x: jax.Array) -> jax.Array:
    return x @ layer["weight"] + layer["bias"]


def normalized(layer: Params, x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """Layer norm over the last axis, BatchNorm in training mode over the others."""
    centred = x - jnp.mean(x, axes, keepdims=True)
    variance = jnp.mean(centred**2, axes, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * layer["gain"] + layer["bias"]


def mlp() -> Task:
    """784-1024-1024-10 with ReLU, batch 512."""
    key = keys()
    params = [linear(next(key), a, b) for a, b in pairwise((784, 1024, 1024, 10))]

    def model(params: Params, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jax.nn.relu(affine(layer, x))
        return affine(params[-1], x)

    x = jax.random.normal(next(key), (512, 784))
    return task(model, params, x, jax.random.randint(next(key), (512,), 0, 10))


def gelu() -> Task:
    """784-512-512-10 with GELU, batch 256."""
    key = keys()
    params = [linear(next(key), a, b) for a, b in pairwise((784, 512, 512, 10))]

    def model(params: Params, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jax.nn.gelu(affine(layer, x), approximate=False)
        return affine(params[-1], x)

    x = jax.random.normal(next(key), (256, 784))
    return task(model, params, x, jax.random.randint(next(key), (256,), 0, 10))


def convolution(kernel: jax.Array, x: jax.Array, stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def residual(block: Params, x: jax.Array) -> jax.Array:
    stride = 2 if "short" in block else 1
    short = convolution(block["short"], x, stride) if "short" in block else x
    x = normalized(block["norm1"], convolution(block["conv1"], x, stride), (0, 1, 2))
    x = normalized(block["norm2"], convolution(block["conv2"], jax.nn.relu(x)), (0, 1, 2))
    return jax.nn.relu(x + short)


def resnet() -> Task:
    """ResNet-20 with BatchNorm in training mode, batch 64 of 32x32 images."""
    key = keys()

    def kernel(before: int, after: int, size: int = 3) -> jax.Array:
        shape = (size, size, before, after)
        return jax.random.normal(next(key), shape) * (2 / (size**2 * before)) ** 0.5

    def block(before: int, after: int) -> Params:
        found = {"conv1": kernel(before, after), "conv2": kernel(after, after)}
        if before != after:
            found["short"] = kernel(before, after, 1)
        return {**found, "norm1": norm(after), "norm2": norm(after)}

    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    params = {
        "stem": kernel(3, 16),
        "norm": norm(16),
        "blocks": [block(a, b) for a, b in pairwise(widths)],
        "head": linear(next(key), 64, 10),
    }

    def model(params: Params, x: jax.Array) -> jax.Array:
        x = normalized(params["norm"], convolution(params["stem"], x), (0, 1, 2))
        x = jax.nn.relu(x)
        for block in params["blocks"]:
            x = residual(block, x)
        return affine(params["head"], jnp.mean(x, (1, 2)))

    x = jax.random.normal(next(key), (64, 32, 32, 3))
    return task(model, params, x, jax.random.randint(next(key), (64,), 0, 10))


def transformer(block: Params, x: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    qkv = affine(block["qkv"], normalized(block["norm1"], x, -1))
    q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, 4, width // 4), 2, 0)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + affine(block["out"], mixed.reshape(x.shape))
    hidden = affine(block["up"], normalized(block["norm2"], x, -1))
    return x + affine(block["down"], jax.nn.gelu(hidden, approximate=False))


def gpt() -> Task:
    """GPT of 4 layers, width 256, 4 heads, vocabulary 256; batch 8, context 64."""
    key, width, vocabulary, length = keys(), 256, 256, 64

    def block() -> Params:
        return {
            "norm1": norm(width),
            "qkv": linear(next(key), width, 3 * width),
            "out": linear(next(key), width, width),
            "norm2": norm(width),
            "up": linear(next(key), width, 4 * width),
            "down": linear(next(key), 4 * width, width),
        }

    params = {
        "tokens": jax.random.normal(next(key), (vocabulary, width)),
        "places": jax.random.normal(next(key), (length, width)),
        "blocks": [block() for _ in range(4)],
        "norm": norm(width),
        "head": linear(next(key), width, vocabulary),
    }

    def model(params: Params, x: jax.Array) -> jax.Array:
        hidden = params["tokens"][x] + params["places"]
        for block in params["blocks"]:
            hidden = transformer(block, hidden)
        return affine(params["head"], normalized(params["norm"], hidden, -1))

    x, y = jax.random.randint(next(key), (2, 8, length), 0, vocabulary)
    return task(model, params, x, y)


TASKS: dict[str, Callable[[], Task]] = {"mlp": mlp, "gelu": gelu, "resnet": resnet, "gpt": gpt}


class Contender(NamedTuple):
    solver: optax.GradientTransformation
    period: int = 1
    searches: bool = False
    whole: bool = False
    """Whether the step is that of `cdat_jax.make_step`, not one written by hand."""


def cdat(**options: Any) -> optax.GradientTransformation:
    return cdat_jax.cdat(
        optax.adam(1.0),
        sigma=1.9,
        initial_learning_rate=1e-4,
        max_growth=1.1,
        max_learning_rate=1e-2,
        **options,
    )


def searched(search: optax.GradientTransformation) -> Contender:
    return Contender(optax.chain(optax.adam(1.0), search), searches=True)


CONTENDERS: dict[str, Contender] = {
    REFERENCE: Contender(optax.adam(LR)),
    "CDAT": Contender(cdat()),
    "CDAT, `every=10`": Contender(cdat(every=PERIOD), PERIOD),
    "CDAT, `gauss_newton`": Contender(cdat(curvature="gauss_newton")),
    "CDAT, `hvp`": Contender(cdat(curvature="hvp")),
    "CDAT, `finite_difference`": Contender(cdat(curvature="finite_difference")),
    "Optax's backtracking search": searched(
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
    ),
    "Optax's zoom search": searched(optax.scale_by_zoom_linesearch(max_linesearch_steps=15)),
    "Prodigy": Contender(optax.contrib.prodigy()),
    "schedule-free AdamW": Contender(optax.contrib.schedule_free_adamw(LR)),
}


def self_tuned() -> dict[str, Contender]:
    """Return the self-tuning rule around Adam, in wrapper and chain, with each kind of step."""
    rate = cdat_jax.scale_by_cdat(every=SPARSE)
    solvers = {
        "wrapper": cdat_jax.cdat(optax.adam(1.0), every=SPARSE, average=False),
        "chain": optax.chain(optax.adam(1.0), rate),
        "wrapper, averaged": cdat_jax.cdat(optax.adam(1.0), every=SPARSE),
    }
    found = {REFERENCE: CONTENDERS[REFERENCE]}
    for name, solver in solvers.items():
        found[f"{name}, by hand"] = Contender(solver)
        found[f"{name}, `make_step`"] = Contender(solver, whole=True)
    return found


class Run:
    """A compiled step with its parameters and state."""

    def __init__(self, task: Task, contender: Contender) -> None:
        solver, loss = optax.with_extra_args_support(contender.solver), task.loss

        def update(params: Params, state: Any, x: jax.Array, y: jax.Array) -> Any:
            value, grad = jax.value_and_grad(loss)(params, x, y)
            updates, state = solver.update(
                grad, state, params, value=value, grad=grad, value_fn=loss, x=x, y=y
            )
            return optax.apply_updates(params, updates), state, value

        if contender.whole:
            update = cdat_jax.make_step(loss, solver)
        self.batch = (task.x, task.y)
        # Each leaf needs its own buffer, so that all can be donated.
        self.now = jax.tree.map(jnp.copy, (task.params, solver.init(task.params)))
        jitted = jax.jit(update, donate_argnums=(0, 1))
        self.compiled = jitted.lower(*self.now, *self.batch).compile()
        self.value = jnp.zeros(())

    def step(self) -> None:
        *self.now, self.value = jax.block_until_ready(self.compiled(*self.now, *self.batch))

    @property
    def flops(self) -> float:
        return float(self.compiled.cost_analysis()["flops"])

    @property
    def memory(self) -> int:
        return int(self.compiled.memory_analysis().temp_size_in_bytes)


def compare(name: str, rounds: int) -> None:
    task = TASKS[name]()
    count = sum(p.size for p in jax.tree.leaves(task.params))
    print(f"\n### {(TASKS[name].__doc__ or name).rstrip('.')}\n\n{count:,} parameters, float32.\n")
    runs = {other: Run(task, contender) for other, contender in CONTENDERS.items()}
    steps: dict[str, Step] = {other: run.step for other, run in runs.items()}
    periods = {other: contender.period for other, contender in CONTENDERS.items()}
    times, unit = time_ratios(steps, periods, rounds), runs[REFERENCE]
    print("| contender | time (quartiles) | FLOPs | temporary memory |")
    print("|---|---|---|---|")
    for other, run in runs.items():
        counted = CONTENDERS[other].period == 1 and not CONTENDERS[other].searches
        flops = f"{run.flops / unit.flops:.2f}" if counted else ""
        memory = f"{run.memory / unit.memory:.2f}"
        if run is unit:
            flops, memory = f"1 = {run.flops / 1e9:.1f} G", f"1 = {run.memory / 2**20:.0f} MiB"
        note = "" if jnp.isfinite(run.value) else " (diverged)"
        print(f"| {other}{note} | {times[other]} | {flops} | {memory} |", flush=True)


def compare_self_tuned(name: str, rounds: int) -> None:
    """Print the time of steps without and with a measurement, and of a run of 1,000 steps."""
    task = TASKS[name]()
    print(f"\n### Self-tuned: {(TASKS[name].__doc__ or name).rstrip('.')}\n")
    runs = {other: Run(task, contender) for other, contender in self_tuned().items()}
    steps: dict[str, Step] = {other: run.step for other, run in runs.items()}
    print_kinds(steps, rounds)


def confine(cores: int) -> int:
    """Confine this process to some cores before JAX starts threads; return their number."""
    if not hasattr(os, "sched_setaffinity"):  # neither on macOS nor on Windows
        return os.cpu_count() or 1
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    return len(os.sched_getaffinity(0))


def main() -> None:
    options = parser(__doc__, TASKS, rounds=40)
    options.add_argument("--cores", type=int, default=1, help="largest number of CPU cores to use")
    options.add_argument("--self-tuned", action="store_true", help="only the self-tuning rule")
    chosen = options.parse_args()
    cores = confine(chosen.cores)  # XLA has no flag for this: it starts one thread per core
    print(
        f"JAX {jax.__version__}, Optax {optax.__version__}, {jax.default_backend()}, "
        f"{platform.machine()}, {cores} core(s), {chosen.rounds} rounds"
    )
    for name in chosen.tasks:
        if not chosen.self_tuned:
            compare(name, chosen.rounds)
        compare_self_tuned(name, chosen.rounds)


if __name__ == "__main__":
    main()
