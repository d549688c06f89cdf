"""Two processes of two devices, joined by ``jax.distributed``, take the steps of one device."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.jax_ecosystem.problems import LAYOUTS, SOLVERS, batch, run, start, train_step

NAMES = ("every", "zoom")
STEPS = 4

WORKER = """
    import sys
    import jax
    number, port, path = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize("localhost:" + port, num_processes=2, process_id=int(number))
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from tests.jax_ecosystem.problems import LAYOUTS, batch, run, start, train_step
    from tests.jax_ecosystem.test_processes import NAMES, SOLVERS, STEPS, flat

    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def everywhere(tree, layout):
        place = lambda leaf: jax.make_array_from_callback(
            leaf.shape, NamedSharding(mesh, layout(leaf)), np.asarray(leaf).__getitem__
        )
        return jax.tree.map(place, tree)

    data, found = everywhere(batch(), lambda leaf: P("data")), {}
    for name in NAMES:
        solver = SOLVERS[name]()
        step = jax.jit(train_step(solver))
        for kind, layout in LAYOUTS.items():
            params, state = everywhere((start(), solver.init(start())), layout)
            params, state, _ = run(step, params, state, data, STEPS)
            found[name + kind] = flat(process_allgather((params, state), tiled=True))
    np.savez(path, **found)
"""


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the final numbers of each of the two processes, by solver and layout."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    paths = [tmp_path_factory.mktemp("process") / "numbers.npz" for _ in range(2)]
    command = [sys.executable, "-c", textwrap.dedent(WORKER)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    options = {"cwd": Path(__file__).parents[2], "env": environment}
    processes = [
        subprocess.Popen([*command, str(number), port, str(path)], **options)
        for number, path in enumerate(paths)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [dict(np.load(path)) for path in paths]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_both_processes_have_the_numbers_of_one(found, name, kind):
    solver, params = SOLVERS[name](), start()
    expected = run(jax.jit(train_step(solver)), params, solver.init(params), batch(), STEPS)
    first, second = (numbers[name + kind] for numbers in found)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, flat(expected[:2]), rtol=1e-12, atol=1e-13)
