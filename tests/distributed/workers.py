"""Run a function in several processes that share a gloo group."""

from __future__ import annotations

import datetime as dt
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Worker = Callable[..., Any]
PRELOAD = ["torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "cdat_torch"]
"""What the server imports once, so that the processes it forks need not."""


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _main(rank: int, size: int, port: int, worker: Worker, args: tuple[Any, ...], out: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    timeout = dt.timedelta(seconds=60)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timeout)
    try:
        out.put((rank, worker(rank, size, *args), None))
    except BaseException:
        out.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def run(size: int, worker: Worker, *args: Any, survivors: set[int] | None = None) -> list[Any]:
    """Return what `worker(rank, size, *args)` returns in each process, by rank.

    `survivors` are the ranks that are expected to answer; by default all.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    out, port = context.Queue(), _free_port()
    processes = [
        context.Process(target=_main, args=(rank, size, port, worker, args, out))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    expected = set(range(size)) if survivors is None else survivors
    results: dict[int, Any] = {}
    try:
        while expected - set(results):
            try:
                rank, result, error = out.get(timeout=400)
            except queue.Empty:
                raise AssertionError(f"ranks {expected - set(results)} did not answer") from None
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = result
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in sorted(results)]
