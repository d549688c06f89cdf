"""Print the notes of one version: ``python .github/scripts/release_notes.py 0.1.0``.

They are the section ``## 0.1.0, 2026-11-24`` of ``CHANGELOG.md``. It is an error if the section is
missing or empty, or has no date.
"""

import re
import sys
from pathlib import Path


def notes(changelog: str, version: str) -> str:
    """Return the section of ``version`` without its heading."""
    heading = re.compile(rf"^## {re.escape(version)}, \d{{4}}-\d\d-\d\d$", re.MULTILINE)
    found = heading.search(changelog)
    if found is None:
        msg = f'CHANGELOG.md has no heading "## {version}, YYYY-MM-DD"'
        raise SystemExit(msg)
    section = re.split(r"^## ", changelog[found.end() :], maxsplit=1, flags=re.MULTILINE)[0].strip()
    if not section:
        msg = f"the section of {version} in CHANGELOG.md is empty"
        raise SystemExit(msg)
    return section


if __name__ == "__main__":
    sys.stdout.write(notes(Path("CHANGELOG.md").read_text(encoding="utf-8"), sys.argv[1]) + "\n")
