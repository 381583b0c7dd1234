"""``rlnas compress``: what a compression ended with, for a terminal or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console


def show_compression(summary: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Before and after, what stays of each layer, and what should be known about both."""
    from ..compression.report import allocation_table, result_table

    if as_json:
        print(json.dumps(summary | {"folder": str(folder)}, indent=2))
        return
    console = Console(emoji=False)
    console.print(allocation_table(summary))
    console.print(result_table(summary))

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    line(
        f"{summary['method']}: {100 * summary['density']:.4g} % of the weights, "
        f"{summary['after']['bits'] / summary['before']['bits']:.4g} of the bits, "
        f"{summary['speedup']:.2f} times as fast at batch {summary['latency_batch']}"
    )
    skipped: dict[str, list[str]] = {}
    for entry in summary["skipped"]:
        skipped.setdefault(entry["reason"], []).append(entry["name"])
    for reason, names in skipped.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        line(f"left alone: {', '.join(names[:3])}{more} {reason}")
    for caveat in summary["caveats"]:
        line(f"caveat: {caveat}")
    line(f"Everything is in {folder}")
