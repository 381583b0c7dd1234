"""Commands, and what a user sees when one fails: one line on stderr and an exit code, no traceback.

Exit codes: 0 done, 2 bad input or a machine that cannot do it, 130 interrupted (the run resumes).
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import __version__
from ..errors import ConfigError, RlnasError
from .experiment import experiment
from .place import place
from .screen import Interrupted, Screen

app = typer.Typer(
    name="rlnas",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Searches for the neural network that is best on your own hardware.",
)

INTERRUPTED = 130
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # click's own, or the click that typer carries

RunFolder = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, e.g. strategy.learning_rate=0.01."),
]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == INTERRUPTED:  # typer's word for a Ctrl-C that came before there was a run
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except RlnasError as error:
        return _fail(str(error))
    except USAGE_ERROR as error:
        return _fail(error.format_message())  # type: ignore[attr-defined]
    except Interrupted as error:
        return _fail(f"interrupted; go on with: rlnas resume {error}", code=INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted before anything was started", code=INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}: free some space, or choose a writable --out")


@app.command()
def search(
    space: Annotated[str | None, typer.Option(help="What to search; see `rlnas spaces`.")] = None,
    task: Annotated[str | None, typer.Option(help="What to learn; see `rlnas tasks`.")] = None,
    strategy: Annotated[str | None, typer.Option(help="Who proposes; see `rlnas strategies`.")] = None,
    exploration: Annotated[str | None, typer.Option(help="Around it; see `rlnas explorations`.")] = None,
    reward: Annotated[str | None, typer.Option(help="What counts; see `rlnas rewards`.")] = None,
    evaluator: Annotated[str | None, typer.Option(help="Who measures; see `rlnas evaluators`.")] = None,
    data: Annotated[Path | None, typer.Option(help="The file of a task or table that reads one.")] = None,
    reward_column: Annotated[str | None, typer.Option(help="Of a table: what the search sees.")] = None,
    score_column: Annotated[str | None, typer.Option(help="Of a table: what its pick is scored by.")] = None,
    latency_column: Annotated[str | None, typer.Option(help="Of a table, e.g. latency_ms:1080ti_1.")] = None,
    classes: Annotated[str | None, typer.Option(help="Only these classes, e.g. 0,1,2.")] = None,
    trials: Annotated[int | None, typer.Option(help="How many child networks.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="How many are asked for at a time.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Training of a child.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, ... or auto.")] = None,
    devices: Annotated[str | None, typer.Option(help="One worker on each, e.g. cuda:0,cuda:1.")] = None,
    workers: Annotated[int | None, typer.Option(help="Children trained side by side.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each child.")] = None,
    target_latency_ms: Annotated[float | None, typer.Option(help="Latency the reward aims at.")] = None,
    targets: Annotated[str | None, typer.Option(help="Several target latencies, in ms: 1,2,4.")] = None,
    objectives: Annotated[
        str | None, typer.Option(help="Keep a whole front of these, e.g. accuracy,latency,energy.")
    ] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Hard limit.")] = None,
    max_energy_mj: Annotated[float | None, typer.Option(help="Hard limit, of one pass, above idle.")] = None,
    max_params: Annotated[float | None, typer.Option(help="Hard limit.")] = None,
    max_flops: Annotated[float | None, typer.Option(help="Hard limit, of one sample's forward pass.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Start no child after this long.")] = None,
    durability: Annotated[
        str | None, typer.Option(help="Survive a `crash`, or power loss too: `full`.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Measurements to share among runs.")] = None,
    cost_model: Annotated[Path | None, typer.Option(help="A table from `rlnas profile`.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file; flags and --set override it.")] = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The run folder (default: a new one in runs/).")] = None,
    as_json: AsJson = False,
) -> None:
    """Search; a later source wins: defaults, --config, flags, --set."""
    given: dict[str, Any] = {
        "space": space, "task": task, "strategy": strategy, "exploration": exploration, "reward": reward,
        "evaluator": evaluator,
        "trials": trials, "batch_size": batch_size, "epochs": epochs, "seed": seed, "device": device,
        "devices": devices.split(",") if devices else None, "workers": workers, "threads": threads,
        "evaluator.reward_column": reward_column, "evaluator.score_column": score_column,
        "evaluator.latency_column": latency_column,
        "target_latency_ms": target_latency_ms, "targets": _numbers("--targets", targets),
        "objectives": objectives.split(",") if objectives is not None else None,
        "max_latency_ms": max_latency_ms, "max_params": max_params,
        "max_energy_mj": max_energy_mj, "cost_model": str(cost_model) if cost_model else None,
        "max_flops": max_flops, "max_seconds": max_seconds, "durability": durability,
        "cache": str(cache) if cache else None,
        "task.classes": _integers("--classes", classes),
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None} | _settings(settings)
    from ..config import read_config
    from ..runs import start

    if data is not None:
        tabular = read_config(given, config).evaluator.name == "tabular"
        given = {"evaluator.data" if tabular else "task.path": str(data)} | given

    with Screen(quiet=as_json) as screen:
        result = start(read_config(given, config), out=out, progress=screen)
    _report(result, as_json)


@app.command()
def compress(
    model: Annotated[
        str,
        typer.Option(help="lenet-300-100, small-cnn, a file of weights, a run folder or module:attribute."),
    ],
    data: Annotated[str, typer.Option(help="A task (see `rlnas tasks`) or a .npz file.")] = "digits",
    density: Annotated[float | None, typer.Option(help="Share of the weights to keep.")] = None,
    method: Annotated[str | None, typer.Option(help="A published rule, or a search; see the docs.")] = None,
    procedure: Annotated[str | None, typer.Option(help="search, or layerwise.")] = None,
    groups: Annotated[str | None, typer.Option(help="weights, rows, tiles, tiles:16x16 or 2:4.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Let weights be int8.")] = False,
    gather: Annotated[bool, typer.Option("--gather", help="Gather what matters into few tiles.")] = False,
    max_latency_ms: Annotated[float | None, typer.Option(help="Keep less where it is slower.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Of a search.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Fine-tuning at the end.")] = None,
    base_epochs: Annotated[int | None, typer.Option(help="Training of a network without weights.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ... or auto.")] = "auto",
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The folder (default: a new one in runs/).")] = None,
    as_json: AsJson = False,
) -> None:
    """Compress a trained network: which weights to keep, prune or quantise.

    The same command with the same --out goes on where it was stopped.
    """
    given: dict[str, Any] = {
        "density": density, "method": method, "procedure": procedure, "groups": groups,
        "int8": int8 or None, "gather": gather or None, "max_latency_ms": max_latency_ms,
        "evaluations": evaluations, "epochs": epochs, "base_epochs": base_epochs, "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None} | _settings(settings)
    from ..compression_runs import compress as start
    from .compress import show_compression

    with Screen(quiet=as_json) as screen:
        result = start(model, data, out=out, device=device, progress=screen, **given)
    show_compression(result.summary, result.folder, as_json)


@app.command()
def resume(
    folder: RunFolder,
    trials: Annotated[int | None, typer.Option(help="More trials than the run was started with.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Start no child after this long.")] = None,
    continue_from_log: Annotated[
        bool,
        typer.Option(help="Do not require that the strategy repeats itself; only tell it the old trials."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Go on where a run was stopped."""
    from ..compression_runs import SETTINGS, resume_compression
    from ..placement_folder import CONFIG
    from ..placement_runs import resume_place

    placed, compressed = (folder / CONFIG).is_file(), (folder / SETTINGS).is_file()
    if (placed or compressed) and (trials is not None or max_seconds is not None or continue_from_log):
        kind = "placement run" if placed else "compression"
        raise ConfigError(f"{folder} is a {kind}: it goes on with the settings it was started with")
    if placed:
        from .place import show_placement

        with Screen(quiet=as_json) as screen:
            placement = resume_place(folder, screen)
        show_placement(placement.summary, placement.folder, as_json)
        return
    if compressed:
        from .compress import show_compression

        with Screen(quiet=as_json) as screen:
            compression = resume_compression(folder, progress=screen)
        show_compression(compression.summary, compression.folder, as_json)
        return
    from ..runs import resume as go_on

    settings = {"trials": trials, "max_seconds": max_seconds}
    settings = {name: value for name, value in settings.items() if value is not None}
    with Screen(quiet=as_json) as screen:
        result = go_on(folder, settings=settings, continue_from_log=continue_from_log, progress=screen)
    _report(result, as_json)
    if continue_from_log:
        _stderr().print("continued from the log: the old trials were told, not repeated", highlight=False)


@app.command()
def show(folder: RunFolder, as_json: AsJson = False) -> None:
    """Show what a run has found so far."""
    from ..compression_runs import SETTINGS
    from ..placement_folder import CONFIG
    from .show import show_run, show_saved

    if (folder / CONFIG).is_file():
        from .place import show_placement

        show_saved(folder, as_json, show_placement)
    elif (folder / SETTINGS).is_file():
        from .compress import show_compression

        show_saved(folder, as_json, show_compression)
    else:
        show_run(folder, as_json)


@app.command()
def measure(
    network: Annotated[
        str, typer.Argument(help="A run folder, a name (resnet20, ...) or your module:attribute.")
    ],
    shape: Annotated[str | None, typer.Option(help="Of one sample, e.g. 3,32,32.")] = None,
    batch: Annotated[int, typer.Option(help="Samples in one pass.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ... or auto.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure what a network costs here: latency, throughput, energy, memory, FLOPs."""
    from .measure import measure_network

    sizes = _integers("--shape", shape)
    measure_network(
        network,
        shape=tuple(sizes) if sizes else None,
        batch=batch,
        dtype=dtype,
        device=device,
        as_json=as_json,
    )


bench_app = typer.Typer(no_args_is_help=True, help="Compare strategies on tables of trained networks.")
app.add_typer(bench_app, name="bench")


@bench_app.command()
def tabular(
    data: Annotated[Path, typer.Option(help="The table; `docs/strategies.md` says how it is laid out.")],
    columns: Annotated[
        list[str], typer.Option(metavar="REWARD[,SCORE]", help="What a search sees, and is judged by.")
    ],
    space: Annotated[str, typer.Option(help="What the rows are; see `rlnas spaces`.")] = "cell-201",
    strategies: Annotated[
        str, typer.Option(help="With commas; options with +, e.g. random,model-based+patience=0.")
    ] = "model-based,local-search,evolution,random",
    budget: Annotated[int, typer.Option(help="Distinct evaluations of each search.")] = 150,
    seeds: Annotated[int, typer.Option(help="Searches of each strategy.")] = 40,
    noise: Annotated[float, typer.Option(help="Deviation of the noise on the reward, in points.")] = 0.0,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="Results; pieces in it are not run again.")] = Path("bench"),
    as_json: AsJson = False,
) -> None:
    """Learning curves, paired differences and CPU time of strategies on a table."""
    from ..components import Component
    from .bench import bench_tabular

    options = _settings(settings)
    wrong = [name for name in options if not name.startswith("space.")]
    if wrong:
        raise ConfigError(f"--set {wrong[0]}: here only the space has settings, e.g. space.distinct=cells")
    bench_tabular(
        data=data,
        columns=columns,
        space=Component(name=space, options={k.removeprefix("space."): v for k, v in options.items()}),
        strategies=strategies,
        budget=budget,
        seeds=seeds,
        noise=noise,
        jobs=jobs,
        out=out,
        as_json=as_json,
    )


@bench_app.command()
def import_nats_bench(
    source: Annotated[Path, typer.Argument(help="NATS-tss-...-simple, as its authors publish it.")],
    table: Annotated[Path, typer.Argument(help="The .npz to write.")],
) -> None:
    """Make a table of the official NATS-Bench, read by its own package (which unpickles the file)."""
    from .bench import nats_bench_table

    nats_bench_table(source, table)


@app.command()
def profile(
    space: Annotated[str, typer.Argument(help="What to profile; see `rlnas spaces`.")],
    task: Annotated[str | None, typer.Option(help="What its networks take and answer with.")] = None,
    data: Annotated[Path | None, typer.Option(help="The file of a task that reads one.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, ... or auto.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="The table (default: SPACE-cpu.json or -cuda.json).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a space's operators cost here: a table for `rlnas search --cost-model`."""
    given: dict[str, Any] = {
        "space": space, "task": task, "device": device, "threads": threads,
        "task.path": str(data) if data else None,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None} | _settings(settings)
    from ..config import read_config
    from .profile import profile_space

    profile_space(read_config(given), out, as_json)


app.command()(place)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is usable on this machine, and why not."""
    from .doctor import diagnose, print_diagnosis

    findings = diagnose()
    print_diagnosis(findings, as_json)
    if not all(finding.usable for finding in findings if finding.required):
        raise typer.Exit(2)


def _listing(kind: str) -> None:
    @app.command(
        name=f"{'strategie' if kind == 'strategy' else kind}s", help=f"List every {kind} and its options."
    )
    def _list(as_json: AsJson = False) -> None:
        from .listing import list_components

        list_components(kind, as_json)


for _kind in ("space", "strategy", "exploration", "task", "reward", "evaluator"):
    _listing(_kind)


app.add_typer(experiment, name="experiment")


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _report(result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.summary | {"folder": str(result.folder)}, indent=2))
    else:
        from .show import print_result

        print_result(result)


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is read as TOML, and as plain text where it is not TOML."""
    settings: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {pair}: write KEY=VALUE, e.g. strategy.learning_rate=0.01")
        try:
            settings[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            settings[name] = text
    return settings


def _integers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: write whole numbers with commas, e.g. 0,1,2") from None


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: write numbers with commas, e.g. 1,2,4") from None


def _fail(message: str, code: int = 2) -> int:
    _stderr().print(f"rlnas: {' '.join(message.split())}", highlight=False, soft_wrap=True)
    return code


def _stderr() -> Console:
    return Console(stderr=True, emoji=False, markup=False)
