"""Models under ``fully_shard``: FSDP2, also hybrid and with tensor parallelism.

Such a module holds DTensors between steps and plain parameters while it runs. In
``loss.backward()`` its hooks average the gradients. This is enough for a first derivative and never
unshards the whole model at once, but it leaves no graph. For a second derivative the modules are
unsharded until the step ends: each process differentiates its own loss with respect to the
unsharded parameters, and `reduce_scatter` averages the gradients.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.weak import WeakTensorKeyDictionary

from cdat_torch import pytorch_internals
from cdat_torch.distributed.dtensor import from_local_like, is_dtensor, local, sum_over_mesh
from cdat_torch.interrupts import deliver_interrupts


class _Home(NamedTuple):
    """The module that owns a sharded parameter, and the parameter's name there."""

    unit: weakref.ref[Any]
    """The module under ``fully_shard`` that unshards it."""
    owner: weakref.ref[Module]
    name: str


_HOMES: Any = WeakTensorKeyDictionary()
"""The home of each sharded parameter that was looked up; None if no module unshards it."""
_UNSHARDED: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""Modules that stay unsharded for a step, and whether they otherwise reshard after backward."""


def modules_of(params: Sequence[Tensor]) -> list[Any]:
    """Return the modules under ``fully_shard`` that hold some of `params`; usually none.

    An optimizer knows parameters only, so each is looked up once.
    """
    sharded = [p for p in params if is_dtensor(p)]
    if any(p not in _HOMES for p in sharded):
        for unit, p, owner, name in pytorch_internals.fsdp_parameters():
            _HOMES[p] = _Home(weakref.ref(unit), weakref.ref(owner), name)
        for p in sharded:
            _HOMES.setdefault(p, None)
    homes = [_HOMES[p] for p in sharded]
    found = dict.fromkeys(home.unit() for home in homes if home is not None)
    return [module for module in found if module is not None]


def refuse_gauss_newton(curvature: str, params: Sequence[Tensor]) -> None:
    """Raise a ValueError for a method that needs a forward-mode derivative."""
    if curvature == "gauss_newton" and modules_of(params):
        msg = (
            'curvature must not be "gauss_newton" for modules under fully_shard, which have no '
            'forward-mode derivative; use "auto" or "finite_difference"'
        )
        raise ValueError(msg)


def backward(loss: Tensor, params: Sequence[Tensor], *, sync: bool) -> list[Tensor | None]:
    """Return the mean gradient over the processes, computed by the hooks of the modules.

    Parameters
    ----------
    loss : Tensor
        The loss of this process.
    params : sequence of Tensor
        Parameters of modules under ``fully_shard``, and perhaps plain ones. Their ``.grad`` is left
        unchanged.
    sync : bool
        False keeps the gradient in the modules, which add it to the gradient of the next call.
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
    """Unshard the modules and return the tensors they compute with, in the order of `params`.

    They stay unsharded until `reshard`, even after a backward pass.
    """
    for module in modules_of(params):
        if module not in _UNSHARDED:
            _UNSHARDED[module] = pytorch_internals.reshards_after_backward(module)
            module.set_reshard_after_backward(False, recurse=False)
        module.unshard()
    return [p if (home := _HOMES.get(p)) is None else _present(home) for p in params]


def _present(home: _Home) -> Tensor:
    found: Tensor | None = getattr(home.owner(), home.name, None)
    assert found is not None, "a module under fully_shard was deleted in the middle of a step"
    return found


def reshard(params: Sequence[Tensor]) -> None:
    """Reshard the modules of `params`, so that the next `unshard` reads the current values."""
    for module in modules_of(params):
        if module in _UNSHARDED:
            module.set_reshard_after_backward(_UNSHARDED.pop(module), recurse=False)
        module.reshard()


def reduce_scatter(
    params: Sequence[Tensor], whole: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the mean of the processes' gradients, sharded like `params`.

    Parameters
    ----------
    params : sequence of Tensor
        The parameters of the optimizer.
    whole : sequence of Tensor
        What `unshard` returned for them.
    grads : sequence of Tensor or None
        The gradient of this process with respect to `whole`. None counts as zero, unless it is
        None in all processes.
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
    """Return `direction`, which is sharded like the parameters, redistributed like `whole`."""
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
