"""The sharpness during training: a few Lanczos steps that start from the last eigenvector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import cdat_core
from cdat_core.extend import validation
from cdat_torch.base.groups import weights_and_factors
from cdat_torch.distributed.dtensor import local
from cdat_torch.distributed.replicas import Replicas
from cdat_torch.spaces import TensorListSpace
from cdat_torch.spectrum.preconditioner import inverse_square_root
from cdat_torch.spectrum.probes import random_signs, warm_start
from cdat_torch.step.evaluation import StepLoss

FIRST_MATVECS = 20
"""The least number of products when the start vector is random."""

SEED = 0
"""The same start vector and noise in each step, so a resumed run needs no random state."""


class Sharpness(NamedTuple):
    """A measured sharpness, and its eigenvector."""

    sharpness: Tensor
    vector: dict[Tensor, Tensor]


class SharpnessTracker:
    """Measures the sharpness that bounds the rate, and remembers the eigenvector.

    The step is ``rate * M P^-1 m``, where M holds the multipliers of the groups and P is the
    preconditioner of the base. The rate is bounded by the largest eigenvalue of
    ``M^1/2 P^-1/2 H P^-1/2 M^1/2``.

    Parameters
    ----------
    base : torch.optim.Optimizer
        Its groups give M, and the state of an Adam gives P.
    num_matvecs : int
        Hessian-vector products from a warm start.
    inverse_sqrt : callable or None
        P^-1/2; by default that of Adam, and the identity for every other base.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        num_matvecs: int,
        inverse_sqrt: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None,
    ) -> None:
        if inverse_sqrt is not None and not callable(inverse_sqrt):
            msg = f"inverse_sqrt must be a callable v -> P^-1/2 v, got {inverse_sqrt!r}"
            raise TypeError(msg)
        adam = isinstance(base, torch.optim.Adam | torch.optim.AdamW)
        self._base = base
        self._num_matvecs = validation.count("sharpness_matvecs", num_matvecs)
        self._inverse_sqrt = base if inverse_sqrt is None and adam else inverse_sqrt
        self.vector: dict[Tensor, Tensor] = {}
        """The last eigenvector; empty before the first."""

    def measure(self, evaluation: StepLoss, *, replicas: Replicas, retain_graph: bool) -> Sharpness:
        """Return the sharpness at the present parameters; `keep` makes it the next start.

        Parameters
        ----------
        evaluation : StepLoss
            Loss and gradient of this process.
        replicas : Replicas
            The other processes: each product is averaged over them.
        retain_graph : bool
            Whether the graph of the gradient is still needed afterwards.
        """
        params = [p for g in self._base.param_groups for p in g["params"] if p.requires_grad]
        start = random_signs(params, 1, SEED)[0]
        remaining = max(FIRST_MATVECS, self._num_matvecs)
        if set(self.vector) == set(params):
            start = warm_start([[self.vector[p] for p in params]], start)
            remaining = self._num_matvecs

        def product(v: Sequence[Tensor], /) -> Sequence[Tensor]:
            nonlocal remaining
            remaining -= 1
            direction = dict(zip(params, v, strict=True))
            found = evaluation.product(direction, retain_graph=retain_graph or remaining > 0)
            return replicas.mean_vector(
                [found[p] if p in found else torch.zeros_like(p) for p in params]
            )

        found = cdat_core.top_eigenvalues(
            self._scaled(product, params), start, num_matvecs=remaining, space=TensorListSpace()
        )
        vector = dict(zip(params, found.vectors[0], strict=True))
        return Sharpness(found.values[0], vector)

    def saved(self, params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Return the eigenvector for a checkpoint; zeros where it is not known yet."""
        zeros = {p: torch.zeros_like(p, requires_grad=False) for p in params}
        return {**zeros, **self.vector}

    def keep(self, eigenvector: dict[Tensor, Tensor], *, where: Tensor) -> None:
        """Use the eigenvector as the next start vector if `where`, a 0-d tensor, is true."""
        if set(self.vector) == set(eigenvector):  # without waiting for the device
            for p, v in eigenvector.items():
                part, present = local(v), local(self.vector[p])
                part.copy_(torch.where(where.to(part.device), part, present))
            self.vector = eigenvector
        elif bool(where):
            self.vector = eigenvector

    def _scaled(
        self, product: cdat_core.HessianVectorProduct[Sequence[Tensor]], params: list[Tensor]
    ) -> cdat_core.HessianVectorProduct[Sequence[Tensor]]:
        """Return the product with M^1/2 P^-1/2 H P^-1/2 M^1/2."""
        space = TensorListSpace()
        apply = inverse_square_root(self._inverse_sqrt, params)
        if apply is not None:
            product = cdat_core.preconditioned(product, apply, space=space)
        weights, _ = weights_and_factors(self._base.param_groups, params)
        if any(weight != 1.0 for weight in weights):
            roots = [weight**0.5 for weight in weights]

            def by_group(v: Sequence[Tensor]) -> Sequence[Tensor]:
                return [t * root for t, root in zip(v, roots, strict=True)]

            product = cdat_core.preconditioned(product, by_group, space=space)
        return product
