"""Where the network and the task of a compression come from: objects, names, files, finished searches."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .components import COMPONENTS, Component, make, network_of
from .errors import ConfigError, DataError, unknown_name
from .runs import load_child, read_best, saved_config
from .search import Architecture, TaskSpec

if TYPE_CHECKING:
    from torch import nn

    from .tasks.task import Task


@dataclass(frozen=True)
class Source:
    """Where the network comes from.

    Attributes:
        name: for people.
        given: the text by which it can be asked for again; None of an object.
        origin: from which ``load_compressed`` builds it again; None if it cannot.
        module: None until it is trained.
        network: of a named network that is to be trained.
    """

    name: str
    given: str | None
    origin: dict[str, Any] | None
    module: nn.Module | None
    network: str | None = None


def source_of(model: str | nn.Module, task: Task) -> Source:
    """Finds the network that ``model`` is or names; nothing is trained, and no code from a file is run.

    Raises:
        ConfigError: there is no such network, file or folder, or it is not one for ``task``.
        DataError: a file holds something else than tensors by name.
        RunError: a folder holds no finished search.
    """
    from torch import nn

    from .networks import NETWORKS, make_network, named_after

    if isinstance(model, nn.Module):
        return Source(type(model).__name__, None, None, model)
    if not isinstance(model, str):
        raise ConfigError(f"model is a {type(model).__name__}: give a torch.nn.Module or a name")
    spec = asdict(task.spec)
    if model in NETWORKS:
        return Source(model, model, {"network": model, "task_spec": spec}, None, model)
    path = Path(model)
    if path.is_dir():
        best, config = read_best(path), saved_config(path)
        origin = {
            "space": config.space.model_dump(mode="json"),
            "choices": best["choices"],
            "task_spec": best["task_spec"],
        }
        return Source(path.name, str(path.resolve()), origin, load_child(path))
    if path.is_file():
        state = _read_state(path)
        name = named_after(state, task.spec)
        if name is None:
            raise ConfigError(
                f"{model}: its tensors are those of no named network ({', '.join(NETWORKS)}) for task "
                f"{task.name!r} ({task.spec.outputs} classes, images {task.spec.input_shape}); "
                "give module:attribute for a network of your own"
            )
        known = make_network(name, task.spec)
        known.load_state_dict(state)
        return Source(name, str(path.resolve()), {"network": name, "task_spec": spec}, known.eval())
    if ":" in model:
        return Source(model, model, None, network_of(model, task.spec))
    if path.suffix or os.sep in model:
        raise ConfigError(f"model {model!r}: there is no such file or folder")
    raise unknown_name("network", model, NETWORKS)


def _read_state(path: Path) -> dict[str, Any]:
    """Tensors by name, from a file that may be anyone's: nothing in it is run."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old protocols; what matters is raised
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{path} is not read: it is no safetensors file and no plain state dict, and nothing else is "
            f"loaded, because it could run code ({reason})"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise DataError(f"{path} holds no state dict (tensors by name): save model.state_dict() instead")
    return {str(name): tensor for name, tensor in state.items()}


def rebuilt(origin: Any) -> nn.Module | None:
    """The network that a saved file says it came from: ours only."""
    from .networks import make_network

    if origin is None:
        return None
    spec = origin["task_spec"]
    task_spec = TaskSpec(tuple(spec["input_shape"]), spec["outputs"], spec["kind"])
    if "network" in origin:
        return make_network(origin["network"], task_spec)
    space = Component.model_validate(origin["space"])
    if space.name not in COMPONENTS["space"]:
        return None
    built = make("space", space, task_spec).build(
        Architecture(space.name, tuple(origin["choices"])), task_spec
    )
    return built  # type: ignore[no-any-return]


def task_of(task: Any) -> Task:
    """The task that a name, a .npz file or a table {"name": ..., option: ...} stands for; or itself."""
    if isinstance(task, str):
        task = {"name": "npz", "path": task} if task.endswith(".npz") else {"name": task}
    if isinstance(task, Mapping):
        options = {key: value for key, value in task.items() if key != "name"}
        return make("task", Component(name=task["name"], options=options))  # type: ignore[no-any-return]
    return task  # type: ignore[no-any-return]
