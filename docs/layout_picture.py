"""Draw the layout of the packages from their imports: ``python docs/layout_picture.py``.

It writes ``docs/layout.svg``. With ``--check`` it writes nothing, and the exit status is 1 if the
committed picture is out of date. It needs grimp, which import-linter brings.

The four packages are boxes; ``cdat_torch`` is opened to show its folders and single modules. Rows
are the longest paths of imports, so that every arrow points down. An arrow that follows from others
is left out: if a imports b and b imports c, then a may import c.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import grimp

PACKAGES = ("cdat_lab", "cdat_jax", "cdat_torch", "cdat_core")
OPENED = "cdat_torch"
NESTED = ("cdat_torch.curvature.replay",)  # folders of folders with a box of their own
PICTURE = Path(__file__).with_name("layout.svg")

WIDTH, MARGIN, GAP = 900, 20, 24
ROOM_HEIGHT, ROW = 34, 70  # a box, and the distance between two rows
LETTER = 8.0  # width of a character in a box
INSIDE = 690  # width of the opened package

Edges = set[tuple[str, str]]


def room(module: str) -> str | None:
    """Return the box that a module is drawn in; None for the `__init__` that only exports."""
    for folder in NESTED:
        if module == folder or module.startswith(f"{folder}."):
            return folder
    parts = module.split(".")
    if parts[0] != OPENED:
        return parts[0]
    return ".".join(parts[:2]) if len(parts) > 1 else None


def read_imports() -> tuple[set[str], Edges, dict[str, list[str]]]:
    """Return the boxes, the imports between them, and the folders of each package."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    boxes = {found for module in graph.modules if (found := room(module))}
    edges = {
        (source, target)
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        if (source := room(module)) and (target := room(imported)) and source != target
    }
    folders = {
        package: sorted(
            child.removeprefix(f"{package}.")
            for child in graph.find_children(package)
            if graph.find_children(child)
        )
        for package in PACKAGES
    }
    return boxes, edges, folders


def reduced(edges: Edges) -> Edges:
    """Drop each edge that a longer path implies."""
    following: dict[str, set[str]] = {}
    for source, target in edges:
        following.setdefault(source, set()).add(target)

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = following.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    return {
        (source, target)
        for source, target in edges
        if not any(target in reachable(other) for other in following[source] - {target})
    }


def rows_of(boxes: set[str], edges: Edges) -> list[list[str]]:
    """Put each box in a row below all that import it, and boxes that import no other at the end."""
    level = dict.fromkeys(boxes, 0)
    for _ in range(len(boxes) + 1):
        late = [(a, b) for a, b in edges if level[b] <= level[a]]
        for source, target in late:
            level[target] = max(level[target], level[source] + 1)
        if not late:
            break
    else:
        circle = ", ".join(sorted({box for edge in late for box in edge}))
        msg = f"the imports go in a circle among {circle}"
        raise SystemExit(msg)
    lowest = max(level.values())
    rows: list[list[str]] = [[] for _ in range(lowest + 1)]
    for box in sorted(boxes):
        imports_another = any(source == box for source, _ in edges)
        rows[level[box] if imports_another else lowest].append(box)
    return rows


def routed(rows: list[list[str]], edges: Edges) -> list[list[str]]:
    """Bend edges over several rows: extend the rows, and return one path for each edge."""
    level = {box: index for index, row in enumerate(rows) for box in row}
    paths = []
    for source, target in sorted(edges):
        bends = [f"{source}>{target}:{row}" for row in range(level[source] + 1, level[target])]
        for row, bend in enumerate(bends, start=level[source] + 1):
            rows[row].append(bend)
        paths.append([source, *bends, target])
    return paths


def untangle(rows: list[list[str]], paths: list[list[str]]) -> None:
    """Order each row so that few pieces of the paths cross, and so that they are short."""
    pieces = [piece for path in paths for piece in itertools.pairwise(path)]

    def cost(index: int, order: tuple[str, ...]) -> tuple[int, float]:
        around = [*rows[max(index - 1, 0) : index], order, *rows[index + 1 : index + 2]]
        # Measured from the middle of a row, because rows are centred.
        place = {box: k - (len(row) - 1) / 2 for row in around for k, box in enumerate(row)}
        lines = [(a, b) for a, b in pieces if a in place and b in place]
        crossings = sum(
            (place[a] - place[c]) * (place[b] - place[d]) < 0
            for (a, b), (c, d) in itertools.combinations(lines, 2)
            if (a in order) == (c in order)
        )
        return crossings, sum(abs(place[a] - place[b]) for a, b in lines)

    for _ in range(4):
        for index, row in enumerate(rows):
            orders = itertools.permutations(row)
            rows[index] = list(min(orders, key=lambda order: cost(index, order)))


def label(name: str) -> str:
    """Return what is written in a box: the path inside the opened package."""
    return name.removeprefix(f"{OPENED}.").replace(".", "/")


def box_width(name: str) -> float:
    """Return the width of a box, or the room that a bend takes."""
    return 18.0 if ">" in name else LETTER * len(label(name)) + 30


def rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    """Return one rectangle; its style is a class of the style sheet."""
    return (
        f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'
    )


def text(x: float, y: float, words: str, style: str = "name") -> str:
    """Return a line of text centred at x."""
    return f'<text class="{style}" x="{x:g}" y="{y:g}">{words}</text>'


def arrow(points: list[tuple[float, float]]) -> str:
    """Return a smooth curve downwards through the points, with a head at its end."""
    (x, y), *rest = points
    curve = f"M{x:g} {y:g}"
    for right, down in rest:
        middle = (y + down) / 2
        curve += f" C{x:g} {middle:g} {right:g} {middle:g} {right:g} {down:g}"
        x, y = right, down
    return f'<path class="arrow" d="{curve}" marker-end="url(#head)"/>'


def draw_opened(boxes: set[str], edges: Edges, left: float, top: float) -> tuple[list[str], float]:
    """Draw the rooms of the opened package; return the pieces and the height they take."""
    rows = rows_of(boxes, edges)
    paths = routed(rows, edges)
    untangle(rows, paths)
    across, down = {}, {}
    for index, row in enumerate(rows):
        boxes_width = sum(map(box_width, row))
        gap = min(GAP, (INSIDE - 2 * MARGIN - boxes_width) / max(len(row) - 1, 1))
        x = left + (INSIDE - boxes_width - gap * (len(row) - 1)) / 2
        for box in row:
            across[box], down[box] = round(x + box_width(box) / 2), top + index * ROW
            x += box_width(box) + gap
    drawn = []
    for path in paths:
        ends = {path[0]: ROOM_HEIGHT, path[-1]: -7}
        drawn.append(arrow([(across[p], down[p] + ends.get(p, ROOM_HEIGHT / 2)) for p in path]))
    for box in (box for row in rows for box in row if ">" not in box):
        width = box_width(box)
        drawn.append(rectangle(across[box] - width / 2, down[box], width, ROOM_HEIGHT, "room"))
        drawn.append(text(across[box], down[box] + 22, label(box)))
    return drawn, (len(rows) - 1) * ROW + ROOM_HEIGHT


def picture() -> str:
    """Return the picture as SVG."""
    boxes, edges, folders = read_imports()
    outer = {(a.split(".")[0], b.split(".")[0]) for a, b in edges}
    outer = reduced({(a, b) for a, b in outer if a != b})
    expected = {(a, b) for a, b in outer if a == "cdat_lab" or b == "cdat_core"}
    if outer != expected:
        msg = f"the packages import each other in a way that is not drawn: {sorted(outer)}"
        raise SystemExit(msg)

    inside = {box for box in boxes if box.startswith(f"{OPENED}.")}
    right, top, high = WIDTH - MARGIN - INSIDE, 126, 56
    drawn, height = draw_opened(
        inside, reduced({(a, b) for a, b in edges if {a, b} <= inside}), right, top + 48
    )
    height += 48 + 18
    bottom = top + height + 50
    narrow = right - 2 * MARGIN
    jax, torch = MARGIN + narrow / 2, right + INSIDE / 2
    middle = top + height / 2

    def package(name: str, x: float, y: float, width: float, tall: float, at: float) -> list[str]:
        named = [rectangle(x, y, width, tall, "package"), text(x + width / 2, at, name, "title")]
        if folders[name] and name != OPENED:
            named.append(
                text(x + width / 2, at + 19, "folders: " + ", ".join(folders[name]), "small")
            )
        return named

    pieces = [
        *package("cdat_lab", MARGIN, MARGIN, WIDTH - 2 * MARGIN, high, MARGIN + 24),
        *package("cdat_jax", MARGIN, middle - high / 2, narrow, high, middle + 5),
        *package(OPENED, right, top, INSIDE, height, top + 27),
        *package("cdat_core", MARGIN, bottom, WIDTH - 2 * MARGIN, high, bottom + 24),
        arrow([(jax, MARGIN + high), (jax, middle - high / 2 - 7)]),
        arrow([(torch, MARGIN + high), (torch, top - 7)]),
        arrow([(jax, middle + high / 2), (jax, bottom - 7)]),
        arrow([(torch, top + height), (torch, bottom - 7)]),
        *drawn,
    ]
    total = bottom + high + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total:g}" '
            f'width="{WIDTH}" height="{total:g}" role="img">',
            "<title>The packages of cdat, and cdat_torch inside; arrows are imports</title>",
            "<style>",
            "text { font-family: Helvetica, Arial, sans-serif; text-anchor: middle; }",
            "text { fill: #1d2733; }",
            ".title { font-size: 17px; font-weight: bold; }",
            ".name { font-size: 15px; }",
            ".small { font-size: 13px; fill: #51606f; }",
            ".package { fill: #eef3f8; stroke: #8aa0b5; }",
            ".room { fill: #ffffff; stroke: #3d6a94; }",
            ".arrow { fill: none; stroke: #51606f; stroke-width: 1.5; }",
            "</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#51606f"/>'
            "</marker></defs>",
            f'<rect width="{WIDTH}" height="{total:g}" fill="#ffffff"/>',
            *pieces,
            "</svg>",
            "",
        ]
    )


def main(arguments: list[str]) -> int:
    """Write the picture, or check that it is up to date; return the exit status."""
    drawn = picture()
    if arguments != ["--check"]:
        PICTURE.write_text(drawn, encoding="utf-8")
        return 0
    if PICTURE.exists() and PICTURE.read_text(encoding="utf-8") == drawn:
        return 0
    sys.stderr.write(f"{PICTURE} is out of date; run: python docs/layout_picture.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
