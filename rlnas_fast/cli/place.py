"""``rlnas place``: learns at which stage of a network a non-local block helps it most."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from .screen import Screen

GROUPS = ("block", "agent", "recipe", "task")


def place(
    model: Annotated[
        str, typer.Option(help="stage-cnn, resnet20, ..., or your module:attribute.")
    ] = "stage-cnn",
    data: Annotated[str, typer.Option(help="What to learn; see `rlnas tasks`.")] = "digits",
    stages: Annotated[str | None, typer.Option(help="Modules, with commas (default: found).")] = None,
    agent: Annotated[
        str, typer.Option(help="q-table, dqn, reinforce, ppo, or fixed:STAGE (fixed:none).")
    ] = "q-table",
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 10,
    decide: Annotated[str, typer.Option(help="Anew for each batch, regime or epoch.")] = "batch",
    metric: Annotated[
        str, typer.Option(help="What a decision should improve: loss, accuracy or f1.")
    ] = "loss",
    delay: Annotated[int, typer.Option(help="Training passes until a decision is rewarded.")] = 4,
    latency_price: Annotated[
        float, typer.Option(help="Price of doubling the measured latency, in the metric.")
    ] = 0.0,
    revert_below: Annotated[
        float | None, typer.Option(help="Take a decision back if its reward is less.")
    ] = None,
    explore_until: Annotated[
        float, typer.Option(help="Share of the training after which nothing is tried any more.")
    ] = 0.3,
    regimes: Annotated[str, typer.Option(help="Of the images, e.g. clean,noise:0.5,blur.")] = "clean",
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ... or auto.")] = "auto",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="An option of block, agent, recipe or task: block.subsample=2."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder (default: a new one in runs/).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Train a network while an agent learns where to insert a non-local block.

    The same command with the same --out goes on where it was stopped, and so does `rlnas resume`.
    """
    from ..placement_runs import place as run

    groups = _groups(settings)
    with Screen(quiet=as_json) as screen:
        result = run(
            model,
            data,
            stages=None if stages is None else stages.split(","),
            agent=agent,
            epochs=epochs,
            decide=decide,
            metric=metric,
            delay=delay,
            latency_price=latency_price,
            revert_below=revert_below,
            explore_until=explore_until,
            regimes=regimes.split(","),
            seed=seed,
            device=device,
            block=groups["block"],
            agent_options=groups["agent"],
            recipe=groups["recipe"],
            task=groups["task"],
            out=out,
            progress=screen,
        )
    show_placement(result.summary, result.folder, as_json)


def show_placement(summary: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Prints what a placement run found."""
    if as_json:
        print(json.dumps(summary | {"folder": str(folder)}, indent=2))
        return
    console = Console(emoji=False)
    table = Table(title=f"{summary['model']} on {summary['data']}, {summary['agent']}", title_justify="left")
    for heading in ("stage", "shape", "chosen", "validation %", "less none, points", "latency"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for name, row in summary["fixed"].items():
        shape = "x".join(map(str, summary["stages"].get(name, [])))
        added = (summary["added_latency"] or {}).get(name)
        gain, low, high = (100 * row[key] for key in ("gain", "low", "high"))
        table.add_row(
            name, shape, str(summary["counts"][name]), f"{100 * row['accuracy']:.2f}",
            "" if name == "none" else f"{gain:+.2f} ({low:+.2f} to {high:+.2f})",
            "" if added is None or name == "none" else f"{100 * added:+.0f} %",
        )  # fmt: skip
    console.print(table)
    say = console.print
    test = "" if summary["test_accuracy"] is None else f", test {100 * summary['test_accuracy']:.2f} %"
    say(
        f"Policy: {100 * summary['accuracy']:.2f} % of validation; block at {summary['stage']}{test}",
        highlight=False,
    )
    collapse = summary["collapse"]
    if collapse and collapse["collapsed"]:
        say(
            f"The policy collapsed: {100 * collapse['share']:.0f} % of the latest decisions think "
            f"{collapse['action']} best, whatever the state",
            highlight=False,
        )
    for caveat in summary["latency_caveats"]:
        say(f"caveat of the latency: {caveat}", highlight=False, markup=False)
    if summary["reverted"]:
        say(f"{summary['reverted']} decisions were taken back", highlight=False)
    say(f"Everything is in {folder}", highlight=False, soft_wrap=True)


def _groups(pairs: list[str] | None) -> dict[str, dict[str, Any]]:
    """KEY=VALUE pairs by what they are an option of; a value is TOML, or plain text where it is not."""
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        group, dot, name = key.partition(".")
        if not equals or not dot or not name or group not in groups:
            raise ConfigError(
                f"--set {pair}: write KEY=VALUE with a key of {', '.join(GROUPS)}: block.subsample=2"
            )
        try:
            groups[group][name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            groups[group][name] = text
    return groups
