"""Base optimizers: they give the update direction, the tuner gives the learning rate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Base:
    """A base optimizer at learning rate 1, and where its edge of stability lies.

    Attributes
    ----------
    name, label : str
        For the command line and for people.
    momentum : float
        Decay of the first moment (Adam's beta1, or the momentum of the heavy ball).
    second_moment : float or None
        Adam's beta2; None where the direction is not preconditioned.
    eps : float
        Added to the root of the second moment.
    edge : float
        The rate times the (preconditioned) sharpness beyond which a quadratic diverges.
    """

    name: str
    label: str
    momentum: float
    second_moment: float | None
    eps: float
    edge: float

    @property
    def preconditioned(self) -> bool:
        """Whether the sharpness is that of ``P^-1/2 H P^-1/2`` instead of H."""
        return self.second_moment is not None


ADAM = Base(
    name="adam",
    label="Adam",
    momentum=0.9,
    second_moment=0.999,
    eps=1e-8,
    edge=2 * (1 + 0.9) / (1 - 0.9),  # the first moment is an average: m <- 0.9 m + 0.1 g
)
MOMENTUM = Base(
    name="momentum",
    label="Momentum",
    momentum=0.9,
    second_moment=None,
    eps=0.0,
    edge=2 * (1 + 0.9),  # heavy ball: m <- 0.9 m + g
)

BASES = {base.name: base for base in (ADAM, MOMENTUM)}
