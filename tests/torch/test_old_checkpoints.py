"""Checkpoints of earlier versions load and go on as they did there.

Those in ``data`` were written by `write` before the modules of cdat_torch moved into folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdat_core import tuners
from cdat_torch import CDAT, TunedOptimizer

FOLDER = Path(__file__).parent / "data"
SHARPNESS = tuners.sharpness_edge()
CASES: dict[str, Any] = {
    "adam": (3, lambda params: CDAT(torch.optim.Adam(params), sigma=2.0, every=2)),
    "momentum": (3, lambda params: CDAT(torch.optim.SGD(params, momentum=0.9), sigma=1.0)),
    "sharpness": (
        2,
        lambda params: TunedOptimizer(torch.optim.SGD(params), tuners.sharpness_edge()),
    ),
}


def prepared(name: str) -> tuple[nn.Module, TunedOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return model, CASES[name][1](model.parameters())


def step(model: nn.Module, optimizer: TunedOptimizer) -> dict[str, Any]:
    """What a step did; its data need no random numbers."""
    x = torch.linspace(-1.0, 2.0, 24, dtype=torch.float64).reshape(8, 3)
    loss = optimizer.step(lambda: (model(x) - x.prod(dim=1, keepdim=True)).square().mean())
    return {
        "loss": float(loss),
        "learning_rate": float(optimizer.last.learning_rate),
        "params": [p.detach().clone() for p in model.parameters()],
    }


def write(folder: Path) -> None:
    for name, (steps, _) in CASES.items():
        model, optimizer = prepared(name)
        for _ in range(steps):
            step(model, optimizer)
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        saved = {key: clone(value) for key, value in saved.items()}
        torch.save({**saved, "next": step(model, optimizer)}, folder / f"checkpoint_{name}.pt")


def clone(value: Any) -> Any:
    """A copy that shares no storage, so that the step to come changes nothing in it."""
    if isinstance(value, dict):
        return {key: clone(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(clone, value))
    return value.detach().clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_an_earlier_version_goes_on(name: str) -> None:
    saved = torch.load(FOLDER / f"checkpoint_{name}.pt", weights_only=True)
    model, optimizer = prepared(name)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    # Other processors round differently.
    torch.testing.assert_close(step(model, optimizer), saved["next"], rtol=1e-10, atol=1e-13)
