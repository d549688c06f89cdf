"""What a step costs over a step of plain Adam: time and peak memory, beside other packages.

See `turns` for how time is taken. Peak memory is that of torch's allocator over the first steps,
with model, data and optimizer; on the CPU it is from the profiler's record of every allocation.
Packages that are not installed, and contenders that fail or diverge, are left out with a note.

    python benchmarks/torch_steps.py [--rounds 20] [--threads 1 2] [--device cpu|cuda]
                                     [--tasks mlp mlp_small resnet gpt gpt_math] [--self-tuned]
"""

from __future__ import annotations

import gc
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_tasks import TASKS, Task
from turns import PERIOD, REFERENCE, SPARSE, WARM_UP, Step, parser, print_kinds, time_ratios

import cdat_torch
from cdat_core import Measurement, tuners
from cdat_torch.base.direction import base_direction

LR = 1e-3


def adam(**options: Any) -> Callable[[Task], Step]:
    def make(task: Task) -> Step:
        optimizer = torch.optim.Adam(task.params(), lr=LR, **options)

        def step() -> None:
            optimizer.zero_grad()
            task.loss().backward()
            optimizer.step()

        return step

    return make


def rule() -> Any:
    return tuners.cdat(1.9, initial_learning_rate=1e-4, max_growth=1.1, max_learning_rate=1e-2)


def cdat(*, composite: bool = False, **options: Any) -> Callable[[Task], Step]:
    def make(task: Task) -> Step:
        base = torch.optim.Adam(task.params(), lr=LR)
        optimizer = cdat_torch.TunedOptimizer(base, rule(), **options)
        loss: Any = task.loss
        if composite:
            loss = cdat_torch.CompositeLoss(
                lambda: task.model(task.x), lambda outputs: F.cross_entropy(outputs, task.y)
            )

        def step() -> None:
            optimizer.zero_grad()  # as Adam does; else old gradients are kept through the step
            optimizer.step(loss)

        return step

    return make


def self_tuning(**options: Any) -> Callable[[Task], Step]:
    def make(task: Task) -> Step:
        base = torch.optim.Adam(task.params(), lr=LR)
        optimizer = cdat_torch.CDAT(base, every=SPARSE, **options)

        def step() -> None:
            optimizer.zero_grad()
            optimizer.step(task.loss)

        return step

    return make


Curvature = Callable[[list[Tensor]], Tensor]


def with_curvature(curvature: Callable[[Task], Curvature]) -> Callable[[Task], Step]:
    """Do the step of CDAT with a curvature <u, H u> from another package."""

    def make(task: Task) -> Step:
        params = task.params()
        base = torch.optim.Adam(params, lr=LR)
        along = curvature(task)
        tuner, space = rule(), cdat_torch.TensorListSpace()
        state = tuner.init(torch.zeros((), dtype=torch.float64, device=task.x.device))

        def step() -> None:
            nonlocal state
            base.zero_grad()
            loss = task.loss()
            loss.backward()
            u = base_direction(base, params)
            slope = space.vdot([p.grad for p in params if p.grad is not None], u)
            measured = Measurement(loss.detach().to(slope), slope, along(u).to(slope))
            rate, state = tuner.update(measured, state)
            with torch.no_grad():
                torch._foreach_add_(params, u, alpha=float(rate))

        return step

    return make


def by_curvlinops(task: Task) -> Curvature:
    """Return <u, H u> by the Hessian product of curvlinops."""
    import curvlinops

    params = task.params()
    hessian = curvlinops.HessianLinearOperator(
        task.model,
        nn.CrossEntropyLoss(),
        params,
        [(task.x, task.y)],
        check_deterministic=False,
        num_data=len(task.x),
    )
    space = cdat_torch.TensorListSpace()

    def along(u: list[Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return space.vdot(u, hessian @ u)

    return along


def by_taylor_mode(task: Task) -> Curvature:
    """Return <u, H u> by the Taylor mode of jet-for-pytorch, with a forward pass of its own."""
    from jet import jet

    params = task.params()
    names = [name for name, p in task.model.named_parameters() if p.requires_grad]

    def loss(*values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        outputs = torch.func.functional_call(task.model, weights, (task.x,))
        return F.cross_entropy(outputs, task.y)

    taylor = jet(loss, tuple(p.detach() for p in params))

    def along(u: list[Tensor]) -> Tensor:
        with torch.no_grad():
            curves = [(p.detach(), v, torch.zeros_like(v)) for p, v in zip(params, u, strict=True)]
            second: Tensor = taylor(*curves)[2]
        return second

    return along


def lbfgs(task: Task) -> Step:
    optimizer = torch.optim.LBFGS(
        task.params(), max_iter=1, max_eval=25, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def gen(period: int) -> Callable[[Task], Step]:
    def make(task: Task) -> Step:
        from GeN import lr_parabola

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                yield task.x, task.y

        optimizer = torch.optim.Adam(task.params(), lr=LR)
        source, calls = batches(), 0

        def step() -> None:
            nonlocal calls
            optimizer.zero_grad()
            task.loss().backward()
            if calls % period == 0:
                lr_parabola(
                    task.model,
                    optimizer,
                    tr_iter=source,
                    task="image_cls",
                    device=str(task.x.device),
                    lr_factor=[-1, 0, 1],
                )
            optimizer.step()
            calls += 1

        return step

    return make


def prodigy(task: Task) -> Step:
    from prodigyopt import Prodigy

    optimizer = Prodigy(task.params())

    def step() -> None:
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()

    return step


def schedule_free(task: Task) -> Step:
    import schedulefree

    optimizer = schedulefree.AdamWScheduleFree(task.params(), lr=LR)
    optimizer.train()

    def step() -> None:
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()

    return step


class Contender(NamedTuple):
    make: Callable[[Task], Step]
    period: int = 1


CONTENDERS: dict[str, Contender] = {
    REFERENCE: Contender(adam()),
    "Adam, `fused=True`": Contender(adam(fused=True)),
    "CDAT": Contender(cdat()),
    "CDAT, `every=10`": Contender(cdat(every=PERIOD), PERIOD),
    "CDAT, `hvp`": Contender(cdat(curvature="hvp")),
    "CDAT, `finite_difference`": Contender(cdat(curvature="finite_difference")),
    "CDAT, `gauss_newton`": Contender(cdat(curvature="gauss_newton", composite=True)),
    "CDAT by curvlinops' Hessian product": Contender(with_curvature(by_curvlinops)),
    "CDAT by jet-for-pytorch's Taylor mode": Contender(with_curvature(by_taylor_mode)),
    "GeN": Contender(gen(1)),
    "GeN, every 10 steps": Contender(gen(PERIOD), PERIOD),
    "Prodigy": Contender(prodigy),
    "schedule-free AdamW": Contender(schedule_free),
    "L-BFGS, strong Wolfe, per iteration": Contender(lbfgs),
}


def fresh(build: Callable[[], Task], contender: Contender, device: str) -> tuple[Task, Step]:
    torch.manual_seed(0)
    task = build().to(device)
    step = contender.make(task)
    if device == "cpu":
        return task, step

    def finished() -> None:
        step()
        torch.cuda.synchronize()

    return task, finished


def peak_memory(build: Callable[[], Task], contender: Contender, device: str) -> int:
    """Return the largest sum of live bytes of the allocator, from the model's birth on."""

    def first_steps() -> None:
        _, step = fresh(build, contender, device)
        for _ in range(max(WARM_UP, contender.period + 1)):
            step()

    gc.collect()
    if device == "cpu":
        return most_alive(first_steps)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first_steps()
    return torch.cuda.max_memory_allocated() - before


def most_alive(work: Callable[[], None]) -> int:
    """Return the largest sum of live bytes of the CPU allocator during `work`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    inner: Any = profile.profiler
    waiting = list(inner.kineto_results.experimental_event_tree())
    changes: list[tuple[int, int]] = []
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    live = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        live += change
        peak = max(peak, live)
    return peak


def compare(name: str, rounds: int, device: str) -> None:
    build = TASKS[name]
    print(f"\n### {(build.__doc__ or name).rstrip('.')}\n", flush=True)
    peaks: dict[str, int] = {}
    for contender_name, contender in CONTENDERS.items():
        try:
            peaks[contender_name] = peak_memory(build, contender, device)
        except Exception as error:
            reason = str(error).strip().splitlines()
            print(
                f"{contender_name} left out: {type(error).__name__}: {reason[0] if reason else ''}"[
                    :160
                ],
                file=sys.stderr,
            )
    runs = {other: fresh(build, CONTENDERS[other], device) for other in peaks}
    periods = {other: contender.period for other, contender in CONTENDERS.items()}
    times = time_ratios({other: step for other, (_, step) in runs.items()}, periods, rounds)
    for other, (task, _) in runs.items():
        if not torch.isfinite(task.loss()):
            print(f"{other} left out: its loss is not finite at the end", file=sys.stderr)
            del peaks[other]
    count = sum(p.numel() for p in build().params())
    print(f"{count:,} parameters, float32.\n")
    print("| contender | time (quartiles) | peak memory |")
    print("|---|---|---|")
    for contender_name, peak in peaks.items():
        unit = peaks[REFERENCE]
        memory = (
            f"1 = {unit / 2**20:.0f} MiB" if contender_name == REFERENCE else f"{peak / unit:.2f}"
        )
        print(f"| {contender_name} | {times[contender_name]} | {memory} |", flush=True)


def compare_self_tuned(name: str, rounds: int, device: str) -> None:
    build = TASKS[name]
    print(f"\n### Self-tuned: {(build.__doc__ or name).rstrip('.')}\n", flush=True)
    contenders = {
        REFERENCE: Contender(adam()),
        "self-tuning": Contender(self_tuning(average=False)),
        "self-tuning, averaged weights": Contender(self_tuning()),
    }
    print_kinds({name: fresh(build, each, device)[1] for name, each in contenders.items()}, rounds)


def main() -> None:
    options = parser(__doc__, TASKS, rounds=20)
    options.add_argument("--threads", type=int, nargs="+", default=[1])
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--self-tuned", action="store_true", help="only the self-tuning rule")
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        print(
            f"PyTorch {torch.__version__}, {chosen.device}, {platform.machine()}, "
            f"{threads} thread(s), {chosen.rounds} rounds"
        )
        for name in chosen.tasks:
            if not chosen.self_tuned:
                compare(name, chosen.rounds, chosen.device)
            compare_self_tuned(name, chosen.rounds, chosen.device)


if __name__ == "__main__":
    main()
