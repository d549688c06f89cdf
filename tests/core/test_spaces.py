"""The policy of the reference spaces for dtypes."""

import array_api_strict
import numpy as np
import pytest

from cdat_core import ArraySpace, TupleSpace, lanczos


def test_half_precision_is_accumulated_in_single():
    """In float16 the sum of squares would overflow, and small terms would be lost."""
    space = ArraySpace()
    x = np.full(3, 300.0, dtype=np.float16)
    assert space.vdot(x, x).dtype == np.float32
    assert float(space.vdot(x, x)) == 270000.0
    ones = np.ones(4099, dtype=np.float16)
    assert float(TupleSpace().vdot((ones, ones[:1]), (ones, ones[:1]))) == 4100.0
    assert space.vdot(x, x.astype(np.float64)).dtype == np.float64


def test_half_precision_results_are_rounded_once():
    space = ArraySpace()
    x = np.asarray([1.0, 3.0], dtype=np.float16)
    for a in (0.1, np.float64(0.1), np.asarray(0.1, dtype=np.float32)):
        scaled, moved = space.scale(a, x), space.add_scale(x, a, x)
        assert scaled.dtype == moved.dtype == np.float16
        np.testing.assert_array_equal(scaled, np.float16(np.array([1.0, 3.0]) * 0.1))
        np.testing.assert_array_equal(moved, np.float16(np.array([1.0, 3.0]) * 1.1))
    # A factor beyond the range of float16 whose product is within it.
    small = np.asarray([2.0**-20], dtype=np.float16)
    assert float(space.scale(1e6, small)[0]) == pytest.approx(1e6 / 2**20, rel=1e-3)


def test_estimators_run_on_half_precision_vectors():
    """The breakdown is found although rounding errors of the vectors are 1e4 times the scalars'."""
    diagonal = np.asarray([4.0, 3.0, 3.0, -1.5, 0.25], dtype=np.float16)
    start = np.asarray([1.0, 2.0, 1.0, -1.0, 0.5], dtype=np.float16)
    run = lanczos(lambda v: diagonal * v, start, num_matvecs=7, space=ArraySpace())
    assert run.diagonal.dtype == np.float32
    assert {v.dtype for v in run.vectors} == {np.dtype(np.float16)}
    assert int(run.num_valid) in (4, 5)  # rounding may show the second eigenvector of 3
    n = int(run.num_valid)
    matrix = np.diag(run.diagonal) + np.diag(run.off_diagonal, 1) + np.diag(run.off_diagonal, -1)
    found = np.linalg.eigvalsh(matrix[:n, :n])
    eps = float(np.finfo(np.float16).eps)
    exact = [-1.5, 0.25, 3.0, 3.0, 4.0] if n == 5 else [-1.5, 0.25, 3.0, 4.0]
    np.testing.assert_allclose(found, exact, atol=8 * eps * 4)


def test_result_has_the_dtype_of_the_first_vector(xp):
    x, y = xp.ones((2,), dtype=xp.float32), xp.ones((2,), dtype=xp.float64)
    assert ArraySpace().add_scale(x, 0.5, y).dtype == xp.float32
    assert ArraySpace().add_scale(y, 0.5, x).dtype == xp.float64


@pytest.mark.parametrize("name", ["int32", "int64", "uint8", "bool"])
@pytest.mark.parametrize("argument", ["x", "y"])
def test_integers_and_booleans_are_refused(xp, name, argument):
    good = xp.ones((2,))
    bad = xp.ones((2,), dtype=getattr(xp, name))
    x, y = (bad, good) if argument == "x" else (good, bad)
    dtype = "bool" if xp is np and name == "bool" else f".*{name}"
    with pytest.raises(TypeError, match=rf"^{argument} must have a floating dtype, got {dtype};"):
        ArraySpace().vdot(x, y)
    with pytest.raises(TypeError, match="must have a floating dtype"):
        TupleSpace().vdot((good, x), (good, y))


def test_integer_start_is_refused_by_the_estimators():
    with pytest.raises(
        TypeError, match=r"^x must have a floating dtype, got int64; cast it first$"
    ):
        lanczos(lambda v: v, np.ones(3, dtype=np.int64), num_matvecs=2, space=ArraySpace())


def test_strict_has_no_half_precision():
    """Should it get one, the tests above ought to run on it too."""
    assert not hasattr(array_api_strict, "float16")
