"""Random start vectors for the estimators of the spectrum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cdat_core.extend import validation
from cdat_torch.distributed.dtensor import shard_like
from cdat_torch.spaces import TensorListSpace

WARM_NOISE = 0.1
"""Length of the random part of a warm start, which finds eigenvalues that are new at the top."""


def random_signs(params: Sequence[Tensor], number: int, seed: int) -> list[Sequence[Tensor]]:
    """Return vectors of random signs like the parameters.

    Each device has its own generator, seeded from `seed` and the order of the devices: with equal
    seeds the tensors on two devices would have equal signs.
    """
    validation.count("seed", seed, minimum=0)
    seeds = torch.Generator().manual_seed(seed)
    generators: dict[torch.device, torch.Generator] = {}
    for p in params:
        if p.device not in generators:
            own = int(torch.randint(2**62, (), generator=seeds))
            generators[p.device] = torch.Generator(p.device).manual_seed(own)

    def signs(p: Tensor) -> Tensor:
        # For a sharded parameter each process draws all signs and takes its part.
        drawn = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        drawn = drawn.bernoulli_(0.5, generator=generators[p.device]).mul_(2.0).sub_(1.0)
        return shard_like(drawn, p)

    return [[signs(p) for p in params] for _ in range(number)]


def warm_start(vectors: Sequence[Sequence[Tensor]], noise: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the sum of unit vectors, plus noise of the length `WARM_NOISE`."""
    space = TensorListSpace()
    length = space.vdot(noise, noise).sqrt()
    total: Sequence[Tensor] = space.scale(WARM_NOISE / length, noise)
    for vector in vectors:
        total = space.add_scale(total, 1.0, vector)
    return total
