"""What a step costs over a step of plain Adam: time and peak memory, beside other packages.

See `turns` for how time is taken. Peak memory is that of torch's allocator over the first steps,
with model, data and optimizer; on the CPU it is from the profiler's record of every allocation.
Packages that are not installed, and contenders that fail or diverge, are left out with a note.

    python benchmarks/torch_steps.py [--rounds 20] [--threads 1] [--tasks mlp resnet gpt]
                                     [--device cpu|cuda]
"""

from __future__ import annotations

import gc
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from turns import PERIOD, REFERENCE, WARM_UP, Step, parser, time_ratios

import cdat_torch
from cdat_core import Measurement, tuners
from cdat_torch.direction import base_direction

LR = 1e-3


class Task(NamedTuple):
    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def params(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def to(self, device: str) -> Task:
        return Task(self.model.to(device), self.x.to(device), self.y.to(device))


def mlp() -> Task:
    """784-1024-1024-10 with ReLU, batch 512."""
    sizes = (784, 1024, 1024, 10)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return Task(nn.Sequential(*layers[:-1]), torch.randn(512, 784), torch.randint(10, (512,)))


class Residual(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.short = (
            nn.Identity() if stride == 1 else nn.Conv2d(before, after, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


def resnet() -> Task:
    """ResNet-20 with BatchNorm in training mode, batch 64 of 32x32 images."""
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = [Residual(a, b) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    model = nn.Sequential(*stem, *blocks, *head)
    return Task(model, torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norms[0](x)).reshape(shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, x: Tensor) -> Tensor:
        there = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.blocks(self.tokens(x) + there)).flatten(0, 1)


def gpt() -> Task:
    """GPT of 4 layers, width 256, 4 heads, vocabulary 256; batch 8, context 64."""
    model = Transformer(vocabulary=256, length=64, width=256, heads=4, depth=4)
    return Task(model, torch.randint(256, (8, 64)), torch.randint(256, (8 * 64,)))


TASKS: dict[str, Callable[[], Task]] = {"mlp": mlp, "resnet": resnet, "gpt": gpt}


def adam(task: Task) -> Step:
    optimizer = torch.optim.Adam(task.params(), lr=LR)

    def step() -> None:
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()

    return step


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


def through_curvlinops(task: Task) -> Step:
    """Do the step of CDAT with the Hessian product of curvlinops."""
    import curvlinops

    params = task.params()
    base = torch.optim.Adam(params, lr=LR)
    hessian = curvlinops.HessianLinearOperator(
        task.model,
        nn.CrossEntropyLoss(),
        params,
        [(task.x, task.y)],
        check_deterministic=False,
        num_data=len(task.x),
    )
    tuner, space = rule(), cdat_torch.TensorListSpace()
    state = tuner.init(torch.zeros((), dtype=torch.float64, device=task.x.device))

    def step() -> None:
        nonlocal state
        base.zero_grad()
        loss = task.loss()
        loss.backward()
        u = base_direction(base, params)
        with sdpa_kernel(SDPBackend.MATH):
            curvature = space.vdot(u, hessian @ u)
        slope = space.vdot([p.grad for p in params if p.grad is not None], u)
        rate, state = tuner.update(Measurement(loss.detach().to(slope), slope, curvature), state)
        with torch.no_grad():
            torch._foreach_add_(params, u, alpha=float(rate))

    return step


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
    REFERENCE: Contender(adam),
    "CDAT": Contender(cdat()),
    "CDAT, `every=10`": Contender(cdat(every=PERIOD), PERIOD),
    "CDAT, `hessian`": Contender(cdat(curvature="hessian")),
    "CDAT, `finite_difference`": Contender(cdat(curvature="finite_difference")),
    "CDAT, `gauss_newton`": Contender(cdat(curvature="gauss_newton", composite=True)),
    "CDAT by curvlinops' Hessian product": Contender(through_curvlinops),
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


def main() -> None:
    options = parser(__doc__, TASKS, rounds=20)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    warnings.simplefilter("ignore")
    print(
        f"PyTorch {torch.__version__}, {chosen.device}, {platform.machine()}, "
        f"{chosen.threads} thread(s), {chosen.rounds} rounds"
    )
    for name in chosen.tasks:
        compare(name, chosen.rounds, chosen.device)


if __name__ == "__main__":
    main()
