"""Who may import whom: the floors of the house, and nothing above one's own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rlnas_fast

PACKAGE = Path(rlnas_fast.__file__).parent
EVERYTHING = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
RUNS = ("runs", "placement_folder", "placement_runs", "compression_sources", "compression_runs")
MAY_IMPORT = {
    "errors": set(),
    "_version": set(),
    "search": set(),
    "ops": set(),
    "rl": set(),
    "tasks": {"search"},
    "envs": {"search"},
    "nn": {"ops"},
    "report": {"search"},
    "storage": {"search"},
    "executors": {"search"},
    "hardware": {"search"},
    "strategies": {"search", "rl", "envs"},
    "training": {"search", "tasks"},
    "spaces": {"search", "nn"},
    "evaluators": {"search", "training"},
    "networks": {"nn", "search"},
    "compression": {"networks", "nn", "ops", "rl", "training", "hardware", "search"},
    "placement": {"nn", "ops", "rl", "training", "hardware", "search"},
    "components": {"networks", "search"},
    "config": {"components"},
    "costs": EVERYTHING - {"cli", "comparison", "environments", "experiments", *RUNS},
    "compose": EVERYTHING - {"cli", "comparison", "environments", "experiments", *RUNS},
    "environments": {"components", "compose", "config", "envs", "search"},
    "comparison": EVERYTHING - {"cli", "experiments", "environments", *RUNS},
    "runs": EVERYTHING - {"cli", "experiments", *RUNS} | {"runs"},
    "placement_folder": {"placement", "search", "storage"},
    "placement_runs": EVERYTHING - {"cli", "experiments", *RUNS} | {"placement_folder"},
    "compression_sources": EVERYTHING - {"cli", "experiments", *RUNS} | {"runs"},
    "compression_runs": EVERYTHING - {"cli", "experiments", *RUNS} | {"runs", "compression_sources"},
    "experiments": EVERYTHING - {"cli"},
    "__init__": {"runs", "placement_runs", "compression_runs", "hardware", "_version"},
    "cli": EVERYTHING,
}


def imported_folders(file: Path) -> set[str]:
    """The parts of our package that a file imports, wherever in the file it does."""
    parts = file.relative_to(PACKAGE).parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["rlnas_fast", *parts[:-1]]
            origin = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*origin, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("rlnas_fast.") and name.count(".")}
    return {name for name in found if name in EVERYTHING}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_from_floors_below(file: Path) -> None:
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = MAY_IMPORT[own] | {own, "errors", "_version", "_cpu", "_cuda", "_torch"}
    assert imported_folders(file) <= allowed


def test_search_never_imports_torch() -> None:
    code = "import sys, rlnas_fast.search; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
