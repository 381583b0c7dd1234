"""``rlnas experiment``: published studies, run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from .screen import Screen

experiment = typer.Typer(no_args_is_help=True, help="Run a published study again.")


@experiment.callback()
def _studies() -> None:
    """Makes typer keep the name of the only command."""


@experiment.command()
def metaqnn(
    data: Annotated[str, typer.Option(help="mnist3, cifar5 or cifar10.")] = "mnist3",
    penalty: Annotated[bool, typer.Option("--penalty", help="Take the size penalty off the reward.")] = False,
    strategy: Annotated[str, typer.Option(help="q-learning, ppo or sb3:maskable-ppo.")] = "q-learning",
    schedule: Annotated[str, typer.Option(help="full (as published) or reduced (for 2 cores).")] = "full",
    task: Annotated[str | None, typer.Option(help="Another data set, e.g. cifar10-jpeg.")] = None,
    classes: Annotated[str | None, typer.Option(help="Other classes, e.g. 3,5,8.")] = None,
    beta: Annotated[float | None, typer.Option(help="Scale of the size penalty.")] = None,
    episodes: Annotated[int | None, typer.Option(help="Networks of the search.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Training of each of them.")] = None,
    train_size: Annotated[int | None, typer.Option(help="Images to train each of them on.")] = None,
    final_epochs: Annotated[int | None, typer.Option(help="Training of each generated network.")] = None,
    final_train_size: Annotated[int | None, typer.Option(help="Images for each generated network.")] = None,
    networks_at_random: Annotated[int | None, typer.Option(help="Random networks to compare with.")] = None,
    generate: Annotated[int, typer.Option(help="Networks generated after the search.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Networks between two updates.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ... or auto.")] = "auto",
    workers: Annotated[int, typer.Option(help="Networks trained side by side.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of each.")] = 1,
    cache: Annotated[Path | None, typer.Option(help="Measurements to share among studies.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop then; the same command goes on.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder (default: one in runs/).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Search chains of layers as a Markov decision process, then train 50 that the agent generates.

    Rewards come from a validation split; the published study used the test set.  The same command goes on
    where it was stopped.
    """
    from ..experiments.metaqnn import default_folder, run_study, study

    changes: dict[str, Any] = {
        "task": task, "classes": _integers(classes), "beta": beta, "episodes": episodes, "epochs": epochs,
        "train_size": train_size, "final_epochs": final_epochs, "final_train_size": final_train_size,
        "networks_at_random": networks_at_random,
    }  # fmt: skip
    settings = study(
        data,
        strategy=strategy,
        penalty=penalty,
        schedule=schedule,
        changes={name: value for name, value in changes.items() if value is not None},
        generate=generate,
        batch_size=batch_size,
        seed=seed,
        device=device,
        workers=workers,
        threads=threads,
    )
    folder = out or default_folder(settings)
    with Screen(quiet=as_json) as screen:
        summary = run_study(settings, folder, cache=cache, max_minutes=max_minutes, progress=screen)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _show(summary)


def _show(summary: dict[str, Any]) -> None:
    console = Console(emoji=False, markup=False)
    title = f"{summary['data']} ({summary['task']}), {summary['strategy']}"
    table = Table(title=title + (", size penalised" if summary["penalty"] else ""), title_justify="left")
    for heading in ("networks", "test accuracy %", "distinct", "mean depth", "mean parameters", "failed"):
        table.add_column(heading, justify="left" if heading == "networks" else "right")
    for name in ("generated", "random"):
        if (row := summary[name]) is not None:
            table.add_row(
                f"{len(row['accuracies'])} {name}",
                f"{100 * row['test_accuracy']:.2f} ± {100 * row['deviation']:.2f}",
                str(row["distinct"]), f"{row['depth']:.2f}", f"{row['parameters']:,.0f}", str(row["failed"]),
            )  # fmt: skip
    table.add_row("50 published", (summary["published"] or "-").replace(" %", ""), "-", "-", "-", "-")
    console.print(table)
    if summary["gain"]:
        gain = {name: 100 * value for name, value in summary["gain"].items()}
        console.print(
            f"Gain over random networks: {gain['mean']:.2f} points, 95 % interval {gain['low']:.2f} "
            f"to {gain['high']:.2f}",
            highlight=False,
        )
    best = summary["best"]
    if best["validation_accuracy"] is not None:
        console.print(
            f"Best on validation: {best['network']} ({100 * best['validation_accuracy']:.2f} %, test "
            f"{100 * best['test_accuracy']:.2f} %, {best['parameters']:,} parameters)",
            highlight=False,
        )
    console.print(
        f"{summary['episodes']} episodes; everything is in {summary['folder']}",
        highlight=False,
        soft_wrap=True,
    )


def _integers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--classes {text}: write whole numbers with commas, e.g. 0,1,2") from None
