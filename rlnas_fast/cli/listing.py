"""Lists what exists, from the one list in ``components``."""

from __future__ import annotations

import inspect
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from ..components import COMPONENTS, find

# What a search passes to its parts itself; everything else a factory takes is an option.
GIVEN = {
    "task_spec",
    "space",
    "task",
    "recipe",
    "device",
    "meter",
    "threads",
    "turn",
    "environment",
    "seed",
    "make",
}


def list_components(kind: str, as_json: bool) -> None:
    """Prints every component of a kind with the first line of its docstring and its options."""
    rows = [
        (name, _first_line(find(kind, name)), _options(find(kind, name), kind)) for name in COMPONENTS[kind]
    ]
    if as_json:
        print(json.dumps([{"name": n, "what": w, "options": o} for n, w, o in rows], indent=2))
        return
    table = Table("name", "what", f"options (--set {kind}.OPTION=VALUE)")
    for name, what, options in rows:
        table.add_row(name, what, "\n".join(options.values()))
    Console(emoji=False, markup=False).print(table)


def _first_line(factory: Any) -> str:
    return (inspect.getdoc(factory) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")


def _options(factory: Any, kind: str) -> dict[str, str]:
    given = GIVEN - {"seed"} if kind == "task" else GIVEN
    parameters = [p for p in inspect.signature(factory).parameters.values() if p.name not in given]
    return {p.name: _option(p) for p in parameters}


def _option(parameter: inspect.Parameter) -> str:
    kind = inspect.formatannotation(parameter.annotation).strip("'")
    return f"{parameter.name}: {kind}" + (
        "" if parameter.default is parameter.empty else f" = {parameter.default}"
    )
