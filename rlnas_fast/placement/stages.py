"""Where a block can go: the stages of a network, found or named, and a block that fits one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError, DataError, ShapeError, unknown_name
from ..nn import NonLocalBlock

__all__ = [
    "Stage",
    "as_it_came_on_failure",
    "find_stages",
    "generate_non_local_block",
    "observing",
    "plain_network",
]

_SAMPLES = 8  # of a batch, to see shapes


@dataclass(frozen=True, eq=False)
class Stage:
    """A module whose output a block may be put on.

    Attributes:
        name: as in ``network.named_modules()``.
        network: that it is part of.
        module: the stage itself.
        holders: every (parent, attribute) under which the network holds it.
        shape: what flows there for the batch that was seen: (C, *space), without the batch.
    """

    name: str
    network: nn.Module
    module: nn.Module
    holders: tuple[tuple[nn.Module, str], ...]
    shape: tuple[int, ...]


def find_stages(network: nn.Module, batch: Tensor, names: Sequence[str] | None = None) -> tuple[Stage, ...]:
    """The candidates for a block, in the order in which they run.

    The network runs a few samples of ``batch`` in evaluation mode, without gradients and with the random
    state set back, and is left as it came.

    Args:
        network: any module that takes one tensor; a compiled one counts as the module it was made from.
        batch: [B, ...] as the network takes it.
        names: of the modules.  None takes the last module to finish at each spatial size, of all that run
            once in a pass and answer with a feature map.
    Raises:
        ConfigError: a name that does not exist, or a module that the network does not call, or more than
            once in a pass; or no candidate was found.
        ShapeError: a named module does not answer with a feature map [B, C, 1 to 3 spatial sizes] of fixed
            channels; or the network does not take the batch.
        DataError: the batch is empty, or a stage answers with NaN or infinite values.
    """
    network = plain_network(network)
    if batch.dim() == 0 or len(batch) == 0:
        raise DataError(
            f"the batch has shape {tuple(batch.shape)}: give [batch, ...] with at least one sample"
        )
    if names is not None:
        _check_names(network, names)
    some = batch[:_SAMPLES]
    seen = _outputs(network, some)
    if names is None:
        names = _last_at_each_size(seen, len(some))
        if not names:
            raise ConfigError(
                "no module of the network answers with a feature map: there is no place for a block"
            )
    stages = []
    for name in sorted(names, key=list(seen).index):
        module = network.get_submodule(name)
        outputs = seen[name]
        if len(outputs) != 1:
            often = f"runs {len(outputs)} times in a pass" if outputs else "is never called"
            raise ConfigError(f"stage {name!r} {often}: name a module that the network calls once")
        if (reason := _no_feature_map(outputs[0], len(some))) is not None:
            raise ShapeError(
                f"stage {name!r} answers with {reason}; a block needs a feature map "
                "[batch, channels, 1 to 3 spatial sizes] with more than one position"
            )
        if not torch.isfinite(outputs[0]).all():
            raise DataError(
                f"stage {name!r} answers with NaN or infinite values: check the batch and the weights"
            )
        holders = tuple(
            (parent, attribute)
            for parent in network.modules()
            for attribute, child in parent._modules.items()
            if child is module
        )
        stages.append(Stage(name, network, module, holders, tuple(outputs[0].shape[1:])))
    _check_reached(stages, some)
    return tuple(stages)


def generate_non_local_block(
    batch: Tensor, stage: Stage, *, seed: int | None = None, **options: Any
) -> NonLocalBlock:
    """A new block, the identity, that fits what flows at ``stage`` when the network sees ``batch``.

    Channels, number of spatial dimensions, dtype and device are those of the stage.

    Args:
        batch: [B, ...] as the network takes it.
        seed: of the weights; None draws them from torch's generator.
        options: of ``NonLocalBlock``: inner_channels, kind, subsample, norm, bias, backend.
    Raises:
        ShapeError, DataError, ConfigError: as ``find_stages`` does for this batch.
    """
    found = find_stages(stage.network, batch, [stage.name])[0]
    return fitted_block(found, device=batch.device, seed=seed, **options)


def fitted_block(stage: Stage, *, device: torch.device, seed: int | None, **options: Any) -> NonLocalBlock:
    """A block for what is known to flow at ``stage``, in training or not as the stage is."""
    reference = next((p for p in stage.module.parameters() if p.is_floating_point()), None)
    if reference is None:
        reference = next((p for p in stage.network.parameters() if p.is_floating_point()), None)
    with ExitStack() as stack:
        if seed is not None:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(seed)
        block = NonLocalBlock(stage.shape[0], dims=len(stage.shape) - 1, **options)
    if reference is not None:
        block = block.to(device=reference.device, dtype=reference.dtype)
    else:
        block = block.to(device=device)
    return block.train(stage.module.training)


def plain_network(network: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, or the module itself."""
    original = getattr(network, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else network


@contextmanager
def observing(network: nn.Module, *, batch_statistics: bool = False) -> Iterator[None]:
    """Evaluation without gradients; modes and random state are afterwards what they were.

    Args:
        network: every BatchNorm of it uses its running statistics,
        batch_statistics: except, with this, one that is in training mode: it uses those of the batch, which
            needs at least 2 samples, and its running statistics stay as they are.
    """
    modes = [(module, module.training) for module in network.modules()]
    norms = [
        (module, module.track_running_stats)
        for module, training in modes
        if batch_statistics and training and isinstance(module, _BatchNorm)
    ]
    gpus = {p.device for p in network.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(gpus)), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            for norm, _ in norms:
                norm.training, norm.track_running_stats = True, False
            yield
        finally:
            for norm, tracked in norms:
                norm.track_running_stats = tracked
            for module, training in modes:
                module.training = training


@contextmanager
def as_it_came_on_failure(network: nn.Module) -> Iterator[None]:
    """Weights, buffers, gradients and modes go back to what they were if anything is raised."""
    parameters = [(each, each.detach().clone(), each.grad) for each in network.parameters()]
    buffers = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in network.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value, gradient in parameters:
                parameter.data = value  # on the device where it was
                parameter.grad = gradient
            for holder, name, buffer, value in buffers:
                holder[name] = buffer.copy_(value)
        for module, training in modes:
            module.training = training
        raise


def run_network(network: nn.Module, batch: Tensor) -> Any:
    """What the network answers.

    Raises:
        ShapeError: it does not take such a batch; says why.
    """
    try:
        return network(batch)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, (torch.OutOfMemoryError, ShapeError)):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ShapeError(
            f"the network does not take a batch {tuple(batch.shape)}, {batch.dtype}: {reason}"
        ) from error


def _check_names(network: nn.Module, names: Sequence[str]) -> None:
    known = [name for name, _ in network.named_modules() if name]
    if not names:
        raise ConfigError("stages is empty: name at least one module, or leave it out to have them found")
    for name in names:
        if name not in known:
            raise unknown_name("stage", name, known)
    if len(set(names)) < len(names):
        raise ConfigError(f"stages {', '.join(names)}: name each one once")


def _outputs(network: nn.Module, batch: Tensor) -> dict[str, list[Any]]:
    """What every module answered with in one pass, by name, in the order in which they finished."""
    seen: dict[str, list[Any]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            outputs = seen.setdefault(name, [])
            outputs.append(output)
            seen[name] = seen.pop(name)  # a module that runs again finishes later

        return hook

    handles = []
    try:
        for name, module in network.named_modules():
            if name:
                handles.append(module.register_forward_hook(watch(name)))
        with observing(network):
            run_network(network, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen | {name: [] for name, _ in network.named_modules() if name and name not in seen}


def _last_at_each_size(seen: dict[str, list[Any]], samples: int) -> list[str]:
    last: dict[tuple[int, ...], str] = {}
    for name, outputs in seen.items():
        if len(outputs) == 1 and _no_feature_map(outputs[0], samples) is None:
            last[tuple(outputs[0].shape[2:])] = name
    return list(last.values())


def _no_feature_map(output: Any, samples: int) -> str | None:
    """Why ``output`` is none, or None if it is one."""
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__}"
    if not output.is_floating_point():
        return f"{output.dtype}"
    if not 3 <= output.dim() <= 5 or len(output) != samples or output[0, 0].numel() < 2:
        return f"shape {list(output.shape)} for {samples} samples"
    return None


class _Counted(nn.Module):
    """Stands in a stage's place and notes what comes out."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = self.stage(*arguments, **named)
        self.shapes.append(tuple(output.shape[1:]))
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["stage"], name)

    def __getitem__(self, index: int) -> Any:
        return self.stage[index]  # type: ignore[index]


def _check_reached(stages: Sequence[Stage], batch: Tensor) -> None:
    """Checks with other samples that what stands in a stage's place is called, and that channels stay."""
    if not stages:
        return
    counters = [_Counted(stage.module) for stage in stages]
    for stage, counter in zip(stages, counters, strict=True):
        replace(stage, counter)
    try:
        with observing(stages[0].network):
            run_network(stages[0].network, 0.5 * batch.flip(0)[: max(1, len(batch) // 2)])
    finally:
        for stage in stages:
            replace(stage, stage.module)
    for stage, counter in zip(stages, counters, strict=True):
        if len(counter.shapes) != 1:
            raise ConfigError(
                f"stage {stage.name!r} cannot be replaced: the network reaches it by another way than its "
                "attribute; name a module around it"
            )
        if counter.shapes[0] != stage.shape:
            raise ShapeError(
                f"the network's shapes change with its input: stage {stage.name!r} answered with "
                f"{list(stage.shape)} and with {list(counter.shapes[0])} for samples of one size"
            )


def replace(stage: Stage, module: nn.Module) -> None:
    """Puts ``module`` in the place of a stage; its order among the parent's children stays."""
    for parent, attribute in stage.holders:
        parent._modules[attribute] = module
