"""Common-subexpression elimination: run a function without its repeated operations.

Nested derivatives along one direction compute every tangent twice, by equal operations. XLA merges
equal operations too, but only after it has simplified each of them depending on its users: after a
layer norm two equal tangents no longer look alike, and all later matrix products are computed
twice. Here they are merged in the jaxpr. Arrays are numbered, equal arrays alike (value numbering);
an operation is identified by its primitive, its parameters and the numbers of its inputs, and is
not repeated if it was done before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from cdat_jax._spaces import PyTree


def without_repeats(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return `fn`, a traceable function of pytrees of arrays, without repeated operations."""

    def once(*args: PyTree) -> PyTree:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        inputs = [_Value(leaf, ("array", id(leaf))) for leaf in jax.tree.leaves(args)]
        outputs = _Operations().run(closed, inputs)
        return jax.tree.unflatten(jax.tree.structure(shapes), [out.array for out in outputs])

    return once


class _Value(NamedTuple):
    """An array and its number; arrays with the same number are equal."""

    array: Any
    number: Hashable


class _Operations:
    """The operations done so far in one trace."""

    def __init__(self) -> None:
        self.done: dict[Hashable, list[_Value]] = {}
        self.fresh = itertools.count()

    def run(self, closed: ClosedJaxpr, inputs: Sequence[_Value]) -> list[_Value]:
        """Return the outputs of a program."""
        jaxpr = closed.jaxpr
        consts = [_Value(const, ("array", id(const))) for const in closed.consts]
        known = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> _Value:
            return _literal(atom) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            outputs = self.apply(jaxpr, equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def apply(self, jaxpr: Jaxpr, equation: Any, inputs: Sequence[_Value]) -> list[_Value]:
        """Return the outputs of one equation of a program, computed now or before."""
        body = _inlined(equation)
        if body is not None:
            return self.run(body, inputs)
        if equation.effects:
            return self.numbered(_evaluated(jaxpr, equation, inputs))
        key = _key(equation, inputs)
        if key in self.done:
            return self.done[key]
        if equation.primitive.name == "scan":
            outputs = self.scan(equation.params, inputs)
        else:
            outputs = self.numbered(_evaluated(jaxpr, equation, inputs))
        self.done[key] = outputs
        return outputs

    def numbered(self, arrays: Sequence[Any]) -> list[_Value]:
        return [_Value(array, next(self.fresh)) for array in arrays]

    def scan(self, params: dict[str, Any], inputs: Sequence[_Value]) -> list[_Value]:
        """Scan with a single carry for all those that start equal and stay equal."""
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        consts, init, xs = inputs[:first], inputs[first:last], inputs[last:]
        options = {key: params[key] for key in ("length", "reverse", "unroll")}

        def body(carry: list[Any], x: list[Any], carried: list[int]) -> tuple[list[_Value], ...]:
            values = [_Value(const.array, ("const", const.number)) for const in consts]
            values += [_Value(carry[rank], ("carry", rank)) for rank in carried]
            values += [_Value(x[rank], ("x", rank)) for rank in scanned]
            outputs = _Operations().run(params["jaxpr"], values)
            return outputs[: len(carried)], outputs[len(carried) :]

        def after_one_step(carried: list[int]) -> list[Hashable]:
            found: list[Hashable] = []

            def probe(carry: list[Any], x: list[Any]) -> tuple[list[Any], None]:
                found[:] = [value.number for value in body(carry, x, carried)[0]]
                return carry, None

            start, data = _distinct(init, carried), _distinct(xs, scanned)
            jax.eval_shape(lambda: jax.lax.scan(probe, start, data, **options))
            return found

        scanned = _ranks([value.number for value in xs])
        stacked: list[int] = []
        carried, coarser = _ranks([value.number for value in init]), None
        while carried != coarser:  # carries that differ after one step are separate
            coarser = carried
            carried = _ranks(list(zip(coarser, after_one_step(coarser), strict=True)))

        def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            moved, y = body(carry, x, carried)
            stacked[:] = _ranks([value.number for value in y])
            return _distinct(moved, carried), _distinct(y, stacked)

        final, ys = jax.lax.scan(step, _distinct(init, carried), _distinct(xs, scanned), **options)
        final, ys = self.numbered(final), self.numbered(ys)
        return [final[rank] for rank in carried] + [ys[rank] for rank in stacked]


def _ranks(keys: Sequence[Hashable]) -> list[int]:
    """Return the place of each key among the distinct keys, in order of first occurrence."""
    places: dict[Hashable, int] = {}
    return [places.setdefault(key, len(places)) for key in keys]


def _distinct(values: Sequence[_Value], ranks: list[int]) -> list[Any]:
    """Return the array of the first value of each rank."""
    return [values[ranks.index(rank)].array for rank in range(len(set(ranks)))]


def _literal(atom: Any) -> _Value:
    # Bytes, because 0.0 == -0.0.
    return _Value(atom.val, ("literal", str(atom.aval), np.asarray(atom.val).tobytes()))


def _key(equation: Any, inputs: Sequence[_Value]) -> Hashable:
    params = tuple((name, _identity(value)) for name, value in equation.params.items())
    numbers = tuple(value.number for value in inputs)
    return equation.primitive, numbers, params, repr(equation.ctx)


def _identity(param: Any) -> Hashable:
    try:
        hash(param)
    except TypeError:
        return id(param)
    return type(param), param


def _evaluated(jaxpr: Jaxpr, equation: Any, inputs: Sequence[_Value]) -> Sequence[Any]:
    """Evaluate one equation as JAX does, with its name, source line and context."""
    arrays = {
        atom: value.array
        for atom, value in zip(equation.invars, inputs, strict=True)
        if not isinstance(atom, Literal)
    }
    # The names of the program's arguments and results do not fit the equation.
    unnamed = [("",) * len(atoms) for atoms in (arrays, equation.outvars)]
    names = jaxpr.debug_info._replace(arg_names=unnamed[0], result_paths=unnamed[1])
    outvars, effects = equation.outvars, equation.effects
    alone = Jaxpr([], list(arrays), outvars, [equation], effects, debug_info=names)
    outputs: Sequence[Any] = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*arrays.values())
    return outputs


def _inlined(equation: Any) -> ClosedJaxpr | None:
    """Return the program of a call that can be run inline, or None."""
    name, params = equation.primitive.name, equation.params
    if name in ("jit", "pjit"):
        placed = (*params["in_shardings"], *params["out_shardings"])
        keep = params["compiler_options_kvs"] or any(
            isinstance(where, jax.sharding.Sharding) for where in placed
        )
        return None if keep else params["jaxpr"]
    if name in ("checkpoint", "remat2") and not params["differentiated"]:
        return ClosedJaxpr(params["jaxpr"], ())
    return None
