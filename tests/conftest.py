"""How much of the suite runs, and the profiles of Hypothesis.

By default a test with several parameters runs with a pairwise cover of their values, and Hypothesis
draws fewer examples. The tests of a module that are marked ``laws`` run over the same cases: there
each argument, and which test it is, counts as a parameter. ``--full`` (``nox -s full``) runs every
combination and all examples.

The examples are the same in every run; ``HYPOTHESIS_PROFILE=dev`` draws new ones and keeps what it
finds in the example database.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import pytest
from hypothesis import settings

from tests.pairwise import cover

settings.register_profile(
    "default", derandomize=True, deadline=None, print_blob=True, max_examples=40
)
settings.register_profile("full", settings.get_profile("default"), max_examples=100)
settings.register_profile("dev", deadline=None, print_blob=True)

LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="run every combination of parameters, and more examples"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "laws: tests of the module run over the same cases; which test is a parameter too",
    )
    config.addinivalue_line(
        "markers",
        "bitwise: compares the bits of two compiled programs, which must be compiled as users do",
    )
    config.stash[LEFT_OUT] = 0
    profile = "full" if config.getoption("full") else "default"
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", profile))


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("full"):
        return "parameters: every combination"
    return "parameters: a pairwise cover of their values; --full or `nox -s full` runs all"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out combinations of parameters of which every pair of values runs elsewhere."""
    if config.getoption("full"):
        return
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        laws = item.get_closest_marker("laws")
        tests[item.nodeid.partition("::" if laws else "[")[0]].append(item)
    kept = set()
    for same in tests.values():
        parameters = [_parameters(item) for item in same]
        chosen = cover(parameters) if all(parameters) else range(len(same))
        kept.update(same[i].nodeid for i in chosen)
    left_out = [item for item in items if item.nodeid not in kept]
    items[:] = [item for item in items if item.nodeid in kept]
    config.stash[LEFT_OUT] = len(left_out)
    config.hook.pytest_deselected(items=left_out)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = len(left_out)


def _parameters(item: pytest.Item) -> dict[str, tuple[Hashable, ...]]:
    """Return the value of each parameter.

    The arguments of one ``parametrize`` count as one parameter. Among laws each argument counts,
    and the law itself.
    """
    callspec: Any = getattr(item, "callspec", None)
    params = {} if callspec is None else callspec.params
    row = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        for name in names.split(",") if isinstance(names, str) else names:
            row[name.strip()] = str(names)
    values: dict[str, tuple[Hashable, ...]] = defaultdict(tuple)
    if item.get_closest_marker("laws"):
        row, values["law"] = {}, (item.nodeid.partition("[")[0],)
    for name, value in sorted(params.items(), key=lambda parameter: parameter[0]):
        values[row.get(name, name)] += (_key(value),)
    return dict(values)


def _key(value: object) -> Hashable:
    """Return what tells two values of a parameter apart."""
    plain = isinstance(value, str | bytes | int | float | complex | tuple | dict | None)
    return (type(value), repr(value)) if plain else id(value)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Ask a worker of pytest-xdist how many it left out; all of them collect the same."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if left_out := config.stash[LEFT_OUT]:
        terminalreporter.write_line(
            f"{left_out} combinations of parameters left out; `nox -s full` runs all"
        )
