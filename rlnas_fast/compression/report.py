"""What a compression ended with: as plain data, as tables for a terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from .compressed import Compressed
from .latency import Timing
from .layers import INT8, KEEP_BITS, PRUNE, Masks, Prunable, bits, density
from .problem import Problem

__all__ = ["allocation", "allocation_table", "result_table", "save_allocation_picture", "summarise"]


def summarise(
    problem: Problem, masks: Masks, compressed: Compressed, timing: Timing, file_bytes: int
) -> dict[str, Any]:
    """What a network was and what it has become, as plain data; reads the test split, once.

    Args:
        problem: of the network as it was.
        masks: what was kept.
        compressed: the network as it is now.
        timing: of "before" and "after", side by side.
        file_bytes: of the saved compressed network.
    """
    rows = allocation(problem.layers, masks)

    def side(network: nn.Module, name: str) -> dict[str, Any]:
        return {
            "validation_accuracy": problem.accuracy(network)[0],
            "test_accuracy": problem.test_accuracy(network),
            "latency_s": timing.latency_s[name],
        }

    total = problem.layers.total
    return {
        "task": problem.task.name,
        "density": density(masks),
        "before": {
            **side(problem.model, "before"),
            "weights": total,
            "bits": KEEP_BITS * total,
            "file_bytes": _file_bytes(problem.model),
        },
        "after": {
            **side(compressed, "after"),
            "weights": sum(row["kept"] for row in rows),
            "bits": bits(masks),
            "file_bytes": file_bytes,
        },
        "speedup": timing.speedup["after"],
        "latency_batch": timing.batch,
        "caveats": list(timing.caveats),
        "layers": rows,
        "skipped": [asdict(entry) for entry in problem.layers.skipped],
        "evaluations": problem.evaluations,
    }


def allocation(layers: Prunable, masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One row a layer: its name, shape, weights, how many stay, how many of those in int8, density."""
    rows = []
    for layer in layers:
        mask = masks[layer.name]
        kept = int((mask != PRUNE).sum())
        rows.append(
            {
                "layer": layer.name,
                "shape": list(mask.shape),
                "weights": mask.numel(),
                "kept": kept,
                "int8": 0 if mask.dtype == torch.bool else int((mask == INT8).sum()),
                "density": kept / mask.numel(),
            }
        )
    return rows


def allocation_table(summary: Mapping[str, Any]) -> Table:
    """What stays of each layer."""
    table = Table(title="Where the weights stay", title_justify="left")
    table.add_column("layer")
    for heading in ("shape", "weights", "kept", "int8", "density %"):
        table.add_column(heading, justify="right")
    for row in summary["layers"]:
        table.add_row(
            row["layer"],
            "x".join(map(str, row["shape"])),
            f"{row['weights']:,}",
            f"{row['kept']:,}",
            f"{row['int8']:,}",
            f"{100 * row['density']:.2f}",
        )
    return table


def result_table(summary: Mapping[str, Any]) -> Table:
    """Before and after."""
    table = Table(title=f"{summary['model']} on {summary['task']}", title_justify="left")
    table.add_column("")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    before, after = summary["before"], summary["after"]
    for name, scale, form in (
        ("validation_accuracy", 100, "{:.2f} %"),
        ("test_accuracy", 100, "{:.2f} %"),
        ("weights", 1, "{:,.0f}"),
        ("bits", 1, "{:,.0f}"),
        ("file_bytes", 1, "{:,.0f}"),
        ("latency_s", 1e3, "{:.4f} ms"),
    ):
        label = {"latency_s": f"latency, batch {summary['latency_batch']}"}.get(name, name.replace("_", " "))
        table.add_row(label, *(form.format(scale * side[name]) for side in (before, after)))
    return table


def save_allocation_picture(summary: Mapping[str, Any], file: Path) -> None:
    """Draws the density of every layer, int8 and float32 apart, and how many weights each has."""
    from matplotlib.figure import Figure

    rows = summary["layers"]
    places = range(len(rows))
    figure = Figure(figsize=(max(5.0, 1.0 + 0.7 * len(rows)), 4.5), dpi=120, layout="constrained")
    densities, sizes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    int8 = [100 * row["int8"] / row["weights"] for row in rows]
    whole = [100 * (row["kept"] - row["int8"]) / row["weights"] for row in rows]
    densities.bar(places, whole, color="tab:blue", label="kept in float32")
    if any(int8):
        densities.bar(places, int8, bottom=whole, color="tab:orange", label="kept in int8")
    densities.axhline(100 * summary["density"], color="tab:red", lw=1, label="whole network")
    densities.set_ylabel("weights kept (%)")
    densities.legend(fontsize=8)
    densities.set_title(f"{summary['model']} on {summary['task']}: {summary['method']}")
    sizes.bar(places, [row["weights"] for row in rows], color="tab:gray")
    sizes.set_yscale("log")
    sizes.set_ylabel("weights")
    sizes.set_xticks(places, [row["layer"] for row in rows], rotation=45 if len(rows) > 6 else 0)
    for axes in (densities, sizes):
        axes.grid(alpha=0.3, axis="y")
    partial = file.with_name(file.name + ".partial")
    figure.savefig(partial, format="png")
    partial.replace(file)


def _file_bytes(module: nn.Module) -> int:
    """What a network takes that is saved dense."""
    from safetensors.torch import save

    return len(save({k: v.detach().cpu().clone().contiguous() for k, v in module.state_dict().items()}))
