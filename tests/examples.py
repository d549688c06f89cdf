"""How many examples Hypothesis draws for one test."""

from hypothesis import settings

FULL = 100
"""Hypothesis's own number, which the profile of the full suite has."""


def examples(number: int) -> settings:
    """Draw `number` examples in the full suite, and by default fewer in the same proportion."""
    return settings(max_examples=-(-number * settings.default.max_examples // FULL))
