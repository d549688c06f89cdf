"""The collectives of a compiled program."""

import re
from collections import Counter

COLLECTIVE = re.compile(
    r" = (?P<shapes>.+?) (?P<name>all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute)(?:-start)?\("
)
SHAPE = re.compile(r"\w+\[(?P<sizes>[\d,]*)\]")


def collectives(program):
    """Return a Counter of (name, sizes) over the results of all collectives in an HLO text.

    XLA may send several arrays in one operation; each of them counts. It may also transpose them,
    so the sizes are sorted.
    """
    found = Counter()
    for operation in COLLECTIVE.finditer(program):
        for shape in SHAPE.finditer(operation["shapes"]):
            sizes = [int(size) for size in shape["sizes"].split(",") if size]
            found[operation["name"], tuple(sorted(sizes))] += 1
    return found


def operations(program, name):
    """Return the number of collectives of this name."""
    return sum(found["name"] == name for found in COLLECTIVE.finditer(program))


def outside_of_branches(program):
    """Return the part of an HLO text that always runs: without the branches of conditionals."""
    return program[program.index("\nENTRY ") :]
