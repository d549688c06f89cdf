"""Private names of PyTorch: in one module only, with fallbacks that give the same."""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import cdat_torch
from cdat_torch import pytorch_internals

SOURCE = Path(cdat_torch.__file__).parent
PRIVATE = re.compile(r"_[A-Za-z]\w*")
# Of Python itself, and kernels of PyTorch for lists of tensors, whose names have never changed.
ALLOWED = re.compile(r"_replace|_asdict|_fields|_getframe|_foreach_\w+")


def names_set_by(tree: ast.AST) -> set[str]:
    """The private names that the package defines itself."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def names_used_by(tree: ast.AST) -> Iterator[str]:
    """Private attributes, imports from private modules, and strings that hold such a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Constant) and re.fullmatch(r"\S+", str(node.value)):
            yield from re.split(r"\W", str(node.value))


def test_no_other_module_names_a_private_attribute_of_pytorch() -> None:
    modules = {
        path: ast.parse(path.read_text())
        for path in SOURCE.rglob("*.py")
        if path.name != "pytorch_internals.py"
    }
    own = set[str]().union(*map(names_set_by, modules.values()))
    found = {
        f"{path.relative_to(SOURCE)}: {name}"
        for path, tree in modules.items()
        for name in names_used_by(tree)
        if PRIVATE.fullmatch(name) and name not in own and not ALLOWED.fullmatch(name)
    }
    assert not found


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_adam_without_its_private_name(
    amsgrad: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, by the public function."""
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}

    def stepped() -> list[torch.Tensor]:
        torch.manual_seed(0)
        lists = [[torch.rand(5, dtype=dtype), torch.rand(2, 3, dtype=dtype)] for _ in range(5)]
        steps = [torch.tensor(1.0), torch.tensor(4.0)]
        largest = lists[4] if amsgrad else []
        pytorch_internals.fused_adam(
            *lists[:4], largest, steps, amsgrad=amsgrad, maximize=False, **options
        )
        return [t for part in lists for t in part]

    expected = stepped()
    monkeypatch.setattr(pytorch_internals, "torch", types.SimpleNamespace())
    torch.testing.assert_close(stepped(), expected, rtol=0, atol=0)


def test_hooks_and_schedulers_are_seen() -> None:
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    assert not pytorch_internals.has_step_hooks(optimizer)
    assert not pytorch_internals.has_scheduler(optimizer)
    handle = optimizer.register_step_pre_hook(lambda *_: None)
    assert pytorch_internals.has_step_hooks(optimizer)
    handle.remove()
    optimizer.register_step_post_hook(lambda *_: None)
    assert pytorch_internals.has_step_hooks(optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert pytorch_internals.has_scheduler(optimizer)


def test_operations_to_rebind_are_found() -> None:
    """Both forms of weight normalisation and all kinds of recurrent layers call them."""
    assert len(pytorch_internals.recurrent_bindings()) == 4
    owners = [owner for owner, _ in pytorch_internals.weight_norm_bindings()]
    assert len(owners) == 2
    called = []
    owner, name = pytorch_internals.recurrent_bindings()[0]
    with pytest.MonkeyPatch.context() as patch:
        original = getattr(owner, name)
        patch.setattr(owner, name, lambda *a: called.append(name) or original(*a))
        nn.LSTM(2, 3)(torch.ones(4, 2))
    assert called == ["lstm"]


def test_the_function_of_a_node_is_found() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    result = Twice.apply(torch.ones(1, requires_grad=True))
    assert pytorch_internals.function_of(result.grad_fn) is Twice
    assert pytorch_internals.function_of((2 * torch.ones(1, requires_grad=True)).grad_fn) is None
