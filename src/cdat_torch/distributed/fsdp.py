"""Models under ``fully_shard``: FSDP2, and its hybrid and tensor parallel forms.

Such a module holds DTensors between steps and plain parameters while it runs. Their hooks average
gradients in ``loss.backward()``, which is right for a first derivative and the only way that never
gathers the whole model. That pass leaves no graph. For a second derivative the parameters are
gathered and stay so until the step ends: each process differentiates its own loss on them, and the
gradients are averaged and scattered here.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.weak import WeakTensorKeyDictionary

from cdat_torch.distributed.dtensor import from_local_like, is_dtensor, local, sum_over_mesh
from cdat_torch.interrupts import deliver_interrupts


class _Home(NamedTuple):
    """Where a parameter lives."""

    module: weakref.ref[Any]
    """The module under ``fully_shard`` that gathers it."""
    owner: weakref.ref[Module]
    name: str


_HOMES: Any = WeakTensorKeyDictionary()
"""The home of each sharded parameter that was asked for, or None if no module gathers it."""
_KEPT: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""Modules that are gathered for a step, and whether they release after a backward pass else."""


def modules_of(params: Sequence[Tensor]) -> list[Any]:
    """Return the modules under ``fully_shard`` that hold some of `params`; usually none.

    An optimizer knows parameters only, so the modules are looked up once among the living objects.
    """
    sharded = [p for p in params if is_dtensor(p)]
    if any(p not in _HOMES for p in sharded):
        _find_homes(sharded)
    homes = [_HOMES[p] for p in sharded]
    found = dict.fromkeys(home.module() for home in homes if home is not None)
    return [module for module in found if module is not None]


def _find_homes(params: Sequence[Tensor]) -> None:
    """Note the homes of all sharded parameters, and of `params` also that they have none."""
    from torch.distributed.fsdp import FSDPModule

    # Not isinstance, which lazy objects answer by loading what they stand for.
    living = [m for m in gc.get_objects() if issubclass(type(m), FSDPModule)]
    for unit in living:
        unit.reshard()
    for unit in sorted(living, key=lambda m: -sum(1 for _ in m.modules())):  # outermost first
        for owner in unit.modules():
            for name, p in owner._parameters.items():
                if p is not None and is_dtensor(p):
                    _HOMES[p] = _Home(weakref.ref(unit), weakref.ref(owner), name)
    for p in params:
        if p not in _HOMES:
            _HOMES[p] = None


def refuse_gauss_newton(curvature: str, params: Sequence[Tensor]) -> None:
    """Raise a ValueError for a way to measure that needs a forward-mode derivative."""
    if curvature == "gauss_newton" and modules_of(params):
        msg = (
            'curvature must not be "gauss_newton" for modules under fully_shard, which have no '
            'forward-mode derivative; use "auto" or "finite_difference"'
        )
        raise ValueError(msg)


def backward(loss: Tensor, params: Sequence[Tensor], *, sync: bool) -> list[Tensor | None]:
    """Return the mean gradient over the processes, as the hooks of the modules compute it.

    Parameters
    ----------
    loss : Tensor
        The loss of this process.
    params : sequence of Tensor
        Of modules under ``fully_shard``; some may be plain. Their ``.grad`` stays as it is.
    sync : bool
        False keeps the gradient in the modules, which add it to that of the next call.
    """
    modules = modules_of(params)
    before = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        for module in modules:
            module.set_requires_gradient_sync(sync)
        with torch.enable_grad(), deliver_interrupts():
            loss.backward()  # type: ignore[no-untyped-call]
        return [p.grad for p in params]
    finally:
        for module in modules:
            module.set_requires_gradient_sync(True)
        for p, grad in zip(params, before, strict=True):
            p.grad = grad


def unshard(params: Sequence[Tensor]) -> list[Tensor]:
    """Gather the modules and return the tensors that they compute with, in the order of `params`.

    They stay gathered until `reshard`, also when a backward pass has used them.
    """
    for module in modules_of(params):
        if module not in _KEPT:
            group = getattr(module._get_fsdp_state(), "_fsdp_param_group", None)
            _KEPT[module] = getattr(group, "reshard_after_backward", True)
            module.set_reshard_after_backward(False, recurse=False)
        module.unshard()
    return [p if (home := _HOMES.get(p)) is None else _present(home) for p in params]


def _present(home: _Home) -> Tensor:
    owner = home.owner()
    found: Tensor | None = None if owner is None else owner._parameters[home.name]
    assert found is not None, "a module under fully_shard was deleted in the middle of a step"
    return found


def reshard(params: Sequence[Tensor]) -> None:
    """Let the modules hold their own parts only; what they gather next is up to date."""
    for module in modules_of(params):
        if module in _KEPT:
            module.set_reshard_after_backward(_KEPT.pop(module), recurse=False)
        module.reshard()


def reduce_scatter(
    params: Sequence[Tensor], whole: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the mean of the processes' gradients, laid out like `params`.

    Parameters
    ----------
    params : sequence of Tensor
        The parameters of the optimizer.
    whole : sequence of Tensor
        What `unshard` returned for them.
    grads : sequence of Tensor or None
        The gradient of this process with respect to `whole`; None counts as zero, unless it is None
        in all processes.
    """
    places = [i for i, p in enumerate(params) if p is not whole[i]]
    result = [None if g is None else g.detach() for g in grads]
    if not places:
        return result
    from torch.distributed.tensor import DTensor, Partial

    present = torch.tensor([float(grads[i] is not None) for i in places])
    mesh = params[places[0]].device_mesh  # type: ignore[attr-defined]
    present = present.to(mesh.device_type)
    sum_over_mesh(present, mesh)
    for i, used in zip(places, present.tolist(), strict=True):
        p: Any = params[i]
        inner: list[Any] = list(getattr(whole[i], "placements", ()))
        outer = p.device_mesh.ndim - len(inner)
        g = result[i]
        if used:
            part = (torch.zeros_like(local(whole[i])) if g is None else local(g)).to(p.dtype)
            size = math.prod(p.device_mesh.shape[:outer])
            placed = DTensor.from_local(
                part, p.device_mesh, [*[Partial("sum")] * outer, *inner], run_check=False
            )
            result[i] = placed.redistribute(placements=p.placements) / size
    return result


def average(params: Sequence[Tensor], scalars: Sequence[Tensor]) -> list[Tensor]:
    """Return the means of 0-d tensors over the processes that share `params`."""
    if not modules_of(params):
        return list(scalars)
    meshes: list[Any] = [p.device_mesh for p in params if _HOMES.get(p)]  # type: ignore[attr-defined]
    mesh = max(meshes, key=lambda mesh: mesh.ndim)
    together = torch.stack(list(scalars))
    sum_over_mesh(together, mesh)
    return list((together / mesh.size()).unbind())


def redistribute_like(direction: Sequence[Tensor], whole: Sequence[Tensor]) -> list[Tensor]:
    """Return a direction laid out like the parameters in the layout of the gathered ones."""
    result = []
    for u, w in zip(direction, whole, strict=True):
        if not is_dtensor(u) or (is_dtensor(w) and w.device_mesh == u.device_mesh):  # type: ignore[attr-defined]
            result.append(u)
            continue
        from torch.distributed.tensor import Replicate

        d: Any = u
        inner: list[Any] = list(getattr(w, "placements", ()))
        outer = d.device_mesh.ndim - len(inner)
        part = d.redistribute(placements=[*[Replicate()] * outer, *inner]).to_local()
        result.append(from_local_like(part, w))
    return result
