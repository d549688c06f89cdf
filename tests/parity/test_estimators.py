"""The estimators compute the same under every framework, compiled, batched, and without values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backends import BACKENDS, DTYPES

from cdat_core import (
    ArraySpace,
    hutchinson_trace,
    hutchpp_trace,
    lanczos,
    preconditioned,
    spectral_density,
    top_eigenvalues,
)
from cdat_core._tridiagonal import ritz_decomposition
from cdat_jax import TreeSpace
from cdat_torch import TensorListSpace

N, PROBES = 9, 3
_rng = np.random.default_rng(0)
_basis, _ = np.linalg.qr(_rng.standard_normal((N, N)))
# Well separated, so that vectors are determined as well as values.
MATRIX = _basis * np.linspace(-1.0, 3.0, N) @ _basis.T
MATRIX = (MATRIX + MATRIX.T) / 2
VECTORS = _rng.standard_normal((PROBES, N))


def top(hvp, vectors, space):
    found = top_eigenvalues(hvp, vectors[0], k=1, num_matvecs=6, space=space, which="both")
    return found.values, found.vectors, found.residual_norms, found.num_matvecs


# Each takes hvp, a list of vectors and their space, and returns scalars, arrays and tuples of V.
ESTIMATORS = {
    "lanczos": lambda hvp, vectors, space: lanczos(hvp, vectors[0], num_matvecs=5, space=space),
    "lanczos without reorthogonalisation": lambda hvp, vectors, space: lanczos(
        hvp, vectors[0], num_matvecs=5, space=space, reorthogonalize=False
    ),
    "top_eigenvalues": top,
    "spectral_density": lambda hvp, vectors, space: spectral_density(
        hvp, vectors, num_matvecs=4, space=space
    ),
    "hutchinson_trace": lambda hvp, vectors, space: hutchinson_trace(hvp, vectors, space=space),
    "hutchpp_trace": lambda hvp, vectors, space: hutchpp_trace(hvp, vectors, space=space),
    "preconditioned": lambda hvp, vectors, space: preconditioned(hvp, 0.5, space=space)(vectors[0]),
}


def flat(result):
    """Return all numbers of a result in double precision."""
    if isinstance(result, (tuple, list)):
        return np.concatenate([flat(part) for part in result]) if result else np.zeros(0)
    return np.asarray(result, dtype=np.float64).ravel()


@functools.cache
def reference(name):
    return flat(ESTIMATORS[name](lambda v: MATRIX @ v, list(VECTORS), ArraySpace()))


def assert_agrees(result, name, dtype):
    """Rounding errors of a step, 16 eps, are amplified by at most about 100 (measured: 20)."""
    assert np.all(np.isfinite(reference(name)))
    atol = 1600 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(flat(result), reference(name), rtol=atol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_arrays(name, backend, dtype):
    """In JAX under jit."""
    matrix = backend.asarray(MATRIX, dtype)
    vectors = [backend.asarray(z, dtype) for z in VECTORS]

    def run(matrix, vectors):
        return ESTIMATORS[name](lambda v: matrix @ v, vectors, ArraySpace())

    assert_agrees(backend.wrap(run)(matrix, vectors), name, dtype)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_pytrees(name):
    dtype = "float32"
    matrix = jnp.asarray(MATRIX, dtype)

    def split(z):
        return {"a": z[:5], "b": z[5:].reshape(2, 2)}

    def hvp(tree):
        return split(matrix @ jnp.concatenate([tree["a"], tree["b"].ravel()]))

    def parts(result):
        """Make tuples of the trees, which `flat` can read."""
        is_tree = lambda x: isinstance(x, dict)
        return jax.tree.map(
            lambda x: (x["a"], x["b"]) if is_tree(x) else x, result, is_leaf=is_tree
        )

    vectors = [split(jnp.asarray(z, dtype)) for z in VECTORS]
    run = jax.jit(lambda vectors: ESTIMATORS[name](hvp, vectors, TreeSpace()))
    assert_agrees(parts(run(vectors)), name, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_lists_of_tensors(name, dtype):
    """Scalars are float64 here, whatever the tensors are."""
    matrix = torch.as_tensor(MATRIX.astype(dtype))

    def split(z):
        return [z[:5], z[5:].reshape(4, 1)]

    def hvp(tensors):
        return split(matrix @ torch.cat([t.ravel() for t in tensors]))

    vectors = [split(torch.as_tensor(z.astype(dtype))) for z in VECTORS]
    assert_agrees(ESTIMATORS[name](hvp, vectors, TensorListSpace()), name, dtype)


@pytest.mark.parametrize("name", ["top_eigenvalues", "spectral_density", "hutchpp_trace"])
def test_vmap_over_seeds_equals_single_runs(name):
    """Among the seeds one whose Krylov space ends early, and a zero start."""
    matrix = jnp.asarray(MATRIX)
    batch = np.random.default_rng(1).standard_normal((4, PROBES, N))
    batch[1, 0], batch[2, 0] = _basis[:, [0, -1]].sum(axis=1), 0.0
    batch = jnp.asarray(batch)

    def run(vectors):
        return ESTIMATORS[name](lambda v: matrix @ v, list(vectors), ArraySpace())

    batched, single = jax.jit(jax.vmap(run))(batch), jax.jit(run)
    for index, vectors in enumerate(batch):
        mine = jax.tree.map(lambda x, i=index: x[i], batched)
        np.testing.assert_allclose(flat(mine), flat(single(vectors)), rtol=1e-12, atol=1e-12)


def test_early_end_is_found_under_vmap():
    matrix = jnp.asarray(MATRIX)
    chosen = ([], [1], [0, 4, 8])  # eigenvectors of well separated eigenvalues
    starts = jnp.stack([jnp.asarray(_basis[:, columns]).sum(axis=1) for columns in chosen])
    run = jax.jit(
        jax.vmap(lambda z: lanczos(lambda v: matrix @ v, z, num_matvecs=5, space=ArraySpace()))
    )
    assert run(starts).num_valid.tolist() == [0, 1, 3]


def test_compiled_half_precision_finds_the_early_end():
    """The compiler may keep more digits than bfloat16 has between operations."""
    diagonal = jnp.asarray([4.0, 3.0, 3.0, -1.5, 4.0], jnp.bfloat16)
    start = jnp.asarray([1.0, 2.0, 0.0, -1.0, 0.0], jnp.bfloat16)
    for space in (ArraySpace(), TreeSpace()):
        run = jax.jit(lambda z, s=space: lanczos(lambda v: diagonal * v, z, num_matvecs=4, space=s))
        found = run(start)
        assert found.diagonal.dtype == jnp.float32
        assert found.vectors[0].dtype == jnp.bfloat16
        assert int(found.num_valid) == 3
        ritz = ritz_decomposition(found.diagonal, found.off_diagonal, found.num_valid)
        np.testing.assert_allclose(ritz.values[:3], [-1.5, 3.0, 4.0], atol=8 * 2**-8 * 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors_are_accumulated_in_single(dtype):
    space = ArraySpace()
    x = torch.full((3,), 300.0, dtype=dtype)
    assert space.vdot(x, x).dtype == torch.float32
    assert float(space.vdot(x, x)) == pytest.approx(270000.0, rel=0.01)  # 300 itself is rounded
    assert space.scale(torch.tensor(0.1), x).dtype == dtype
    assert space.add_scale(x, torch.tensor(0.1, dtype=torch.float64), x).dtype == dtype


@pytest.mark.parametrize("make", [torch.ones, jnp.ones], ids=["torch", "jax"])
def test_integers_are_refused(make):
    dtype = {torch.ones: torch.int32, jnp.ones: jnp.int32}[make]
    with pytest.raises(TypeError, match=r"^x must have a floating dtype, got .*int32; cast it"):
        ArraySpace().vdot(make(3, dtype=dtype), make(3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_value_is_asked_for(name, dtype):
    """On meta tensors, which have none; eigh included."""
    vectors = [torch.zeros(N, dtype=dtype, device="meta") for _ in range(PROBES)]
    result = ESTIMATORS[name](lambda v: v * 2, vectors, ArraySpace())
    if name == "preconditioned":
        assert (result.device.type, result.dtype) == ("meta", dtype)
        return
    for part in result:
        for tensor in part if isinstance(part, tuple) else (part,):
            assert tensor.device.type == "meta"
    assert result[0].dtype == torch.float32


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_value_is_asked_for_of_lists(name):
    vectors = [[torch.zeros(5, device="meta"), torch.zeros((), device="meta")]] * PROBES
    ESTIMATORS[name](lambda v: [t * 2 for t in v], vectors, TensorListSpace())
