"""The report in a browser: every figure is drawn, hidden and downloaded, wide and narrow."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

from cdat_lab import model
from cdat_lab.report import render
from tests.lab import made_up

WATCH = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(String(event.message)));
addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
for (const level of ["error", "warn"]) console[level] = (...text) => problems.push(text.join(" "));
</script>"""

LOOK = """<script type="module">
const pause = () => new Promise((resolve) => setTimeout(resolve, 50));
while (document.documentElement.dataset.drawn !== "true" && !problems.length) await pause();
const figures = [...document.querySelectorAll(".figure")];
const chart = document.querySelector(".chart");
const first = chart.querySelector(".figure");
const button = chart.querySelector("[data-group=constant]");
const shown = () => first.data.filter((t) => t.visible !== false && t.legendgroup === "constant");
const before = shown().length;
button.click();
await pause();
const after = shown().length;
let image;
Plotly.downloadImage = async (figure, options) => (image = await Plotly.toImage(figure, options));
chart.querySelector("[data-format=svg]").click();
while (!image && !problems.length) await pause();
const found = {
  problems, before, after,
  image: decodeURIComponent(image ?? ""),
  drawn: figures.map((f) => f.querySelectorAll(".main-svg .trace, .main-svg .hm").length),
  wide: figures.map((f) => f.querySelector("svg.main-svg").getBoundingClientRect().right),
  width: innerWidth, scroll: document.documentElement.scrollWidth,
  columns: new Set(Object.entries(first._fullLayout)
    .filter(([name]) => /^xaxis/.test(name)).map(([, axis]) => axis.domain[0])).size,
};
document.body.innerHTML = `<pre id="found"></pre>`;
document.querySelector("#found").textContent = JSON.stringify(found);
</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("draws the page: no Chromium is installed")


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("page")
    findings = made_up.findings(
        races=[made_up.race("gd"), made_up.race("adam")],
        sweeps=[made_up.sweep(batch_sizes=(32, None))],
        simulations=tuple(model.simulate(("constant", "cdat-1.9"), steps=60)),
        verdicts=made_up.verdicts(),
        diverged={("greedy", 1)},
    )
    html = render(findings).replace("<head>", f"<head>{WATCH}", 1)
    start = html.rindex("</body>")
    (folder / "page.html").write_text(html[:start] + LOOK + html[start + 7 :], encoding="utf-8")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(("width", "columns"), [(1400, 2), (500, 1)])
def test_a_browser_draws_every_figure(
    browser: str, looked_at: Path, width: int, columns: int
) -> None:
    finished = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--hide-scrollbars", f"--window-size={width},2000"),
            f"--user-data-dir={looked_at / f'profile-{width}'}",
            *("--virtual-time-budget=60000", "--dump-dom", f"{(looked_at / 'page.html').as_uri()}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    match = re.search(r'<pre id="found">(.*?)</pre>', finished.stdout, re.DOTALL)
    assert match, finished.stderr[-2000:]
    found = json.loads(unescape(match[1]))
    assert found["problems"] == []
    assert len(found["drawn"]) == 2 + 1 + 1 + 4  # races, sweep, model, grids
    assert all(found["drawn"])
    assert found["columns"] == columns
    assert found["scroll"] <= found["width"], "the page scrolls sideways"
    assert max(found["wide"]) <= found["width"]
    assert found["before"] > 0
    assert found["after"] == 0
    assert found["image"].startswith("data:image/svg+xml")
    for label in ("quadratically greedy", "edge of stability, 2"):
        assert label in found["image"]  # the image has its own legend
    assert "constant rate" not in found["image"]  # it was hidden
