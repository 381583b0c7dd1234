"""A latency table for a space on this device."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from ..config import SearchConfig
from ..costs import default_file, profile
from ..errors import ConfigError


def profile_space(config: SearchConfig, out: Path | None, as_json: bool) -> None:
    """Measures, saves, and says how far off an estimate may be."""
    file = out or default_file(config)
    if not file.parent.is_dir():
        raise ConfigError(f"cannot write {file}: there is no folder {file.parent}")
    console = Console(stderr=True, emoji=False, markup=False, quiet=as_json)
    with console.status("measuring") as status:
        table = profile(
            config, lambda what, done, total: status.update(f"measuring {what}: {done} of {total}")
        )
    table.save(file)
    fitted, held_out = table.networks
    fastest = table.estimate(())
    summary = {
        "table": str(file),
        "device": dict(table.conditions.device),
        "operators": len(table.operators),
        "networks_fitted": fitted,
        "networks_held_out": held_out,
        "error": table.error,
        "cheapest_latency_s": fastest["latency_s"],
    }
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    Console(emoji=False, markup=False).print(
        f"{len(table.operators)} operators and {fitted} networks measured; of {held_out} further networks "
        f"90 % are estimated to within {table.error:.1%}.\n"
        f"The cheapest network is estimated at {1e3 * fastest['latency_s']:.4f} ms.\n"
        f"Use it with: rlnas search --space {config.space.name} --cost-model {file}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
