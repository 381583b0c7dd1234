"""Puts a non-local block on a stage of a network, swaps it, and takes it out without a trace."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError, ShapeError
from ..nn import NonLocalBlock
from .stages import find_stages, fitted_block, plain_network, replace

__all__ = ["NonLocalInserter", "StageWithBlock"]

NONE = "none"  # the action that leaves the network without a block
BLOCK = "inserted_block"


class StageWithBlock(nn.Module):
    """A stage and the block behind it, in the stage's place.

    Everything else sees the stage: its attributes and items answer here too, and the state dict has the
    stage's own keys, with those of the block below ``inserted_block``.
    """

    def __init__(self, name: str, stage: nn.Module, block: NonLocalBlock) -> None:
        super().__init__()
        self.training = stage.training
        self.stage_name = name
        self.stage = stage
        self.inserted_block = block
        self.register_state_dict_post_hook(_without_stage)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_stage)  # type: ignore[no-untyped-call]

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """What the stage answers with, after the block."""
        features: Tensor = self.stage(*arguments, **named)
        block = self.inserted_block
        if features.dim() != block.dims + 2 or features.shape[1] != block.channels:
            raise ShapeError(
                f"stage {self.stage_name!r} now answers with shape {list(features.shape)}; its block is for "
                f"[batch, {block.channels}, {block.dims} spatial sizes]: the network's shapes change with "
                "its input, so take the block out (remove) and choose another stage"
            )
        z: Tensor = block(features)
        return z

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("stage"), name)

    def __getitem__(self, index: Any) -> Any:
        return self.stage[index]  # type: ignore[index]


class NonLocalInserter:
    """Inserts non-local blocks into a network in place, one stage at a time.

    A block is made when its stage is first chosen, starts as the identity, and is kept with its weights and
    the optimiser's state of them when another stage is chosen.  The network's class is not touched: a
    ``StageWithBlock`` takes the stage's place among its parent's children, so ``torch.compile`` sees the
    change and compiles once for each stage.  (By default it gives up after
    ``torch._dynamo.config.recompile_limit`` = 8 variants of a network; each stage counts once for training
    and once for evaluation.)

    Action a of an agent is ``insert(a)``: 0 is none, 1 to S are ``stages``.

    Args:
        network: in place; a compiled one counts as the module it was made from.
        batch: [B, ...] of which a few samples show what flows where.
        stages: names of modules; None finds the last at each spatial size (``find_stages``).
        optimizer: of the network.  While a block is inserted its parameters belong to the group that holds
            those of its stage (so learning rates, schedulers and weight decay hold for it too).
        seed: of the blocks' weights; that of stage a is ``seed`` + a.
        options: of ``NonLocalBlock``: inner_channels, kind, subsample, norm, bias, backend.
    Raises:
        ConfigError: the network has an inserter or a block already, an unknown name; see ``find_stages``.
        ShapeError, DataError: as ``find_stages``.
    """

    def __init__(
        self,
        network: nn.Module,
        batch: Tensor,
        stages: Sequence[str] | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.network = plain_network(network)
        _check_free(self.network)
        self.stages = find_stages(self.network, batch, stages)
        for stage in self.stages:  # an option that makes no block is found now, not at the first insertion
            fitted_block(stage, device=batch.device, seed=seed, **options)
        self.inserted = 0
        self._optimizer = optimizer
        self._device, self._seed, self._options = batch.device, seed, options
        self._wrapped: dict[int, StageWithBlock] = {}
        self._set_aside: dict[int, list[Any]] = {}
        for module in self.network.modules():
            _OWNERS[module] = weakref.ref(self)

    @property
    def names(self) -> tuple[str, ...]:
        """What each action stands for: "none", then the stages."""
        return (NONE, *(stage.name for stage in self.stages))

    def block(self, stage: int | str) -> NonLocalBlock:
        """The block of a stage, inserted or not; made now if it never was."""
        return self._of(self._action(stage, least=1)).inserted_block

    def insert(self, stage: int | str) -> nn.Module:
        """Takes out what is inserted and inserts the block of ``stage``: an action, or a name.

        Returns:
            The network.
        Raises:
            ConfigError: no such stage; or BatchNorm at it is in evaluation mode and its block was never
                trained.  The network is as it was before the call.
        """
        action = self._action(stage)
        if action == self.inserted:
            return self.network
        if action:
            self._check_mode(action)
        self.remove()
        if action:
            stage_ = self.stages[action - 1]
            wrapped = self._of(action)
            _set_mode(wrapped, stage_.module.training)
            self._extend_optimizer(action)
            replace(stage_, wrapped)
            self.inserted = action
        return self.network

    def remove(self) -> nn.Module:
        """Takes the block out.  Structure, modes and optimiser are then those of the network without it.

        Returns:
            The network.
        """
        if self.inserted:
            stage = self.stages[self.inserted - 1]
            wrapped = self._wrapped[self.inserted]
            replace(stage, stage.module)
            self._shrink_optimizer(self.inserted)
            for parameter in wrapped.inserted_block.parameters():
                parameter.grad = None
            self.inserted = 0
        return self.network

    def close(self) -> None:
        """Takes the block out and lets another inserter have the network."""
        self.remove()
        for module in self.network.modules():
            if _owner(module) is self:
                del _OWNERS[module]

    def __enter__(self) -> NonLocalInserter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Copies of all weights and buffers, of the network and of every block, and the optimiser's state.

        It needs no unpickling: ``torch.load(..., weights_only=True)`` reads it back.
        """
        inserted = self.inserted
        self.remove()
        try:
            return {
                "network": _tensors(self.network),
                "blocks": {action: _tensors(kept.inserted_block) for action, kept in self._wrapped.items()},
                "optimizer": None if self._optimizer is None else _copied(self._optimizer.state_dict()),
                "set_aside": _copied(self._set_aside),
                "inserted": inserted,
            }
        finally:
            self.insert_again(inserted)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets everything back, bit for bit, to what it was at ``state_dict``."""
        self.remove()
        _fill(self.network, state["network"])
        for action in set(self._wrapped) - set(state["blocks"]):
            del self._wrapped[action]
        for action, tensors in state["blocks"].items():
            _fill(self._of(action).inserted_block, tensors)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(_copied(state["optimizer"]))
        self._set_aside = _copied(dict(state["set_aside"]))
        self.insert_again(state["inserted"])

    def insert_again(self, action: int) -> None:
        """``insert`` of what was inserted before, in whatever mode the network is now."""
        if action and not self.inserted:
            stage = self.stages[action - 1]
            wrapped = self._of(action)
            _set_mode(wrapped, stage.module.training)
            self._extend_optimizer(action)
            replace(stage, wrapped)
            self.inserted = action

    def _action(self, stage: int | str, least: int = 0) -> int:
        names = self.names
        if isinstance(stage, str):
            if stage in names[least:]:
                return names.index(stage, least)
        elif least <= stage < len(names):
            return stage
        raise ConfigError(f"no stage {stage!r}: choose from {', '.join(names[least:])}")

    def _of(self, action: int) -> StageWithBlock:
        if action not in self._wrapped:
            stage = self.stages[action - 1]
            block = fitted_block(stage, device=self._device, seed=self._seed + action, **self._options)
            self._wrapped[action] = StageWithBlock(stage.name, stage.module, block)
        return self._wrapped[action]

    def _check_mode(self, action: int) -> None:
        """A new block's BatchNorm has no statistics to evaluate with."""
        stage = self.stages[action - 1]
        frozen = [
            name for name, m in stage.module.named_modules() if isinstance(m, _BatchNorm) and not m.training
        ]
        if stage.module.training and not frozen:
            return
        norms = [m for m in self._of(action).inserted_block.modules() if isinstance(m, _BatchNorm)]
        if not norms or all(norm.num_batches_tracked for norm in norms):
            return
        what = f"BatchNorm {stage.name}.{frozen[0]}".rstrip(".") if frozen else f"stage {stage.name!r}"
        raise ConfigError(
            f"{what} is in evaluation mode, and the block for stage {stage.name!r} was never trained: its "
            "own BatchNorm has no statistics yet; call train() on the network first, or choose norm=False"
        )

    def _extend_optimizer(self, action: int) -> None:
        if self._optimizer is None:
            return
        stage, block = self.stages[action - 1], self._wrapped[action].inserted_block
        group = _group_of(self._optimizer, stage.module.parameters())
        group["params"].extend(block.parameters())
        if "param_names" in group:
            prefix = f"{stage.name}.{BLOCK}."
            group["param_names"].extend(prefix + name for name, _ in block.named_parameters())
        for parameter, state in zip(block.parameters(), self._set_aside.pop(action, ()), strict=False):
            if state is not None:
                self._optimizer.state[parameter] = state

    def _shrink_optimizer(self, action: int) -> None:
        if self._optimizer is None:
            return
        parameters = list(self._wrapped[action].inserted_block.parameters())
        ours = {id(parameter) for parameter in parameters}
        for group in self._optimizer.param_groups:
            kept = [index for index, each in enumerate(group["params"]) if id(each) not in ours]
            if len(kept) < len(group["params"]):
                for key in ("params", "param_names"):
                    if key in group:
                        group[key][:] = [group[key][index] for index in kept]
        self._set_aside[action] = [self._optimizer.state.pop(parameter, None) for parameter in parameters]


_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[NonLocalInserter]] = weakref.WeakKeyDictionary()


def _owner(module: nn.Module) -> NonLocalInserter | None:
    reference = _OWNERS.get(module)
    return None if reference is None else reference()


def _check_free(network: nn.Module) -> None:
    for name, module in network.named_modules():
        part = f"its module {name!r}" if name else "it"
        if isinstance(module, StageWithBlock):
            raise ConfigError(f"the network has a block already, on {part}: remove it first")
        if _owner(module) is not None:
            raise ConfigError(
                f"the network is shared: {part} belongs to another NonLocalInserter; close() that one first"
            )


def _set_mode(wrapped: StageWithBlock, training: bool) -> None:
    wrapped.training = training
    wrapped.inserted_block.train(training)


def _group_of(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
    """The group that holds the first of ``parameters`` that is in one; else the last group."""
    groups: dict[int, dict[str, Any]] = {
        id(parameter): group for group in optimizer.param_groups for parameter in group["params"]
    }
    found = (groups[id(parameter)] for parameter in parameters if id(parameter) in groups)
    return next(found, optimizer.param_groups[-1])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter and buffer, also of those that a state dict leaves out."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


@torch.no_grad()
def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if named.keys() != tensors.keys():
        raise ConfigError(
            f"a saved state of another network: {sorted(named.keys() ^ tensors.keys())[0]} differs"
        )
    for name, tensor in named.items():
        if tensor.shape != tensors[name].shape:
            raise ConfigError(
                f"a saved state of another network: {name} is {list(tensors[name].shape)}, "
                f"not {list(tensor.shape)}"
            )
        tensor.copy_(tensors[name])


def _copied(value: Any) -> Any:
    """A copy of nested dicts and lists that shares no tensor."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value


def _without_stage(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Gives the stage's entries, which are below ``stage.`` now, the keys they have without a block.

    Order is kept; so is the metadata that modules need to read old state dicts.
    """
    inner = f"{prefix}stage."
    renamed = {
        (prefix + key.removeprefix(inner) if key.startswith(inner) else key): value
        for key, value in state.items()
    }
    state.clear()
    state.update(renamed)


def _with_stage(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The reverse, for loading."""
    block = f"{prefix}{BLOCK}."
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(block)]:
        state[f"{prefix}stage.{key.removeprefix(prefix)}"] = state.pop(key)
