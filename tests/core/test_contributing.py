"""CONTRIBUTING says where to find things: every place it names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"`((?:src|docs|tests)/[\w./]+)`", TEXT)))
INSIDE = re.search(r"### Inside cdat_torch\n(.*?)\n###", TEXT, re.DOTALL)


def test_places_are_found_in_the_text():
    assert len(PATHS) > 15
    assert INSIDE is not None


# The tutorial invents a module.
@pytest.mark.parametrize("path", [p for p in PATHS if not p.endswith("/_cautious.py")])
def test_named_path_exists(path):
    assert (ROOT / path).exists()


def test_every_part_of_the_torch_adapter_is_described():
    package = ROOT / "src" / "cdat_torch"
    described = set(re.findall(r"`(\w+\.py|\w+/)`", INSIDE[1]))
    present = {f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").exists()}
    present |= {p.name for p in package.glob("*.py") if p.name != "__init__.py"}
    assert described - {"replay/"} == present
