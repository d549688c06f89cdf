"""The choice of combinations of parameters that the default tests run."""

from itertools import combinations, product

import pytest

from tests.pairwise import cover


def pairs(values):
    return set(combinations(sorted(values.items()), 2))


def made(*sizes):
    return [dict(enumerate(values)) for values in product(*map(range, sizes))]


@pytest.mark.parametrize("sizes", [(3, 4, 2), (2, 2, 2, 2), (20, 4, 3, 2, 2), (5, 2, 3)])
def test_every_pair_of_values_stays(sizes):
    full = made(*sizes)
    chosen = [full[i] for i in cover(full)]
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, full))
    largest = sorted(sizes)[-2:]
    assert largest[0] * largest[1] <= len(chosen) < len(full)


@pytest.mark.parametrize("sizes", [(4,), (3, 4)])
def test_all_combinations_of_one_or_two_parameters_stay(sizes):
    full = made(*sizes)
    assert cover(full) == list(range(len(full)))


def test_pairs_that_never_occur_are_not_asked_for():
    partial = [values for values in made(3, 3, 3) if values[0] != values[1]]
    chosen = [partial[i] for i in cover(partial)]
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, partial))
    assert len(chosen) < len(partial)
