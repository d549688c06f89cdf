"""Run the Python examples of Markdown files.

``python docs/run_snippets.py README.md docs/*.md`` runs every block fenced as ``python``, in order,
with warnings as errors. Each file has its own process and namespace. The output is ``file:line ok``
for each block, or a traceback with the line numbers of the Markdown file and exit status 1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^`]*)")


def python_blocks(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line number of each opening fence, and its code."""
    opened: re.Match[str] | None = None
    first, lines = 0, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        found = FENCE.fullmatch(line.rstrip())
        if opened is None:
            if found:
                opened, first, lines = found, number, []
        elif found and found["fence"].startswith(opened["fence"]) and not found["info"].strip():
            if opened["info"].strip() == "python":
                yield first, textwrap.dedent("\n".join(lines))
            opened = None
        else:
            lines.append(line)
    if opened is not None:
        msg = f"{path}:{first}: the fence is never closed"
        raise SystemExit(msg)


def run(path: Path) -> bool:
    """Run the blocks of one file until one fails; return whether all passed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in python_blocks(path):
        try:
            # The leading empty lines give a traceback the line numbers of the file.
            exec(compile("\n" * line + code, str(path), "exec"), namespace)
        except (Exception, SystemExit) as error:
            own = error.__traceback__.tb_next if error.__traceback__ else None
            report = "".join(traceback.format_exception(type(error), error, own))
            print(f"{path}:{line} FAILED\n{report}", file=sys.stderr)  # noqa: T201
            return False
        print(f"{path}:{line} ok", flush=True)  # noqa: T201
    return True


def main(arguments: list[str]) -> int:
    """Run all files and return the exit status."""
    if not arguments:
        print("usage: python docs/run_snippets.py FILE.md ...", file=sys.stderr)  # noqa: T201
        return 2
    if len(arguments) == 1:
        warnings.simplefilter("error")
        return 0 if run(Path(arguments[0])) else 1
    # One process for each, because a page may configure a framework before it is imported.
    commands = [[sys.executable, __file__, argument] for argument in arguments]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return 1 if any(list(pool.map(_run_page, commands))) else 0


def _run_page(command: list[str]) -> int:
    """Run one page and print its output in one piece."""
    page = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    sys.stdout.buffer.write(page.stdout)
    sys.stdout.flush()
    return page.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
