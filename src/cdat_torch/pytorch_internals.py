"""Every private name of PyTorch that the package uses, each behind one function.

No other module names one, so this is the file to check against a new release of PyTorch. Each
function says why the name is needed and what happens where a release does not have it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.adam import adam
from torch.utils import _pytree

pytree = _pytree
"""Nested tuples, lists and dictionaries of tensors; there are no public functions for them."""

Binding = tuple[Any, str]
"""An object and the name of one of its attributes."""


class MissingInternal(RuntimeError):  # noqa: N818
    """A private name without a substitute is missing in the installed version of PyTorch."""


# ---- optimizers ----


def fused_adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    **options: Any,
) -> None:
    """Take one step of Adam in place with the fused kernel.

    ``torch._fused_adam_`` is the kernel itself. Without it the public function takes the step,
    which costs about 100 microseconds more per call.

    Parameters
    ----------
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs : sequence of Tensor
        Of one dtype, on the CPU; `max_exp_avg_sqs` is empty without ``amsgrad``.
    steps : sequence of Tensor
        The number of each step, counting this one.
    **options
        ``lr``, ``beta1``, ``beta2``, ``weight_decay``, ``eps``, ``amsgrad``, ``maximize``.
    """
    lists = list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(max_exp_avg_sqs)
    kernel = getattr(torch, "_fused_adam_", None)
    if kernel is not None:
        kernel(*lists, list(steps), **options)
    else:
        adam(*lists, [step - 1 for step in steps], fused=True, **options)


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether hooks are registered that run before or after each ``step``.

    There is no public way to ask. Without the names: True, the careful answer.
    """
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return any(bool(getattr(optimizer, name, True)) for name in names)


def has_scheduler(optimizer: Optimizer) -> bool:
    """Return whether a learning-rate scheduler is attached.

    Schedulers wrap ``step`` and mark it. Without the mark: False, and a scheduler attached too
    early is not reported.
    """
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


# ---- tensors and modules ----


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written in place.

    Autograd counts that to find values that were overwritten; there is no public name.
    """
    return tensor._version


def buffers_of(module: Module) -> dict[str, Tensor | None]:
    """Return the dictionary of a module's own buffers, including those that are None.

    ``named_buffers`` leaves the latter out and cannot put them back.
    """
    buffers: dict[str, Tensor | None] = module._buffers
    return buffers


# ---- distributed ----


class ShardedParameter(NamedTuple):
    """A parameter of a module under ``fully_shard``.

    Attributes
    ----------
    unit : FSDPModule
        The module that ``fully_shard`` was applied to.
    param : Tensor
        The sharded parameter, which the optimizer has.
    owner : Module
        The module that holds it, sharded or not, as its attribute `name`.
    """

    unit: Any
    param: Tensor
    owner: Module
    name: str


def fsdp_parameters() -> Iterator[ShardedParameter]:
    """Yield the sharded parameters of all modules under ``fully_shard``; none is changed.

    A parameter does not say which module holds it, and while that module is unsharded it holds
    another tensor. PyTorch keeps a weak dictionary of the states of all such modules. Without it
    nothing is found, and a step says that the loss does not depend on the parameters.
    """
    composable = sys.modules.get("torch.distributed._composable_state")
    if composable is None:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in list(getattr(composable, "_module_state_mapping", ())):
        if isinstance(module, FSDPModule):
            for group in _fsdp_groups(module):
                for p in group.fsdp_params:
                    info = p._module_info
                    yield ShardedParameter(module, p.sharded_param, info.module, info.param_name)


def reshards_after_backward(module: Any) -> bool:
    """Return what ``set_reshard_after_backward`` has set; the default, True, if that is unknown."""
    return all(getattr(group, "reshard_after_backward", True) for group in _fsdp_groups(module))


def _fsdp_groups(module: Any) -> list[Any]:
    """Return the groups of parameters that an FSDP module unshards together."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):  # newer versions may have several
        return list(state._fsdp_param_groups)
    group = getattr(state, "_fsdp_param_group", None)
    return [] if group is None else [group]


_DTENSOR_API = "torch.distributed.tensor._api"
_FROM_LOCAL = "_FromTorchTensor"


def from_local_binding() -> Binding | None:
    """Return where ``DTensor.from_local`` finds its autograd function, to bind another one.

    None before DTensor is used, or where a release has no such function; second derivatives of
    tensor parallel models are then those of PyTorch itself.
    """
    api = sys.modules.get(_DTENSOR_API)
    return None if api is None or not hasattr(api, _FROM_LOCAL) else (api, _FROM_LOCAL)


def is_from_local(function: Any) -> bool:
    """Return whether this is PyTorch's own autograd function of ``DTensor.from_local``."""
    found = getattr(function, "__module__", None), getattr(function, "__name__", None)
    return found == (_DTENSOR_API, _FROM_LOCAL)


def redistributes_once(function: Any) -> bool:
    """Return whether an autograd function redistributes DTensors without a second derivative.

    Versions of PyTorch whose redistribution is differentiable twice have a class for it.
    """
    name = "torch.distributed.tensor._redistribute"
    same = getattr(function, "__module__", None) == name
    return same and not hasattr(sys.modules[name], "NestedRedistribute")


# ---- kernels and compilation ----


def recurrent_bindings() -> list[Binding]:
    """Return where recurrent layers find their operations, to bind others; empty if unknown."""
    found = getattr(torch, "_VF", None)
    names = ("lstm", "gru", "rnn_tanh", "rnn_relu")
    return [(found, name) for name in names if hasattr(found, name)]


def weight_norm_bindings() -> list[Binding]:
    """Return where both forms of weight normalisation find their operation; empty if unknown."""
    # Not torch.nn.utils.weight_norm, which is the function of that name.
    owners = (torch, sys.modules.get("torch.nn.utils.weight_norm"))
    return [(owner, "_weight_norm") for owner in owners if hasattr(owner, "_weight_norm")]


def is_dynamo_loaded() -> bool:
    """Return whether ``torch.compile`` has been used; asking must not import it, which is slow."""
    return "torch._dynamo" in sys.modules


def has_compiled() -> bool:
    """Return whether anything was compiled in this process; True if that is unknown.

    There is no public way to ask. PyTorch keeps the backends that compiled code was made for.
    """
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    backends = {} if eval_frame is None else getattr(eval_frame, "cached_backends", {0: "unknown"})
    return any(backend is not None for backend in backends.values())


# ---- forward mode ----


def sets_grad_mode(function: Any) -> bool:
    """Return whether this is the function behind ``torch.no_grad`` and its relatives.

    A mode for functions sees it, and nothing public names it. Without the name: False.
    """
    return function is getattr(torch._C, "_set_grad_enabled", None)


def without_forward_gradients() -> AbstractContextManager[Any]:
    """Return a context in which forward-mode differentiation propagates no tangents.

    ``torch.no_grad`` does that for reverse mode only. Without the name the context does nothing,
    and the Gauss-Newton curvature follows the tangents of code under ``no_grad`` too.
    """
    switch = getattr(forward_ad, "_set_fwd_grad_enabled", None)
    return nullcontext() if switch is None else switch(False)


# ---- autograd nodes ----


def function_of(node: Any) -> Any:
    """Return the ``autograd.Function`` that created a node; None if there is none.

    Without the name: None, and functions that lack a second derivative are not recognised.
    """
    return getattr(node, "_forward_cls", None)


def saved(node: Any, name: str) -> Any:
    """Return what an autograd node has saved of the forward pass under a name.

    Integers are as they were given; PyTorch shows negative ones as unsigned. Without the name:
    `MissingInternal`, and the graph is not replayed.
    """
    try:
        value = getattr(node, f"_saved_{name}")
    except AttributeError as error:
        msg = f"{node.name()} has no attribute _saved_{name} in this version of PyTorch"
        raise MissingInternal(msg) from error
    if isinstance(value, int) and not isinstance(value, bool):
        return _signed(value)
    if isinstance(value, tuple):
        return tuple(_signed(v) if isinstance(v, int) else v for v in value)
    return value


def output_metadata(node: Any) -> Any:
    """Return shape, dtype and device of each output that an autograd node had in the forward pass.

    The name says input, because they are the inputs of the backward pass. Without it:
    `MissingInternal`, and the graph is not replayed.
    """
    try:
        return node._input_metadata
    except AttributeError as error:
        msg = f"{node.name()} has no attribute _input_metadata in this version of PyTorch"
        raise MissingInternal(msg) from error


def unpack_hook(node: Any) -> Any:
    """Return the hook that unpacks one of the tensors that a node has saved; None without one.

    Also None without the names. Then activation checkpoints are not recognised, and a replay
    repeats their forward pass for each tensor that it reads.
    """
    kind: Any = type(node)
    name = _a_saved_tensor(kind)
    found = None if name is None else getattr(node, name)
    return getattr(found, "unpack_hook", None)


@functools.cache
def _a_saved_tensor(kind: type) -> str | None:
    return next((name for name in dir(kind) if name.startswith("_raw_saved_")), None)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
