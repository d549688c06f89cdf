"""Base optimizers: they give the update direction, the tuner gives the learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Base:
    """A base optimizer at learning rate 1, and its edge of stability.

    The coefficients describe gradient descent, the heavy ball ``m <- momentum * m + g``, and the
    Adam family (an average m and a bias-corrected second moment); every backend builds these. Any
    other optimizer needs a constructor for each backend that it should run under.

    Attributes
    ----------
    name, label : str
        Name on the command line and in files; label in tables and figures.
    momentum : float
        Decay of the first moment.
    second_moment : float or None
        Decay of the second moment; None if the direction is not preconditioned.
    eps : float
        Added to the root of the second moment.
    weight_decay : float
        Multiplied by the weights and added to the direction of descent, as in AdamW.
    edge : float or None
        The value of rate times (preconditioned) sharpness above which a quadratic diverges; None if
        unknown.
    first_grid : tuple of int
        Exponents k of the learning rates ``2**k`` that are tried first.
    optax : callable or None
        ``optax() -> optax.GradientTransformation`` at learning rate 1, for any other optimizer
        under JAX.
    torch : callable or None
        ``torch(params) -> torch.optim.Optimizer`` with its default learning rate, for any other
        optimizer under PyTorch.
    """

    name: str
    label: str
    momentum: float = 0.0
    second_moment: float | None = None
    eps: float = 0.0
    weight_decay: float = 0.0
    edge: float | None = None
    first_grid: tuple[int, ...] = (-6, -5, -4)
    optax: Callable[[], Any] | None = None
    torch: Callable[[list[Any]], Any] | None = None

    @property
    def preconditioned(self) -> bool:
        """Whether the sharpness refers to ``P^-1/2 H P^-1/2`` instead of H."""
        return self.builtin and self.second_moment is not None

    @property
    def builtin(self) -> bool:
        """Whether the coefficients alone describe the optimizer."""
        return self.optax is None and self.torch is None

    def runs_under(self, backend: str) -> bool:
        """Return whether this optimizer can be built for a backend."""
        return self.builtin or {"jax": self.optax, "torch": self.torch}.get(backend) is not None


GD = Base(name="gd", label="GD", edge=2.0, first_grid=(-2, -1, 0))
MOMENTUM = Base(
    name="momentum",
    label="Momentum",
    momentum=0.9,
    edge=2 * (1 + 0.9),  # heavy ball: m <- 0.9 m + g
    first_grid=(-4, -3, -2),
)
RMSPROP = Base(
    name="rmsprop",
    label="RMSProp",
    second_moment=0.99,
    eps=1e-8,
    edge=2.0,
    first_grid=(-11, -10, -9),
)
ADAM = Base(
    name="adam",
    label="Adam",
    momentum=0.9,
    second_moment=0.999,
    eps=1e-8,
    edge=2 * (1 + 0.9) / (1 - 0.9),  # the first moment is an average: m <- 0.9 m + 0.1 g
    first_grid=(-8, -7, -6),
)

ADAMW = dataclasses.replace(ADAM, name="adamw", label="AdamW", weight_decay=0.01)

BASES = {base.name: base for base in (GD, MOMENTUM, RMSPROP, ADAM, ADAMW)}
