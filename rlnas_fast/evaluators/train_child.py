"""Trains a child network for real, and measures what it costs."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .._version import __version__
from ..errors import ShapeError
from ..search import Architecture, Cost, Measurement, Meter, Request, TaskSpec
from ..training.data import DeviceData, Task, on_device
from ..training.loop import TrainResult, evaluate, precision, train
from ..training.memory import peak_bytes, reset_peak
from ..training.recipe import Recipe
from ..training.robustness import Corruption, robust_accuracy


class TrainableSpace(Protocol):
    """A search space that can build its networks."""

    @property
    def name(self) -> str: ...

    def build(self, architecture: Architecture, task_spec: TaskSpec) -> nn.Module: ...


Turn = Callable[[str], AbstractContextManager[Callable[[], None]]]


class TrainChild:
    """Builds a child, trains it, judges it on the validation split, and has it measured.

    Equal requests give equal accuracies on a CPU with a fixed number of threads and a budget in epochs.
    Can be pickled; each process copies the data to its device once.

    Args:
        space: has ``build(architecture, task_spec) -> nn.Module``, and where architectures decide about
            their training, ``recipe(architecture)`` with fields that replace those of ``recipe``.
        task: its test split is read by ``test_accuracy`` alone.
        recipe: how to train.
        device: "cpu", "cuda" or "cuda:<index>".
        meter: measures the cost of the trained network's forward pass; None leaves it unknown.
        threads: CPU threads to train and measure with; None leaves torch's setting.
        latency_batch: images in the call that is measured.
        robustness: also measures ``robust_accuracy`` on validation images spoilt like this: "noise", "blur"
            or "fgsm", with a strength as in "fgsm:0.1" (``training.robustness``).
        turn: makes the context in which to train on a device; it gives a function to call after each
            step.  This is how measurements keep trainings of other processes away.
        environment: what else a measurement depends on, such as the hardware; goes into ``identity``.
    """

    def __init__(
        self,
        space: TrainableSpace,
        task: Task,
        recipe: Recipe,
        device: str = "cpu",
        meter: Meter | None = None,
        threads: int | None = None,
        *,
        latency_batch: int = 1,
        robustness: str | None = None,
        turn: Turn | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._space = space
        self._task = task
        self._recipe = recipe
        self._device = torch.device(device)
        self._meter = meter
        self._threads = threads
        self._latency_batch = latency_batch
        self._corruption = None if robustness is None else Corruption.of(robustness)
        self._turn = turn or _no_turn
        self._environment = dict(environment or {})
        self._data: DeviceData | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_data": None}

    def on_device(self, device: str) -> TrainChild:
        """The same evaluator for another device."""
        other = copy.copy(self)
        other._device = torch.device(device)
        other._data = None
        move = getattr(self._meter, "on_device", None)
        if move is not None:
            other._meter = move(device)
        return other

    def identity(self) -> Mapping[str, str]:
        """What its measurements depend on beside the request."""
        return {
            "evaluator": "train-child",
            "space": settings_of(self._space),
            "task": f"{self._task.name} {self._task.spec}",
            "data": self._task.data_hash,
            "recipe": settings_of(self._recipe),
            "device": _device_name(self._device),
            "threads": str(self._threads or torch.get_num_threads()),
            "meter": settings_of(self._meter),
            "latency_batch": str(self._latency_batch),
            **({} if self._corruption is None else {"robustness": str(self._corruption)}),
            "torch": torch.__version__,
            "rlnas_fast": __version__,
            **{f"environment.{name}": value for name, value in self._environment.items()},
        }

    def provides(self) -> tuple[str, ...]:
        """Names of the numbers that its measurements have."""
        return (
            "accuracy",
            "loss",
            "train_seconds",
            "parameters",
            "flops",
            *(() if self._corruption is None else ("robust_accuracy",)),
            *(() if self._meter is None else getattr(self._meter, "provides", lambda: ("latency_s",))()),
        )

    def evaluate(self, request: Request) -> Measurement:
        """Trains the child of ``request``; what it fails at is in the measurement's ``failure``."""
        return self.train(request)[1]

    def train(
        self,
        request: Request,
        on_epoch: Callable[[int, float, float], None] = lambda epoch, accuracy, loss: None,
    ) -> tuple[nn.Module | None, Measurement]:
        """The trained network with its measurement; no network where it failed."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads or before)
        try:
            return self._train(request, on_epoch)
        except (MemoryError, RuntimeError) as error:
            failure = _machine_failure(error)
            if failure is None:
                raise
        finally:
            torch.set_num_threads(before)  # the process is the user's
        if self._device.type == "cuda" and not failure.transient:
            torch.cuda.empty_cache()
        return None, failure

    def test_accuracy(self, module: nn.Module) -> float:
        """Fraction of the test split that ``module`` gets right."""
        x, y = on_device(self._task.test_split(), self._device)
        return evaluate(module, self._resident(), x, y, self._recipe)[0]

    def _train(
        self, request: Request, on_epoch: Callable[[int, float, float], None]
    ) -> tuple[nn.Module | None, Measurement]:
        data = self._resident()
        reset_peak(self._device)
        try:
            module = self._build(request)
            parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
            flops = self._try_out(module, data)
        except (ShapeError, RuntimeError) as error:
            if _machine_failure(error) is not None:
                raise
            return None, Measurement(failure=f"does not fit the task: {_first_line(error)}")
        if not parameters:
            return None, Measurement(failure="has no trainable parameters", flops=flops)
        with self._turn(str(self._device)) as after_step:
            result = train(
                module,
                data,
                self._recipe_of(request.architecture),
                request.budget,
                device=self._device,
                seed=request.seed,
                on_epoch=on_epoch,
                on_step=after_step,
            )
        peak = peak_bytes(self._device)
        extra = {} if peak is None else {"train_peak_memory_bytes": float(peak)}
        if result.failure is not None:
            return None, _measurement(result, parameters, flops, Cost(), extra)
        if self._corruption is not None:
            extra["robust_accuracy"] = robust_accuracy(module, data, self._recipe, self._corruption, seed=0)
        cost = Cost()
        if self._meter is not None:
            cost = self._measure(self._meter, module, data)
            extra["latency_batch_size"] = float(self._latency_batch)
        return module, _measurement(result, parameters, flops, cost, extra)

    def _recipe_of(self, architecture: Architecture) -> Recipe:
        decides = getattr(self._space, "recipe", None)
        return replace(self._recipe, **decides(architecture)) if decides else self._recipe

    def _resident(self) -> DeviceData:
        if self._data is None:
            self._data = DeviceData.of(self._task, self._device)
        return self._data

    def _build(self, request: Request) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            module = self._space.build(request.architecture, self._task.spec)
        # A convolution follows its weights' layout; this one trains 1.2 to 1.4 times as fast, on CPUs too.
        return module.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def _try_out(self, module: nn.Module, data: DeviceData) -> int:
        """FLOPs of one image; raises ShapeError if the answer has not the task's shape."""
        module.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            answer = module(data.normalise(data.x_validation[:1]))
        expected = (1, self._task.spec.outputs)
        if tuple(answer.shape) != expected:
            raise ShapeError(f"one image gives an output of shape {tuple(answer.shape)}, not {expected}")
        return int(counter.get_total_flops())

    def _measure(self, meter: Meter, module: nn.Module, data: DeviceData) -> Cost:
        images = data.x_validation
        rows = torch.arange(self._latency_batch, device=self._device) % len(images)
        x = data.normalise(images[rows])
        module.eval()

        def call() -> None:
            with torch.inference_mode(), precision(self._recipe, self._device):
                module(x)

        return meter.measure(call)


def _measurement(
    result: TrainResult, parameters: int, flops: int, cost: Cost, extra: Mapping[str, float]
) -> Measurement:
    return Measurement(
        accuracy=result.accuracy,
        loss=result.loss,
        curve=result.curve,
        train_seconds=result.seconds,
        parameters=parameters,
        flops=flops,
        cost=cost,
        extra=extra,
        failure=result.failure,
    )


def _machine_failure(error: BaseException) -> Measurement | None:
    """The measurement for an error that is memory's or the device's; None for any other."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return Measurement(failure=f"out of memory: {_first_line(error)}")
    if isinstance(error, torch.AcceleratorError) or any(
        name in text for name in ("CUDA error", "cuDNN error", "CUBLAS_STATUS")
    ):
        return Measurement(failure=f"device error: {_first_line(error)}", transient=True)
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def settings_of(part: object) -> str:
    """The class of ``part`` and its plain settings; nothing that differs between equal parts."""
    if part is None:
        return "none"
    if is_dataclass(part):
        values = {field.name: getattr(part, field.name) for field in fields(part)}
    else:
        plain = (bool, int, float, str, tuple, type(None))
        values = {name: value for name, value in vars(part).items() if isinstance(value, plain)}
    inside = ", ".join(f"{name}={value!r}" for name, value in sorted(values.items()))
    return f"{type(part).__module__}.{type(part).__qualname__}({inside})"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"


@contextmanager
def _no_turn(device: str) -> Iterator[Callable[[], None]]:
    yield lambda: None
