"""Lists what exists, from the one list in ``compose``."""

from __future__ import annotations

import inspect
import json

from rich.console import Console
from rich.table import Table

from ..compose import COMPONENTS, find, options_of


def list_components(kind: str, as_json: bool) -> None:
    """Prints every component of a kind with the first line of its docstring and its options."""
    rows: list[tuple[str, str, dict[str, str]]] = []
    for name in COMPONENTS[kind]:
        factory = find(kind, name)
        options = {p.name: _option(p) for p in options_of(factory).values() if p.name not in FIXED}
        rows.append((name, (inspect.getdoc(factory) or "").split("\n")[0], options))
    if as_json:
        print(json.dumps([{"name": n, "what": w, "options": o} for n, w, o in rows], indent=2))
        return
    table = Table("name", "what", f"options (--set {kind}.NAME=VALUE)")
    for name, what, options in rows:
        table.add_row(name, what, "\n".join(options.values()))
    Console().print(table)


FIXED = ("seed", "device", "meter", "threads")


def _option(parameter: inspect.Parameter) -> str:
    kind = str(parameter.annotation).replace("rlnas_fast.", "")
    default = "" if parameter.default is parameter.empty else f" = {parameter.default}"
    return f"{parameter.name}: {kind}{default}"
