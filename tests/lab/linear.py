"""A linear task with derivatives in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np

from cdat_lab.tasks import Task
from cdat_lab.tasks._networks import linear_network, squared_loss

ROWS, INPUTS, OUTPUTS = 12, 5, 2


def linear_task(depth: int = 1, **changes: Any) -> Task:
    """Linear regression; with one layer the Hessian is X'X/n for each output."""
    generator = np.random.default_rng(4)
    sizes = [INPUTS, *[3] * (depth - 1), OUTPUTS]
    fields: dict[str, Any] = {
        "name": "linear",
        "description": "",
        "inputs": generator.standard_normal((ROWS, INPUTS)),
        "targets": generator.standard_normal((ROWS, OUTPUTS)),
        "params": tuple(
            generator.standard_normal((a, b)) for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        ),
        "model": linear_network,
        "criterion": squared_loss,
    }
    return Task(**(fields | changes))
