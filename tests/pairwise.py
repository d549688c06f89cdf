"""Pairwise cover: few of the combinations of parameters, but every pair of values among them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations


def cover(combinations_: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Choose combinations until every pair of values that occurs has been chosen once.

    Parameters
    ----------
    combinations_
        The values of all parameters by name, one mapping for each combination.

    Returns
    -------
    list of int
        Positions of the chosen combinations, ascending. Where there are no more than two
        parameters, these are all combinations that differ.

    Notes
    -----
    Greedy: the combination with most pairs that are still missing comes next, the first of equals,
    so that the choice is the same in every process.
    """
    pairs = [_pairs(values) for values in combinations_]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(pairs)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return sorted(chosen)


def _pairs(values: Mapping[str, Hashable]) -> set[Hashable]:
    """Return the single values and the pairs of a combination."""
    ordered = sorted(values.items(), key=lambda item: item[0])
    return {*ordered, *combinations(ordered, 2)}
