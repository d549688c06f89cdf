"""The update direction of any ``torch.optim`` optimizer: its step at learning rate 1.

The base optimizer steps on stand-ins, so neither the parameters nor the autograd graph that refers
to them changes. An `Adapter` makes the stand-ins and turns them into the direction. If the step
does not depend on the parameters, the stand-ins are zeros: after the step they *are* the direction,
without the rounding of a difference. Otherwise they are copies, and the direction is the change.

At a constant rate the steps are then those of the bare optimizer at that learning rate, with two
exceptions:

- Adafactor limits its learning rate to ``1 / sqrt(step)``. Here the limit is removed, because the
  tuner chooses the rate; the steps agree while the rate is below the limit.
- Rprop uses its learning rate only as the first length of its steps, and adapts the length from
  there. Here the bounds ``step_sizes`` are in units of the tuned rate, and a change of the rate
  acts at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdat_torch import pytorch_internals

Group = dict[str, Any]


@dataclass(frozen=True)
class Adapter:
    """How to get the direction from an optimizer; this class is for optimizers of unknown kind.

    Attributes
    ----------
    options : mapping
        The options of a group that are replaced while the optimizer steps on the stand-ins.
    independent_of_params : bool
        Whether the step does not depend on the parameters, apart from weight decay. Such optimizers
        keep a state for each parameter and nothing else: tensors of its shape, and numbers.
    proportional : bool
        Whether the step (a) is proportional to the learning rate, (b) is finite for finite
        gradients, and (c) does not write to the gradients. `can_step_without_direction` excludes
        the options for which (b) or (c) fails.
    decouples_decay : bool
        Whether weight decay acts on the parameters themselves in every group.
    """

    options: ClassVar[Mapping[str, float]] = {"lr": 1.0}
    independent_of_params: bool = False
    proportional: bool = False
    decouples_decay: bool = False

    def stand_in(self, p: Tensor) -> Tensor:
        """Return the tensor to step on: a copy."""
        return p.detach().clone()

    def gradient(self, group: Group, p: Tensor) -> Tensor | None:
        """Return the gradient for the optimizer: a copy, which it may overwrite."""
        del group
        return None if p.grad is None else p.grad.clone()

    def finish(self, group: Group, p: Tensor, stand_in: Tensor, state: dict[str, Any]) -> None:
        """Turn the stand-in after the step into the direction, in place."""
        del group, state
        stand_in.sub_(p)

    def decays_params(self, group: Group) -> bool:
        """Return whether weight decay acts on the parameters, not through the gradient."""
        return self.decouples_decay or bool(group.get("decoupled_weight_decay"))


@dataclass(frozen=True)
class FromZero(Adapter):
    """For optimizers that step on zeros, and whose weight decay has a closed form."""

    independent_of_params: bool = True

    def stand_in(self, p: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(p)

    def gradient(self, group: Group, p: Tensor) -> Tensor | None:
        """Return the gradient plus the coupled weight decay, which a step on zeros would lose."""
        if p.grad is None:
            return None
        decay = group.get("weight_decay", 0.0)
        if decay and not self.decays_params(group):
            sign = -1 if group.get("maximize") else 1
            return torch.add(p.grad, p.detach(), alpha=sign * decay)
        # The foreach implementation of Nesterov's momentum adds the momentum to the gradient.
        return p.grad.clone() if group.get("nesterov") else p.grad

    def finish(self, group: Group, p: Tensor, stand_in: Tensor, state: dict[str, Any]) -> None:
        """Add the decoupled weight decay."""
        del state
        if self.decays_params(group):
            stand_in.add_(p, alpha=-group["weight_decay"])


@dataclass(frozen=True)
class AdafactorAdapter(Adapter):
    """Steps on copies without weight decay, and removes the limit of the learning rate."""

    options: ClassVar[Mapping[str, float]] = {"lr": 1.0, "weight_decay": 0.0}
    decouples_decay: bool = True

    def finish(self, group: Group, p: Tensor, stand_in: Tensor, state: dict[str, Any]) -> None:
        """Return the change over min(1, 1 / sqrt(step)), plus the weight decay."""
        stand_in.sub_(p).mul_(float(state["step"]) ** 0.5)
        stand_in.add_(p, alpha=-group["weight_decay"])


_UNKNOWN = Adapter()
ADAPTERS: dict[type[Optimizer], Adapter] = {
    torch.optim.SGD: FromZero(proportional=True),
    torch.optim.Adam: FromZero(proportional=True),
    torch.optim.AdamW: FromZero(proportional=True, decouples_decay=True),
    torch.optim.RMSprop: FromZero(proportional=True),
    torch.optim.Adagrad: FromZero(proportional=True),
    torch.optim.Adamax: FromZero(proportional=True),
    torch.optim.NAdam: FromZero(proportional=True),
    torch.optim.RAdam: FromZero(proportional=True),
    torch.optim.Adadelta: FromZero(proportional=True),
    torch.optim.Rprop: FromZero(),
    torch.optim.Adafactor: AdafactorAdapter(),
}
if hasattr(torch.optim, "Muon"):  # since PyTorch 2.9
    ADAPTERS[torch.optim.Muon] = FromZero(decouples_decay=True)


def adapter_of(base: Optimizer) -> Adapter:
    """Return the adapter for an optimizer; subclasses may do anything and count as unknown."""
    return ADAPTERS.get(type(base), _UNKNOWN)


def base_direction(base: Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """Advance the state of `base` by one step and return the step it takes at learning rate 1.

    Parameters
    ----------
    base : torch.optim.Optimizer
        Its state changes; its parameters do not.
    params : sequence of Tensor
        The parameters to step on; each has its gradient in ``p.grad``.

    Returns
    -------
    list of Tensor
        The direction u for each of `params`, weight decay included.

    Raises
    ------
    TypeError
        If `base` moved the parameters themselves: it keeps its own references to them.
    """
    adapter = adapter_of(base)
    stand_ins = {p: adapter.stand_in(p) for p in params}
    grouped = [(g, p) for g in base.param_groups for p in g["params"] if p in stand_ins]
    for group, p in grouped:
        stand_ins[p].grad = adapter.gradient(group, p)
    versions = [pytorch_internals.version(p) for p in params]
    with _stepping_on(base, stand_ins, adapter.options):
        base.step()
    if [pytorch_internals.version(p) for p in params] != versions:
        msg = (
            f"base {type(base).__name__} keeps its own references to the parameters and stepped on "
            "them instead of its param_groups; it cannot be wrapped"
        )
        raise TypeError(msg)
    with torch.no_grad():
        for group, p in grouped:
            adapter.finish(group, p, stand_ins[p], base.state.get(p, {}))
    for stand_in in stand_ins.values():
        stand_in.grad = None
    return [stand_ins[p] for p in params]


def steps_by_parameter(base: Optimizer) -> bool:
    """Return whether `base` can step on some parameters at a time, and again on copies."""
    return adapter_of(base).independent_of_params and not pytorch_internals.has_step_hooks(base)


def can_step_without_direction(base: Optimizer) -> bool:
    """Return whether `base` itself can step at a known rate, without computing its direction first.

    Its step must be proportional to the rate, only trainable parameters may have a gradient, and
    the rate must be readable without waiting for a device.
    """
    # With eps = 0 a step can be 0 / 0, which only its direction would show. The foreach
    # implementation of Nesterov's momentum writes to the gradients.
    params = [p for group in base.param_groups for p in group["params"]]
    return (
        adapter_of(base).proportional
        and all(g.get("eps", 1.0) > 0 and not g.get("nesterov") for g in base.param_groups)
        and all(p.device.type == "cpu" and (p.requires_grad or p.grad is None) for p in params)
    )


@contextmanager
def _stepping_on(
    base: Optimizer, stand_ins: dict[Tensor, Tensor], options: Mapping[str, Any]
) -> Iterator[None]:
    """Let `base` step on stand-ins, with the state of the originals and other `options`."""
    originals = [
        {name: group[name] for name in ("params", *options)} for group in base.param_groups
    ]
    _move_state(base, stand_ins)
    try:
        for group in base.param_groups:
            group["params"] = [stand_ins[p] for p in group["params"] if p in stand_ins]
            group.update(options)
        yield
    finally:
        for group, original in zip(base.param_groups, originals, strict=True):
            group.update(original)
        _move_state(base, {stand_in: p for p, stand_in in stand_ins.items()})


def _move_state(base: Optimizer, replacements: dict[Tensor, Tensor]) -> None:
    """Move the state of each parameter to the parameter that replaces it."""
    for old, new in replacements.items():
        if old in base.state:
            base.state[new] = base.state.pop(old)
