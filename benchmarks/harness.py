"""What every benchmark shares: interleaved timing, and ``--check`` tables of wanted against measured.

A benchmark defines ``measure(quick) -> list[Row]``, or several by name, and ends with ``main(__doc__,
measure)``.  Each row is the median over several fresh processes, because one process can be lucky with its
memory layout.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

__all__ = ["Row", "geometric_mean", "interleaved", "main", "ratio"]

Measure = Callable[[bool], "Iterable[Row]"]
FAR = 3.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: what was measured, on which shape and dtype.
        measured: the figure.
        must: bound that decides the exit code; None for a figure that is only reported.
        aim: what would be good.
        unit: ``x`` for ratios (peer / ours), otherwise ``ms``, ``%``, ...
        at_most: True where smaller is better.
        detail: anything that explains the figure, such as the milliseconds of every peer.
    """

    name: str
    measured: float
    must: float | None = None
    aim: float | None = None
    unit: str = "x"
    at_most: bool = False
    detail: str = ""

    def holds(self) -> bool:
        """Says whether the bound is met; NaN never is."""
        if self.must is None:
            return True
        return bool(self.measured <= self.must if self.at_most else self.measured >= self.must)


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 21,
    warmup: int = 3,
    seconds: float | None = None,
    ours: str | None = None,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Times functions in turn, so that drift of the clock hits all of them.

    Args:
        functions: name to callable; round r of every function runs before round r + 1 of any.
        repeats: most rounds.
        warmup: rounds that are not counted.
        seconds: stops early, after at least 5 rounds, once this much time has passed; the warm-up too, after
            one round.
        ours: stops after 3 rounds, or one that comes late, if in each every other function took over ``FAR``
            times as long as this one, for more of them would decide nothing.  A warm-up in which they did,
            and which comes late, counts.
        synchronize: called before each clock reading, such as ``torch.cuda.synchronize``.

    Returns:
        Seconds of each round by name.
    """
    wait = synchronize or (lambda: None)
    start = time.perf_counter()

    def one_round() -> dict[str, float]:
        times = {}
        for name, function in functions.items():
            wait()
            begin = time.perf_counter()
            function()
            wait()
            times[name] = time.perf_counter() - begin
        return times

    def late() -> bool:
        return seconds is not None and time.perf_counter() - start > seconds

    def decided() -> bool:
        return ours is not None and all(
            other > FAR * times[ours] for times in rounds for name, other in times.items() if name != ours
        )

    rounds: list[dict[str, float]] = []
    for _ in range(warmup):
        rounds.append(one_round())
        if late():
            break
    if not (rounds and late() and decided()):
        rounds.clear()
        while len(rounds) < repeats:
            rounds.append(one_round())
            if (len(rounds) >= 3 and decided()) or (late() and (len(rounds) >= 5 or decided())):
                break
    return {name: [times[name] for times in rounds] for name in functions}


def ratio(times: Mapping[str, list[float]], ours: str, peers: list[str] | None = None) -> tuple[float, str]:
    """Returns how many times faster we are than the fastest peer, and the medians as text.

    The fastest peer has the least median; the figure is the median of the ratios within each round.
    """
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    rivals = peers if peers is not None else [name for name in times if name != ours]
    fastest = min(rivals, key=medians.__getitem__)
    figure = statistics.median(p / o for p, o in zip(times[fastest], times[ours], strict=True))
    ordered = sorted(medians.items(), key=lambda item: item[1])
    return figure, ", ".join(f"{name} {seconds * 1e3:.3g}" for name, seconds in ordered) + " ms"


def geometric_mean(figures: list[float]) -> float:
    """Returns the mean that ratios have."""
    return math.exp(statistics.fmean(math.log(figure) for figure in figures))


def main(
    title: str,
    measure: Measure | Mapping[str, Measure],
    *,
    processes: int = 3,
    once: Measure | None = None,
    condense: Callable[[list[Row]], list[Row]] | None = None,
) -> None:
    """Runs the command line of a benchmark and exits: 1 when ``--check`` finds a must that does not hold.

    Args:
        title: printed above the table.
        measure: rows that are the median over several fresh processes; as a mapping, by the name of the part
            that ``--part`` can select.
        processes: how many.
        once: rows that need no repetition, such as counts, or that take minutes each.
        condense: makes fewer rows of the medians of a part.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--check", action="store_true", help="exit 1 if a must does not hold")
    parser.add_argument("--quick", action="store_true", help="under 2 minutes: fewer repeats, one process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parts = measure if isinstance(measure, Mapping) else {"all": measure}
    if len(parts) > 1:
        parser.add_argument("--part", action="append", choices=list(parts), help="only these rows")
    options = parser.parse_args()
    chosen = getattr(options, "part", None) or list(parts)
    if options.worker:
        print(json.dumps([dataclasses.asdict(row) for part in chosen for row in parts[part](options.quick)]))
        sys.exit(0)
    rows: list[Row] = []
    for part in chosen:  # shown and kept one by one, so that an interruption loses only the rest
        selected = ["--part", part] if len(parts) > 1 else []
        ready = _median_rows(selected, options.quick, 1 if options.quick else processes)
        ready = condense(ready) if condense else ready
        if once and part == chosen[-1]:
            ready += once(options.quick)
        _show("" if rows else title, ready)
        rows += ready
        if options.json:
            _keep(options.json, rows)
    sys.exit(1 if options.check and not all(row.holds() for row in rows) else 0)


def _keep(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**_environment(), "rows": [dataclasses.asdict(row) | {"holds": row.holds()} for row in rows]}
    path.write_text(json.dumps(record, indent=1) + "\n")


def _median_rows(selected: list[str], quick: bool, processes: int) -> list[Row]:
    command = [sys.executable, sys.argv[0], "--worker", *selected, *(["--quick"] if quick else [])]
    runs = []
    for process in range(processes):
        part = selected[-1] if selected else "all rows"
        print(f"[{time.strftime('%H:%M:%S')}] {part}, process {process + 1} of {processes}", file=sys.stderr)
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        runs.append([Row(**row) for row in json.loads(output.splitlines()[-1])])
    return [
        dataclasses.replace(same[0], measured=statistics.median(row.measured for row in same))
        for same in zip(*runs, strict=True)
    ]


def _show(title: str, rows: list[Row]) -> None:
    if title:
        print((title.strip().splitlines() or [""])[0])
    width = max((len(row.name) for row in rows), default=4)
    print(f"{'case':<{width}}  {'must':>8}  {'aim':>8}  {'measured':>10}  holds")
    for row in rows:
        bound = "<=" if row.at_most else ">="
        must = f"{bound}{row.must:g}" if row.must is not None else "-"
        aim = f"{bound}{row.aim:g}" if row.aim is not None else "-"
        verdict = "-" if row.must is None else "yes" if row.holds() else "NO"
        figure = f"{row.measured:.4g} {row.unit}"
        print(
            f"{row.name:<{width}}  {must:>8}  {aim:>8}  {figure:>10}  {verdict:<5}  {row.detail}".rstrip(),
            flush=True,
        )


def _environment() -> dict[str, object]:
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit.strip() or None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
