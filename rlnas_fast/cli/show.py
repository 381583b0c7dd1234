"""What a run found, for a terminal or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from ..components import make
from ..errors import RunError
from ..report.front import front_of, front_table
from ..runs import RunResult, saved_config
from ..search import SearchSpace
from ..storage.sqlite_log import SqliteLog


def print_result(result: RunResult) -> None:
    """Prints the front, the chosen network and where everything is."""
    console = Console(emoji=False, markup=False)
    summary = result.summary
    config = saved_config(result.folder)
    console.print(
        front_table(
            result.trials,
            _space_of(config, result),
            result.best.number if result.best else None,
            config.objective_numbers,
        )
    )
    _print_counts(console, summary)
    _print_volume(console, summary.get("hypervolume"))
    if len(summary.get("picks", ())) > 1:
        _print_picks(console, summary["picks"])
    if result.best is None:
        near = ", ".join(f"{name} {value:g}" for name, value in summary["nearest_to_limits"].items())
        asked = ", ".join(f"{name} <= {value:g}" for name, value in summary["limits"].items())
        console.print(
            f"No network was found that keeps {asked}; the least seen: {near or 'none'}."
            if asked else "No child network could be trained: see `rlnas show` for the reasons.",
            highlight=False,
        )  # fmt: skip
    else:
        console.print(f"Chosen: trial {result.best.number}, {summary['chosen']['network']}", highlight=False)
        again = summary["confirmed_accuracy"].get(str(result.best.number))
        if again:
            figures = ", ".join("failed" if value is None else f"{100 * value:.2f} %" for value in again)
            console.print(f"Trained again with other seeds: validation accuracy {figures}", highlight=False)
        if result.test_accuracy is not None:
            console.print(f"Test accuracy: {100 * result.test_accuracy:.2f} % (read once)", highlight=False)
        if summary["score"] is not None:
            console.print(
                f"Score in the table: {100 * summary['score']:.2f} % (the search never saw it)",
                highlight=False,
            )
    console.print(f"Everything is in {result.folder}", highlight=False, soft_wrap=True)


def show_run(folder: Path, as_json: bool) -> None:
    """Shows a run, finished or not, without touching it."""
    config = saved_config(folder)
    with SqliteLog.open_readonly(folder / "trials.sqlite") as log:
        trials = tuple(log.read())
    summary = _summary_of(folder)
    if summary is not None and _is_of_all(summary, len(trials), config.trials):
        number = (summary["chosen"] or {}).get("trial")
        best = next((trial for trial in trials if trial.number == number), None)
        result = RunResult(folder, trials, front_of(trials), best, summary["test_accuracy"], summary)
        print(json.dumps(summary | {"folder": str(folder)}, indent=2)) if as_json else print_result(result)
        return
    state = {"folder": str(folder), "stopped": None, "trials": len(trials), "wanted": config.trials}
    if as_json:
        print(json.dumps(state, indent=2))
        return
    console = Console(emoji=False, markup=False)
    result = RunResult(folder, trials, front_of(trials), None, None, {})
    console.print(front_table(trials, _space_of(config, result), objectives=config.objective_numbers))
    console.print(
        f"{len(trials)} of {config.trials} trials; not finished: go on with `rlnas resume {folder}`",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for trial in trials:
        if trial.measurement.failure is not None:
            console.print(f"trial {trial.number} failed: {trial.measurement.failure}", highlight=False)


def show_saved(folder: Path, as_json: bool, shown: Callable[[dict[str, Any], Path, bool], None]) -> None:
    """Shows what a placement or a compression wrote when it ended; one that goes on has nothing to show."""
    summary = _summary_of(folder)
    if summary is not None:
        shown(summary, folder, as_json)
    elif as_json:
        print(json.dumps({"folder": str(folder), "stopped": None}, indent=2))
    else:
        Console(emoji=False, markup=False).print(
            f"not finished: go on with `rlnas resume {folder}`", highlight=False, soft_wrap=True
        )


def _summary_of(folder: Path) -> dict[str, Any] | None:
    """What the run wrote when it ended, or None if it has not."""
    file = folder / "summary.json"
    if not file.is_file():
        return None
    try:
        summary: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise RunError(
            f"{file} cannot be read ({error}): write it anew with `rlnas resume {folder}`"
        ) from error
    return summary


def _is_of_all(summary: dict[str, Any], logged: int, wanted: int) -> bool:
    """False where the run has gone on, or is to go on, since it was summarised."""
    complete = summary["stopped"] != "trials" or summary["trials"] >= wanted
    return bool(summary["trials"] == logged and complete)


def _print_counts(console: Console, summary: dict[str, Any]) -> None:
    parts = [
        f"{summary['trials']} trials",
        f"{summary['failed']} failed",
        f"{summary['from_cache']} from the cache",
    ]
    console.print(
        f"{', '.join(parts)}; {summary['evaluation_seconds']:.1f} s of evaluations", highlight=False
    )
    caveats = sorted({caveat for row in summary["pareto"] for caveat in row["caveats"]})
    for caveat in caveats:
        console.print(f"Caveat: {caveat}", highlight=False)
    if summary["stopped"] == "space":
        console.print("Ended early: the strategy has nothing left to propose.", highlight=False)
    if summary["stopped"] == "seconds":
        console.print("Ended early: --max-seconds is used up.", highlight=False)


def _print_volume(console: Console, volumes: dict[str, float] | None) -> None:
    if volumes:
        figures = ", ".join(f"{count}: {volume:.3f}" for count, volume in volumes.items())
        console.print(
            f"Hypervolume by trials (share of the box from the worst to the best seen): {figures}",
            highlight=False,
        )
        console.print("Chosen is what is nearest to the best corner of that box.", highlight=False)


def _print_picks(console: Console, picks: list[dict[str, Any]]) -> None:
    for pick in picks:
        asked = ", ".join(f"{name} <= {value:g}" for name, value in pick["limits"].items())
        network = pick["network"]
        if network is None:
            near = ", ".join(f"{name} {value:g}" for name, value in pick["nearest"].items())
            console.print(f"{asked}: none was found; the least seen: {near or 'none'}", highlight=False)
            continue
        latency = "" if network["latency_s"] is None else f", {1e3 * network['latency_s']:.4g} ms"
        console.print(
            f"{asked}: trial {network['trial']}, {network['network']}, accuracy "
            f"{100 * network['accuracy']:.2f} %{latency} ({pick['file']})",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _space_of(config: Any, result: RunResult) -> SearchSpace:
    """The run's space for describing networks; a user's own object is gone, so its choices must do."""
    from ..errors import ConfigError

    try:
        task = make("task", config.task)
        space: SearchSpace = make("space", config.space, task.spec)
        return space
    except ConfigError:
        return _Choices()  # type: ignore[return-value]


class _Choices:
    """Describes an architecture by its choices alone."""

    def describe(self, architecture: Any) -> str:
        return " ".join(str(choice) for choice in architecture.choices)
