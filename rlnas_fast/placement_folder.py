"""A placement run on disk: its settings, a log of its decisions, and a checkpoint that it goes on from."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import nn

from .errors import ConfigError, RunError
from .placement.batches import CLEAN
from .placement.procedure import Placement
from .placement.rewards import AddedLatency
from .search.archives import replace_file
from .storage.writer_lock import WriterLock

__all__ = ["PlacementConfig", "PlacementFolder", "Progress", "Silent", "saved_config", "write_text"]

CONFIG, CHECKPOINT, DECISIONS = "placement.json", "checkpoint.pt", "decisions.jsonl"
STRUCTURE = "structure"  # beside the settings: a digest of the network's layers and shapes
SAVE_SECONDS = 20.0
UNREADABLE = (
    OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, UnpicklingError
)  # what a damaged checkpoint may raise  # fmt: skip


class Progress(Protocol):
    """Hears how a placement run goes on."""

    def trained(self, folder: Path, done: int, total: int, text: str) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def trained(self, folder: Path, done: int, total: int, text: str) -> None: ...


@dataclass(frozen=True)
class PlacementConfig:
    """Everything a placement run depends on, as ``place`` takes it; objects leave their type's name.

    Attributes:
        model, data, agent: names, or the types of objects.
        stages: names of modules; None finds the last at each spatial size.
        epochs: passes over the training split.
        decide: anew for each "batch", at each change of "regime", or each "epoch".
        metric: what a decision should improve on the validation split: "loss", "accuracy" or "f1".
        delay: training passes until a decision is rewarded.
        control: take off what the network without a block gained meanwhile (``RewardRule``).
        latency_price: of an inference twice as long, in units of the metric; 0 measures no latency.
        revert_below: after a smaller reward the network is set back to before the decision; None never.
        explore_until: share of the training after which the agent does only what it thinks best.
        regimes: of a task's images: "clean", "noise:0.5", "blur", ...
        validation_batch: images in a validation batch of a task.
        seed: of weights, order, agent and blocks.
        device: "cpu", "cuda:0", ... or "auto", which leaves a module of the caller's where it is.
        block: options of ``NonLocalBlock``.
        agent_options: of the agent.
        recipe: of training (``Recipe``).
        task: of the task.
    """

    model: str
    data: str
    stages: tuple[str, ...] | None = None
    agent: str = "q-table"
    epochs: int = 10
    decide: str = "batch"
    metric: str = "loss"
    delay: int = 4
    control: bool = True
    latency_price: float = 0.0
    revert_below: float | None = None
    explore_until: float = 0.3
    regimes: tuple[str, ...] = (CLEAN,)
    validation_batch: int = 128
    seed: int = 0
    device: str = "auto"
    block: Mapping[str, Any] = field(default_factory=dict)
    agent_options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("epochs", self.epochs, 1),
            ("validation_batch", self.validation_batch, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} = {value}: give at least {least}")


class PlacementFolder:
    """A run on disk: settings, a log of decisions, and a checkpoint that says how much of it counts."""

    def __init__(self, folder: Path, config: PlacementConfig, placement: Placement) -> None:
        self.folder, self.config, self.placement = folder, config, placement
        self.epochs: list[dict[str, Any]] = []
        self._written = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the run folder {folder}: {error.strerror}") from error
        self._lock = WriterLock(folder / "lock")

    def __enter__(self) -> PlacementFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lock.release()

    def restore(self) -> bool:
        """Goes back to the last checkpoint; False where there is none.

        Raises:
            RunError: the folder holds something else, a run with other settings or of a network with other
                layers, or a checkpoint that cannot be read.
        """
        structure = _structure(self.placement.network)
        if not (self.folder / CONFIG).exists():
            others = [entry.name for entry in self.folder.iterdir() if entry.name != "lock"]
            others = [name for name in others if not name.startswith(".")]
            if others:
                raise RunError(f"{self.folder} is there and is not empty: choose another --out")
            settings = _plain(self.config) | {STRUCTURE: structure}
            write_text(self.folder / CONFIG, json.dumps(settings, indent=2))
        else:
            before, now = _plain(saved_config(self.folder)), _plain(self.config)
            changed = [
                f"{name} {before[name]!r} -> {now[name]!r}" for name in now if before[name] != now[name]
            ]
            if changed:
                raise RunError(
                    f"{self.folder} holds a run with other settings ({', '.join(changed)}): "
                    "choose another --out"
                )
            if _saved(self.folder)[STRUCTURE] != structure:
                raise RunError(
                    f"{self.folder} holds a run of a network with other layers or shapes: give the one that "
                    "it was started with, or choose another --out"
                )
        checkpoint = self.folder / CHECKPOINT
        if not checkpoint.exists():
            return False
        try:
            state = torch.load(checkpoint, weights_only=True)
            lines = (self.folder / DECISIONS).read_text().splitlines(keepends=True)[: state["written"]]
            if len(lines) < state["written"]:
                raise ValueError(f"{DECISIONS} has fewer decisions than the checkpoint counts")
            self.placement.load_state_dict(state["placement"])
        except UNREADABLE as error:
            raise RunError(f"{checkpoint} cannot be read: {error}") from error
        self.placement.rewarded = [json.loads(line) for line in lines]
        self.placement.added_latency = AddedLatency(**state["added_latency"])
        self.epochs, self._written = state["epochs"], state["written"]
        write_text(self.folder / DECISIONS, "".join(lines))
        return True

    def save(self) -> None:
        """Writes new decisions, then the checkpoint that counts them."""
        placement = self.placement
        with (self.folder / DECISIONS).open("a") as log:
            for decision in placement.rewarded[self._written :]:
                log.write(json.dumps(decision) + "\n")
            log.flush()
            os.fsync(log.fileno())
        self._written = len(placement.rewarded)
        state = {
            "placement": placement.state_dict(),
            "added_latency": asdict(placement.added_latency),
            "epochs": self.epochs,
            "written": self._written,
        }
        replace_file(self.folder / CHECKPOINT, lambda temporary: torch.save(state, temporary))

    def train(self, epochs: int, progress: Progress) -> None:
        placement = self.placement
        saved = time.monotonic()
        text = self.epochs[-1]["text"] if self.epochs else ""
        progress.trained(self.folder, placement.step, placement.total, text)
        while placement.epoch < epochs:
            number = placement.epoch
            for step in placement.train_epoch():
                progress.trained(self.folder, step, placement.total, text)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
            self.epochs.append(self._epoch(number))
            text = self.epochs[-1]["text"]
            self.save()
            saved = time.monotonic()

    def _epoch(self, number: int) -> dict[str, Any]:
        placement = self.placement
        names = placement.inserter.names
        choices = placement.choices()
        accuracy = float(placement.validate(choices).mean())
        counts = Counter(names[action] for epoch, action in placement.taken if epoch == number)
        best = names[Counter(choices).most_common(1)[0][0]]
        return {
            "epoch": number + 1,
            "accuracy": accuracy,
            "best": best,
            "counts": {name: counts[name] for name in names},
            "text": f"{100 * accuracy:.2f} %, best {best}",
        }


def saved_config(folder: Path) -> PlacementConfig:
    """What a run was started with.

    Raises:
        RunError: ``folder`` is no placement run.
    """
    saved = _saved(folder)
    del saved[STRUCTURE]
    try:
        for name in ("stages", "regimes"):
            saved[name] = None if saved[name] is None else tuple(saved[name])
        return PlacementConfig(**saved)
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{folder} is not a placement run that can be read: {error}") from error


def _saved(folder: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        saved[STRUCTURE] = str(saved[STRUCTURE])
        return saved
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{folder} is not a placement run that can be read: {error}") from error


def _structure(network: nn.Module) -> str:
    """A digest of names and types of modules, what PyTorch's own say of themselves, and all shapes."""
    lines = [
        f"{name} {type(module).__qualname__} "
        + (module.extra_repr() if type(module).__module__.startswith("torch.") else "")
        for name, module in network.named_modules()
    ]
    tensors = (*network.named_parameters(), *network.named_buffers())
    lines += [f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _plain(config: PlacementConfig) -> dict[str, Any]:
    """As it comes back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def write_text(file: Path, text: str) -> None:
    """Writes all of it or none of it."""

    def write(temporary: Path) -> None:
        with temporary.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    replace_file(file, write)
