"""The update direction of any ``torch.optim`` optimizer: its step at learning rate 1.

The base optimizer steps on stand-ins of the parameters, so neither the parameters nor the autograd
graph that refers to them is touched. For optimizers whose step does not depend on the parameters
the stand-ins are zero, and after the step they *are* the direction, without the rounding of a
difference. For all others they start as copies, and the direction is what the step changed.

A constant rate then gives the steps of the bare optimizer at that learning rate, with two
exceptions. Adafactor limits its learning rate to ``1 / sqrt(step)``; here the limit is left to the
tuner, so the two agree below it. Rprop takes its learning rate as the first length of its steps
and adapts from there; here the bounds ``step_sizes`` are in units of the tuned rate, which also
acts at once when it changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_MUON = (torch.optim.Muon,) if hasattr(torch.optim, "Muon") else ()  # since PyTorch 2.9
# Their step reads the parameters for weight decay only, which is added in closed form below.
_INDEPENDENT_OF_PARAMS: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adadelta,
    torch.optim.Rprop,
    *_MUON,
)
_IN_PROPORTION = tuple(
    kind for kind in _INDEPENDENT_OF_PARAMS if kind not in (torch.optim.Rprop, *_MUON)
)
_DECOUPLED = (torch.optim.AdamW, torch.optim.Adafactor, *_MUON)


def base_direction(base: Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """Advance the state of `base` by one step and return the step it takes at learning rate 1.

    Parameters
    ----------
    base : torch.optim.Optimizer
        Its averages move on; its parameters do not.
    params : sequence of Tensor
        The parameters to step on; each has its gradient in ``p.grad``.

    Returns
    -------
    list of Tensor
        The direction u for each of `params`, weight decay included.

    Raises
    ------
    TypeError
        If `base` moved the parameters themselves: it keeps references of its own to them.
    """
    exact = independent_of_params(base)
    limited = type(base) is torch.optim.Adafactor
    stand_ins = {p: torch.zeros_like(p) if exact else p.detach().clone() for p in params}
    for group in base.param_groups:
        for p in group["params"]:
            if p in stand_ins:
                stand_ins[p].grad = _gradient_for(base, group, p)
    versions = [p._version for p in params]
    with _stepping_on(base, stand_ins, without_decay=limited):
        base.step()
    if [p._version for p in params] != versions:
        msg = (
            f"base {type(base).__name__} keeps its own references to the parameters and stepped on "
            "them instead of its param_groups; it cannot be wrapped"
        )
        raise TypeError(msg)
    with torch.no_grad():
        for group in base.param_groups:
            for p in group["params"]:
                if p not in stand_ins:
                    continue
                if not exact:
                    stand_ins[p].sub_(p)
                if limited:  # to min(lr, 1 / sqrt(step)), which is the latter for lr = 1
                    stand_ins[p].mul_(float(base.state[p]["step"]) ** 0.5)
                if (exact or limited) and decouples_decay(base, group):
                    stand_ins[p].add_(p, alpha=-group["weight_decay"])
    for stand_in in stand_ins.values():
        stand_in.grad = None
    return [stand_ins[p] for p in params]


def independent_of_params(base: Optimizer) -> bool:
    """Return whether the step of `base` does not depend on the parameters but for weight decay.

    Those optimizers keep all they know in a state for each parameter: tensors of its shape, and
    single numbers.
    """
    return type(base) in _INDEPENDENT_OF_PARAMS


def steps_by_parameter(base: Optimizer) -> bool:
    """Return whether steps on parts of the parameters are one step on all, and can be repeated."""
    watched = base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks
    return independent_of_params(base) and not watched


def steps_in_proportion(base: Optimizer) -> bool:
    """Return whether `base` itself can step at a known rate without a look at the direction.

    Its steps are then proportional to the learning rate and finite for finite gradients, which it
    does not write to; only trainable parameters have one; and the rate is read without waiting for
    a device.
    """
    params = [p for group in base.param_groups for p in group["params"]]
    return (
        type(base) in _IN_PROPORTION
        and all(g.get("eps", 1.0) > 0 and not g.get("nesterov") for g in base.param_groups)
        and all(p.device.type == "cpu" and (p.requires_grad or p.grad is None) for p in params)
    )


@contextmanager
def _stepping_on(
    base: Optimizer, stand_ins: dict[Tensor, Tensor], *, without_decay: bool
) -> Iterator[None]:
    """Let `base` find stand-ins, with the state of the originals, at learning rate 1."""
    changed = ("params", "lr", "weight_decay") if without_decay else ("params", "lr")
    originals = [{name: group[name] for name in changed} for group in base.param_groups]
    _rename_state(base, stand_ins)
    try:
        for group in base.param_groups:
            group["params"] = [stand_ins[p] for p in group["params"] if p in stand_ins]
            group["lr"] = 1.0
            if without_decay:
                group["weight_decay"] = 0.0
        yield
    finally:
        for group, original in zip(base.param_groups, originals, strict=True):
            group.update(original)
        _rename_state(base, {stand_in: p for p, stand_in in stand_ins.items()})


def _rename_state(base: Optimizer, names: dict[Tensor, Tensor]) -> None:
    for old, new in names.items():
        if old in base.state:
            base.state[new] = base.state.pop(old)


def decouples_decay(base: Optimizer, group: dict[str, Any]) -> bool:
    """Return whether weight decay acts on the parameters themselves, not through the gradient."""
    return isinstance(base, _DECOUPLED) or bool(group.get("decoupled_weight_decay"))


def _gradient_for(base: Optimizer, group: dict[str, Any], p: Tensor) -> Tensor | None:
    """Return the gradient the base is to see, as a copy if it may write into it.

    For those that step on zeros it contains the coupled decay, which they cannot see there.
    """
    if p.grad is None:
        return None
    exact = type(base) in _INDEPENDENT_OF_PARAMS
    decay = group.get("weight_decay", 0.0)
    if exact and decay and not decouples_decay(base, group):
        return torch.add(p.grad, p.detach(), alpha=-decay if group.get("maximize") else decay)
    # The foreach implementation of Nesterov's momentum adds the momentum to the gradient itself.
    return p.grad if exact and not group.get("nesterov") else p.grad.clone()
