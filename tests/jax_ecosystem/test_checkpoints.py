"""Checkpoints by Orbax and by Flax: a run resumes bit for bit, also on fewer devices."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax.sharding import AxisType

from cdat_jax import ScaleByTunerState, StepInfo, TunedState
from tests.jax.problems import same
from tests.jax_ecosystem.problems import (
    STATEFUL,
    batch,
    begin,
    fully_sharded,
    placed,
    run,
    start,
    train_step,
)


def through_orbax(tree, like, path):
    """Save `tree` and restore it with the devices of `like`."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", jax.tree.map(abstract, like))


def abstract(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def through_flax(tree, like, path):
    """Write the bytes of `tree` and read them onto the devices of `like`."""
    file = path / "checkpoint.msgpack"
    file.write_bytes(serialization.to_bytes(tree))
    restored = serialization.from_bytes(like, file.read_bytes())
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), restored, like)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_resumed_run_is_the_unbroken_one(name, tmp_path):
    solver = STATEFUL[name]()
    step, data, params = jax.jit(train_step(solver)), batch(), start()
    half = run(step, params, solver.init(params), data, 5)[:2]
    end = run(step, *half, data, 5)
    fresh = start(), solver.init(start())
    assert not same(half, fresh)
    for through in (through_orbax, through_flax):
        restored = through(half, fresh, tmp_path)
        assert same(restored, half)  # the structure too: NamedTuples, fields that are None
        assert same(run(step, *restored, data, 5), end)


@pytest.mark.parametrize("name", ["cdat, every third step", "zoom"])
def test_a_run_on_four_devices_resumes_on_fewer(mesh, name, tmp_path):
    """The restored bits are equal, and so are the steps after moving the arrays directly."""
    solver = STATEFUL[name]()
    step = jax.jit(train_step(solver))
    params, state, data = begin(solver, mesh, fully_sharded)
    half = run(step, params, state, data, 4)[:2]
    unbroken = run(step, *half, data, 3)
    for number, through in ((2, through_orbax), (1, through_orbax), (2, through_flax)):
        devices = jax.devices()[:number]
        fewer = jax.make_mesh((number,), ("data",), (AxisType.Auto,), devices=devices)
        params, state, data = begin(solver, fewer, fully_sharded)
        folder = tmp_path / f"{through.__name__}-{number}"
        folder.mkdir()
        restored = through(half, (params, state), folder)
        assert same(restored, half)
        for leaf, like in zip(*map(jax.tree.leaves, (restored, (params, state))), strict=True):
            assert leaf.sharding == like.sharding
        moved = placed(jax.device_get(half), fewer, fully_sharded)
        end = run(step, *restored, data, 3)
        assert same(end, run(step, *moved, data, 3))
        for one, other in zip(*map(jax.tree.leaves, (end, unbroken)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


class OldInfo(NamedTuple):
    value: Any
    slope: Any
    curvature: Any
    skipped: Any
    sharpness: Any


class OldState(NamedTuple):
    learning_rate: Any
    tuner_state: Any
    info: OldInfo
    until_refresh: Any
    sharpness_vector: Any


class OldTunedState(NamedTuple):
    base: Any
    tuner: OldState
    step: Any


def map_states(function, tree):
    kinds = OldState | OldTunedState | ScaleByTunerState | TunedState
    return jax.tree.map(
        lambda x: function(x) if isinstance(x, kinds) else x,
        tree,
        is_leaf=lambda x: isinstance(x, kinds),
    )


def old_layout(state, every=1):
    if isinstance(state, TunedState):
        return OldTunedState(state.base, old_layout(state.tuner, every), state.step)
    info = OldInfo(*(getattr(state.info, name) for name in OldInfo._fields))
    turn = -state.step % every
    return OldState(state.learning_rate, state.tuner_state, info, turn, state.sharpness_vector)


def new_layout(state, every=1):
    if isinstance(state, OldTunedState):
        return TunedState(state.base, new_layout(state.tuner, every), state.step)
    info = StepInfo(**state.info._asdict(), learning_rate=state.learning_rate)
    measures = info.curvature is not None or info.sharpness is not None
    return ScaleByTunerState(
        state.tuner_state,
        info,
        step=-state.until_refresh % every,
        due=state.until_refresh <= 0 if measures else None,
        sharpness_vector=state.sharpness_vector,
    )


def in_turn(state, every=1):
    """Return `state` with the count of updates that the recipe can restore."""
    if isinstance(state, TunedState):
        return state._replace(tuner=in_turn(state.tuner, every))
    return state._replace(step=state.step % every)


@pytest.mark.parametrize(
    ("name", "every"), [("cdat", 1), ("cdat, every third step", 3), ("zoom", 3)]
)
def test_a_checkpoint_in_the_old_layout_can_be_restored(name, every, tmp_path):
    """By the recipe of the documentation; the rate was a field beside the info."""
    solver = STATEFUL[name]()
    half = run(jax.jit(train_step(solver)), start(), solver.init(start()), batch(), 2)[:2]
    fresh = start(), solver.init(start())
    old, new, turn = (functools.partial(f, every=every) for f in (old_layout, new_layout, in_turn))
    for through in (through_orbax, through_flax):
        restored = through(map_states(old, half), map_states(old, fresh), tmp_path)
        assert same(map_states(new, restored), map_states(turn, half))


def test_a_run_resumes_from_a_checkpoint_of_an_older_version():
    """Written by Flax after five steps, before the info of a step became `StepInfo`."""
    solver = STATEFUL["cdat"]()
    fresh = start(), solver.init(start())
    stored = (Path(__file__).parent / "data" / "before_step_info.msgpack").read_bytes()
    restored = serialization.from_bytes(map_states(old_layout, fresh), stored)
    restored = map_states(new_layout, restored)
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)
    step, data = jax.jit(train_step(solver)), batch()
    expected = map_states(in_turn, run(step, *fresh, data, 5)[:2])
    further = run(step, *restored, data, 3), run(step, *expected, data, 3)
    for pair in ((restored, expected), further):
        for one, other in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
