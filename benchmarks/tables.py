"""Writes the tables of a Markdown file from figures of record: ``python benchmarks/tables.py README.md``.

A table stands between ``<!-- table: FILE -->`` and ``<!-- end -->``; FILE is a ``--json`` file of a
benchmark, relative to ``benchmarks/results``.  ``<!-- table: FILE | PATTERN -->`` takes the rows whose names
the pattern finds, with their details.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TABLE = re.compile(r"<!-- table: (\S+)(?: \| (.+?))? -->\n.*?<!-- end -->", re.DOTALL)


def table(match: re.Match[str]) -> str:
    """The block of one marker, written anew."""
    record = json.loads((RESULTS / match[1]).read_text())
    machine = record["gpu"] or f"{record['cores']} cores of {record['cpu']}"
    commit = (record["commit"] or "")[:7]
    lines = [
        match[0].splitlines()[0],
        f"{machine}, torch {record['torch']}, {record['date']}, commit {commit}:",
        "",
        f"| | must | measured | holds |{' |' if match[2] else ''}",
        f"|---|---|---|---|{'---|' if match[2] else ''}",
    ]
    for row in record["rows"]:
        if match[2] and not re.search(match[2], row["name"]):
            continue
        detail = f" {row['detail']} |" if match[2] else ""
        bound = "" if row["must"] is None else f"{'<=' if row['at_most'] else '>='} {row['must']:g}"
        verdict = "" if row["must"] is None else "yes" if row["holds"] else "**no**"
        lines.append(f"| {row['name']} | {bound} | {row['measured']:.4g} {row['unit']} | {verdict} |{detail}")
    return "\n".join([*lines, "<!-- end -->"])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(TABLE.sub(table, file.read_text()))
