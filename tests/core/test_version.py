"""One version for the distribution and its citation."""

import re
from pathlib import Path

import cdat_core

ROOT = Path(__file__).parents[2]


def test_the_citation_has_the_version_of_the_package():
    (cited,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == cdat_core.__version__


def test_the_distribution_takes_its_version_from_the_package():
    """Hatchling reads the file of the package; no second number can disagree with it."""
    project = (ROOT / "pyproject.toml").read_text()
    assert not re.search(r"^version *=", project, re.MULTILINE)
    assert (ROOT / "src/cdat_core/_version.py").read_text().count(cdat_core.__version__) == 1
    assert 'path = "src/cdat_core/_version.py"' in project
