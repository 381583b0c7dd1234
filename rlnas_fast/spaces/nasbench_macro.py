"""The space of NAS-Bench-Macro: eight layers, three choices each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from ..errors import ConfigError
from ..nn.child_layers import Residual, conv_unit, initialise
from ..search import Architecture, Decision, TaskSpec

CHOICES = ("identity", "mb3_k3", "mb6_k5")
STAGE_LAYERS = (2, 3, 3)


@dataclass(frozen=True)
class NasBenchMacro:
    """Chains of eight inverted residual blocks in three stages; each may be left out.

    A stage's first layer halves the image; leaving it out leaves a strided 1x1 convolution.  Decisions
    and choices are in the order of the published table, so that a row of its ``choices`` is an
    architecture.

    Source: Su et al., Prioritized Architecture Sampling with Monto-Carlo Tree Search (2021), section 5;
    the widths follow from the parameters and FLOPs in its table, which these networks match.

    Args:
        task_spec: the images are (channels, height, width).
        width: channels of the first stage, 64 in the table; each stage doubles them, the stem has half as
            many and the head 20 times.
    """

    task_spec: TaskSpec
    width: int = 64

    def __post_init__(self) -> None:
        if self.width < 2:
            raise ConfigError(f"nasbench-macro: width = {self.width}: give at least 2")
        if len(self.task_spec.input_shape) != 3:
            raise ConfigError(
                f"nasbench-macro needs images (channels, height, width), "
                f"the task has {self.task_spec.input_shape}"
            )

    @property
    def name(self) -> str:
        """Of the kind of space."""
        return "nasbench-macro"

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """One for each layer."""
        return _DECISIONS

    def mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        """Every choice may follow any prefix: bool [3]."""
        return np.ones(len(CHOICES), dtype=bool)

    def is_complete(self, prefix: tuple[int, ...]) -> bool:
        """Whether every layer is chosen."""
        return len(prefix) == len(_DECISIONS)

    def cheapest(self, prefix: tuple[int, ...]) -> Architecture:
        """The rest left out."""
        left_out = CHOICES.index("identity")
        return Architecture(self.name, prefix + (left_out,) * (len(_DECISIONS) - len(prefix)))

    def canonical_key(self, architecture: Architecture) -> str:
        """The blocks of each stage in order, without those that are left out and change nothing."""
        stages = []
        for first, *rest in _stages(architecture.choices):
            stages.append("".join(str(choice) for choice in (first, *filter(None, rest))))
        return f"{self.name}:{'/'.join(stages)}"

    def describe(self, architecture: Architecture) -> str:
        """The choices, stages apart."""
        stages = _stages(architecture.choices)
        return " / ".join(" > ".join(CHOICES[choice] for choice in stage) for stage in stages)

    def build(self, architecture: Architecture, task_spec: TaskSpec) -> nn.Module:
        """A module from [N, channels, height, width] to [N, outputs]."""
        width, head = self.width // 2, 20 * self.width
        layers: list[nn.Module] = [conv_unit(task_spec.input_shape[0], width, 3)]
        for number, stage in enumerate(_stages(architecture.choices)):
            for position, choice in enumerate(stage):
                stage_width = self.width * 2**number
                layers.append(_block(CHOICES[choice], width, stage_width, stride=1 if position else 2))
                width = stage_width
        layers += [conv_unit(width, head, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return initialise(nn.Sequential(*layers, nn.Linear(head, task_spec.outputs)))


_DECISIONS = tuple(Decision(f"layer {i + 1}", CHOICES) for i in range(sum(STAGE_LAYERS)))


def _stages(choices: tuple[int, ...]) -> list[tuple[int, ...]]:
    stages, start = [], 0
    for count in STAGE_LAYERS:
        stages.append(choices[start : start + count])
        start += count
    return stages


def _block(choice: str, width_in: int, width_out: int, stride: int) -> nn.Module:
    if choice == "identity":
        if stride == 1:
            return nn.Identity()
        return conv_unit(width_in, width_out, 1, stride=stride, activation=None)
    inner, kernel = width_in * int(choice[2]), int(choice[-1])
    block = nn.Sequential(
        conv_unit(width_in, inner, 1),
        conv_unit(inner, inner, kernel, stride=stride, groups=inner),
        conv_unit(inner, width_out, 1, activation=None),
    )
    return Residual(block) if stride == 1 else block
