"""The replay is on for every supported PyTorch that is not known to be bad."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cdat_torch import CDAT, measure
from cdat_torch.curvature.replay import versions

HERE = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.fixture
def unsupported(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    reason = "unsupported by this test"
    monkeypatch.setitem(versions._KNOWN_BAD, HERE, reason)
    versions._log_unsupported.cache_clear()
    yield reason
    versions._log_unsupported.cache_clear()


def cubic() -> torch.Tensor:
    return torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "version",
    ["2.12.0", "2.12.1", "2.13.0+cpu", "2.14.1+cu126", "2.15.0a0+git", "2.99.0.dev20300101", "3.0"],
)
def test_supported_from_the_floor_on(version: str) -> None:
    assert versions.why_unsupported(version) is None


@pytest.mark.parametrize("version", ["2.11.1", "2.11.1+cu126", "1.13.0", "2.9.0", "2.11.0a0+git"])
def test_unsupported_below_the_floor(version: str) -> None:
    assert versions.why_unsupported(version) == "releases before 2.12 are not supported"


@pytest.mark.parametrize("version", ["", "unknown", "v2", "2"])
def test_unsupported_where_the_version_cannot_be_read(version: str) -> None:
    assert versions.why_unsupported(version) == "its version cannot be read"


@pytest.mark.parametrize("version", ["2.20.0", "2.20.1+cu126", "2.20.0a0+git"])
def test_a_release_that_is_known_to_be_bad(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions._KNOWN_BAD, (2, 20), "a node saves something else")
    assert versions.why_unsupported(version) == "a node saves something else"
    assert versions.why_unsupported("2.19.0") is None
    assert versions.why_unsupported("2.21.0") is None


def test_the_floor_is_that_of_the_package() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    torch_extra = tomllib.loads(text)["project"]["optional-dependencies"]["torch"]
    assert torch_extra == ["torch>={}.{}".format(*versions._OLDEST)]


def test_supported_with_this_release() -> None:
    w = cubic()
    u = [torch.ones_like(w)]
    assert versions.is_supported()
    assert measure(lambda: (w**3).sum(), [w], u, curvature="replay").curvature == 12.0


def test_double_backward_takes_over_and_the_reason_is_logged_once(
    unsupported: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        w = cubic()
        optimizer = CDAT(torch.optim.SGD([w], lr=1.0))
        optimizer.step(lambda w=w: (w**3).sum())
        assert optimizer.last.curvature == 12.0 * 12.0**2  # <u, H u> with u = -g
    (record,) = [r for r in caplog.records if "not replayed" in r.message]
    assert record.levelno == logging.WARNING
    assert f"PyTorch {torch.__version__} ({unsupported})" in record.message
    assert "which costs more" in record.message


def test_replay_asked_for_by_name_is_an_error(unsupported: str) -> None:
    w = cubic()
    with pytest.raises(RuntimeError, match=rf"does not work with PyTorch .* \({unsupported}\)"):
        CDAT(torch.optim.SGD([w], lr=1.0), curvature="replay")
    with pytest.raises(RuntimeError, match='pass curvature="auto"'):
        measure(lambda: (w**3).sum(), [w], [torch.ones_like(w)], curvature="replay")
