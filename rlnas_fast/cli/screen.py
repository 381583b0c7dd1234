"""Progress on a terminal; nothing at all where stderr is not one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Eta

from ..search import Measurement, Trial


class Interrupted(Exception):
    """Ctrl-C, once there is a run to go on with; its text is the run folder."""


class Screen:
    """Draws how far a run is, when it will be done, the best so far, and how many failed."""

    def __init__(self, quiet: bool) -> None:
        """``quiet`` draws nothing even on a terminal."""
        self.console = Console(stderr=True, emoji=False, markup=False)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("eta"), Eta(), TextColumn("{task.fields[best]}"),
            console=self.console, disable=quiet or not self.console.is_terminal, transient=True,
        )  # fmt: skip
        self.search: TaskID | None = None
        self.confirm: TaskID | None = None
        self.pieces: TaskID | None = None
        self.stages: dict[str, TaskID] = {}
        self.folder: Path | None = None
        self.best: Trial | None = None
        self.failed = 0

    def __enter__(self) -> Screen:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        if isinstance(error, KeyboardInterrupt) and self.folder is not None:
            raise Interrupted(self.folder) from error

    def note(self, text: str) -> None:
        """Says what a user should know, on a terminal or not."""
        self.console.print(f"note: {text}", highlight=False, soft_wrap=True)

    def started(self, folder: Path, done: Sequence[Trial], total: int) -> None:
        self.began(folder)
        self.search = self.bar.add_task("child networks", total=total, completed=len(done), best="")
        self.told(done)

    def measured(self, position: int, measurement: Measurement, seconds: float) -> None:
        if self.search is not None:
            self.bar.advance(self.search)

    def told(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            self.failed += trial.state == "failed"
            if trial.state == "complete" and (self.best is None or trial.reward > self.best.reward):
                self.best = trial
        if self.search is not None:
            self.bar.update(self.search, best=self._so_far())

    def confirmed(self, done: int, total: int) -> None:
        if self.confirm is None:
            self.confirm = self.bar.add_task("training the best again", total=total, best="")
        self.bar.update(self.confirm, completed=done)

    def piece(self, done: int, total: int) -> None:
        if self.pieces is None:
            self.pieces = self.bar.add_task("pieces", total=total, best="")
        self.bar.update(self.pieces, completed=done)

    def began(self, folder: Path) -> None:
        self.folder = folder
        if not self.bar.disable:
            self.console.print(f"run folder {folder}", highlight=False)

    def trained(self, folder: Path, done: int, total: int, text: str) -> None:
        if self.pieces is None:
            self.began(folder)
            self.pieces = self.bar.add_task("training passes", total=total, best=text)
        self.bar.update(self.pieces, completed=done, best=text)

    def stage(self, what: str, done: int, total: int) -> None:
        if what not in self.stages:
            self.stages[what] = self.bar.add_task(what, total=total, best="")
        self.bar.update(self.stages[what], completed=done, total=total)

    def _so_far(self) -> str:
        parts = []
        if self.best is not None:
            m = self.best.measurement
            parts.append(f"best {self.best.reward:.4f}")
            if m.accuracy is not None:
                parts.append(f"{100 * m.accuracy:.2f} %")
            if m.cost.latency_s is not None:
                parts.append(f"{1e3 * m.cost.latency_s:.3f} ms")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts)
