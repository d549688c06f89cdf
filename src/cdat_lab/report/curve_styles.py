"""Styles of the contenders' curves: distinct by colour, and in grey by dash and width."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
"""The Okabe-Ito palette, which colour-blind people can tell apart, without its yellow."""

SOLID, DOTS, DASHES, LONG, MIXED = "solid", "2px,3px", "6px,3px", "13px,3px", "9px,3px,2px,3px"


@dataclass(frozen=True)
class Style:
    """Colour, dash (as SVG has it, or "solid") and width of a curve."""

    color: str
    dash: str
    width: float

    def shade(self, opacity: float) -> str:
        """Return the colour with an opacity."""
        red, green, blue = (int(self.color[at : at + 2], 16) for at in (1, 3, 5))
        return f"rgba({red},{green},{blue},{opacity:g})"


EDGE = Style("#444444", "3px,3px", 1.4)

BUILT_IN = {
    "constant": Style(BLACK, DASHES, 1.8),
    "warmup-constant": Style(GREY, DASHES, 1.8),
    "warmup-cosine": Style(PURPLE, DOTS, 2.4),
    "wsd": Style(PURPLE, DASHES, 2.0),
    "self-tuning": Style(BLUE, LONG, 3.0),
    "self-tuning-average": Style(SKY, DASHES, 2.4),
    "armijo": Style(ORANGE, MIXED, 1.8),
    "zoom": Style(ORANGE, DOTS, 2.0),
    "greedy": Style(VERMILLION, LONG, 1.8),
    "on-edge": Style(VERMILLION, DOTS, 2.0),
    "cdat-1": Style(SKY, LONG, 1.8),
    "cdat-1-ema-0.9": Style(SKY, SOLID, 1.8),
    "cdat-1.9": Style(BLUE, SOLID, 2.8),
    "cdat-1.9-ema-0.9": Style(BLUE, DASHES, 1.8),
    "cdat-2": Style(GREEN, MIXED, 2.2),
    "cdat-2-ema-0.9": Style(GREEN, SOLID, 1.6),
    "cdat-2.0625": Style(PURPLE, SOLID, 1.8),
    "cdat-guarded": Style(GREEN, DOTS, 2.4),
    "cdat-gauss-newton": Style(SKY, MIXED, 1.8),
    "polyak": Style(PURPLE, LONG, 1.8),
    "hypergradient": Style(GREY, MIXED, 1.8),
    "prodigy": Style(BLACK, DOTS, 2.0),
    "prodigy-cosine": Style(BLACK, LONG, 2.0),
    "schedule-free": Style(BLACK, MIXED, 1.6),
    "schedule-free-default": Style(GREY, LONG, 1.6),
    "adamw-0.001": Style(ORANGE, DASHES, 1.8),
    "adamw-0.01": Style(ORANGE, SOLID, 1.8),
    "dog": Style(GREY, DOTS, 2.0),
    "mechanic": Style(GREEN, LONG, 1.8),
}
"""Styles that are the same in every report."""


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Return a style for each contender.

    Parameters
    ----------
    names : iterable of str
        All contenders of a page, in order.

    Returns
    -------
    dict of str to Style
        Built-in contenders have fixed styles; others take the remaining styles in order, starting
        over when none is left.
    """
    names = list(dict.fromkeys(names))
    known = {name: BUILT_IN[name] for name in names if name in BUILT_IN}
    colors = (VERMILLION, SKY, PURPLE, BLUE, ORANGE, GREEN, GREY, BLACK)
    dashes = (SOLID, DASHES, DOTS, LONG, MIXED)
    taken = {(style.color, style.dash) for style in known.values()}
    pairs = [(color, dash) for dash in dashes for color in colors]
    free = [pair for pair in pairs if pair not in taken] or pairs
    others = [name for name in names if name not in known]
    made = {
        name: Style(color, dash, 2.0)
        for name, (color, dash) in zip(others, itertools.cycle(free), strict=False)
    }
    return known | made
