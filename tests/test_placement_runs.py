"""A placement run from its settings to a saved network: a kill changes nothing, bad input loses nothing."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rlnas_fast as rf
from rlnas_fast.errors import ConfigError, DataError, RunError, ShapeError
from rlnas_fast.networks import StageCNN
from rlnas_fast.placement.agents import QTableAgent
from rlnas_fast.tasks.digits import digits
from rlnas_fast.training.data import DeviceData

SMALL: dict[str, Any] = {"epochs": 2, "task": {"train_size": 200}, "delay": 2}


class Own(nn.Module):
    """A user's network: its stages are where it likes them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {"low": nn.Conv2d(1, 4, 3, padding=1), "high": nn.Conv2d(4, 8, 2, stride=2)}
        )
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.body["high"](self.body["low"](x).relu())).relu()
        return self.head(self.dropout(x.mean(dim=(2, 3))))


def loaders() -> tuple[Any, Any]:
    data = DeviceData.of(digits(train_size=200), torch.device("cpu"))
    train = torch.utils.data.TensorDataset(data.normalise(data.x), data.y)
    validation = torch.utils.data.TensorDataset(data.normalise(data.x_validation), data.y_validation)
    return (
        torch.utils.data.DataLoader(train, 32, shuffle=True, drop_last=True),
        torch.utils.data.DataLoader(validation, 25),
    )


def test_a_run_by_name(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    result = rf.place("stage-cnn", "digits", out=tmp_path / "run", regimes=["clean", "noise:0.5"], **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.stage in result.accuracies
    assert set(result.accuracies) == {"none", "stage1", "stage2", "stage3"}
    assert sum(result.counts.values()) == result.summary["decisions"] == 12
    lines = (tmp_path / "run" / "decisions.jsonl").read_text().splitlines()
    assert len(lines) == 12 - 1  # the last decision has no reward: training ended before
    assert len(lines) == sum(row["rewarded"] for row in result.summary["rewards"].values())
    assert (tmp_path / "run" / "placement.png").stat().st_size > 10_000
    x = torch.randn(3, 1, 8, 8)
    again = rf.load_placed(tmp_path / "run")
    assert torch.equal(again(x), result.network(x))
    assert (tmp_path / "run" / "network.safetensors").exists()
    repeated = rf.place("stage-cnn", "digits", out=tmp_path / "two", regimes=["clean", "noise:0.5"], **SMALL)
    assert repeated.summary == result.summary


def test_a_users_module_and_loaders(tmp_path: Path) -> None:
    network = Own()
    result = rf.place(
        network, loaders(), stages=["body.low", "body.high"], agent=QTableAgent, epochs=2,
        latency_price=0.01, block={"kind": "dot_product"}, out=tmp_path / "run",
    )  # fmt: skip
    assert result.network is network
    assert type(network) is Own
    assert result.test_accuracy is None
    assert result.summary["added_latency"]["none"] == 0.0
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(rf.load_placed(tmp_path / "run", Own())(x), network(x))
    with pytest.raises(RunError, match="give a fresh one"):
        rf.load_placed(tmp_path / "run")
    result.inserter.close()
    assert not [name for name in network.state_dict() if "inserted_block" in name]


def test_fixed_agents_say_that_they_are(tmp_path: Path) -> None:
    result = rf.place(
        "stage-cnn", "digits", agent="fixed:stage2", out=tmp_path / "run", **SMALL | {"epochs": 4}
    )
    assert result.stage == "stage2"
    assert result.counts == {"none": 0, "stage1": 0, "stage2": 24, "stage3": 0}
    assert result.accuracy == result.accuracies["stage2"]
    assert result.collapsed
    with pytest.raises(ConfigError, match="no stage 'stage9'"):
        rf.place("stage-cnn", "digits", agent="fixed:stage9", out=tmp_path / "two", **SMALL)


def picture(network: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in network.state_dict().items()},
        "modes": [module.training for module in network.modules()],
        "gradients": [p.grad for p in network.parameters()],
        "hooks": [len(module._forward_hooks) for module in network.modules()],
    }


class Poisoned:
    """A loader whose fourth batch is NaN."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        for number in range(6):
            x = torch.randn(8, 1, 8, 8)
            yield (x if number < 3 else x * float("nan")), torch.arange(8)


class Interrupting(Poisoned):
    def __iter__(self) -> Any:
        yield torch.randn(8, 1, 8, 8), torch.arange(8)
        raise KeyboardInterrupt


GOOD = [(torch.randn(8, 1, 8, 8), torch.arange(8))]


@pytest.mark.parametrize(
    ("data", "settings", "error", "says"),
    [
        ("digit", {}, ConfigError, "did you mean 'digits'"),
        ("digits", {"epoch": 3}, ConfigError, "unknown setting 'epoch'"),
        ("digits", {"epochs": 0}, ConfigError, "epochs = 0"),
        ("digits", {"agent": "q-tabel"}, ConfigError, "did you mean 'q-table'"),
        ("digits", {"stages": ["body.mid"]}, ConfigError, "unknown stage 'body.mid'"),
        ("digits", {"stages": "body.low"}, ConfigError, "as a list"),
        ("digits", {"stages": ["head"]}, ShapeError, "'head' answers with shape"),
        ("digits", {"regimes": ["fog"]}, ConfigError, "give noise, blur"),
        ("digits", {"metric": "auc"}, ConfigError, "unknown metric"),
        ("digits", {"block": {"kinds": "x"}}, ConfigError, "block.kinds"),
        ("digits", {"block": {"kind": "x"}}, ConfigError, "unknown kind"),
        ("digits", {"recipe": {"rate": 1}}, ConfigError, "recipe.rate"),
        ("digits", {"device": "cuda:99"}, ConfigError, "is not here"),
        ("digits", {"recipe": {"learning_rate": 1e30}}, DataError, "NaN|diverged"),
        (([], GOOD), {}, DataError, "training loader yields nothing"),
        ((GOOD, []), {}, DataError, "validation loader yields nothing"),
        ((Poisoned(), GOOD), {}, DataError, "NaN"),
        (3, {}, DataError, "data is a int"),
        ((GOOD, GOOD), {"regimes": ["blur"]}, ConfigError, "come with their batches"),
        ((Interrupting(), GOOD), {}, KeyboardInterrupt, "^$"),
    ],
)  # fmt: skip
def test_a_network_is_left_as_it_came(
    data: Any, settings: dict[str, Any], error: type[BaseException], says: str, tmp_path: Path
) -> None:
    network = Own()
    network.norm.eval()
    network.norm.train()
    before = picture(network)
    with pytest.raises(error, match=says):
        rf.place(network, data, out=tmp_path / "run", **settings)
    after = picture(network)
    assert all(torch.equal(value, before["state"][name]) for name, value in after["state"].items())
    assert list(after["state"]) == list(before["state"])
    del after["state"], before["state"]
    assert after == before


def test_a_folder_with_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="not empty"):
        rf.place("stage-cnn", "digits", out=tmp_path / "full", **SMALL)
    rf.place("stage-cnn", "digits", out=tmp_path / "run", **SMALL | {"epochs": 1})
    with pytest.raises(RunError, match="epochs 1 -> 2"):
        rf.place("stage-cnn", "digits", out=tmp_path / "run", **SMALL)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"rubbish")
    with pytest.raises(RunError, match=r"checkpoint\.pt cannot be read"):
        rf.place("stage-cnn", "digits", out=tmp_path / "run", **SMALL | {"epochs": 1})
    with pytest.raises(RunError, match="no trained network"):
        rf.load_placed(tmp_path / "full")


def test_a_run_does_not_go_on_with_a_network_of_another_structure(tmp_path: Path) -> None:
    rf.place(StageCNN(1, 10, width=4), "digits", out=tmp_path / "run", **SMALL | {"epochs": 1})
    wider, strided = StageCNN(1, 10, width=5), StageCNN(1, 10, width=4)
    strided.stage1[0][0].stride = (2, 2)
    for other in (wider, strided):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(RunError, match="a network with other layers or shapes: give the one") as error:
            rf.place(other, "digits", out=tmp_path / "run", **SMALL | {"epochs": 1})
        assert "\n" not in str(error.value)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    again = rf.place(StageCNN(1, 10, width=4), "digits", out=tmp_path / "run", **SMALL | {"epochs": 1})
    assert again.summary["epochs"]  # the same one goes on, here from the end


KILLED = """
import sys
import rlnas_fast.placement_folder as folder
import rlnas_fast.placement_runs as runs
folder.SAVE_SECONDS = 0.0
class Slow(runs.Silent):
    def trained(self, folder, done, total, text):
        import time; time.sleep(0.05)
runs.place("stage-cnn", "digits", out=sys.argv[1], progress=Slow(), epochs=2, delay=2,
           agent="dqn", task={"train_size": 200})
"""


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    settings = SMALL | {"agent": "dqn"}
    whole = rf.place("stage-cnn", "digits", out=tmp_path / "whole", **settings)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "run")], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    log = tmp_path / "run" / "decisions.jsonl"
    for _ in range(600):
        time.sleep(0.05)
        if log.exists() and len(log.read_text().splitlines()) >= 4:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(log.read_text().splitlines())
    assert 4 <= done < 11
    assert not (tmp_path / "run" / "summary.json").exists()
    with log.open("a") as torn:
        torn.write('{"step": 99, "stage"')  # what a kill in the middle of writing leaves
    resumed = rf.place("stage-cnn", "digits", out=tmp_path / "run", **settings)
    assert resumed.summary == whole.summary
    assert log.read_text() == (tmp_path / "whole" / "decisions.jsonl").read_text()
    one, other = resumed.network.state_dict(), whole.network.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_loaders_and_dropout_resume_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlnas_fast.placement_folder.SAVE_SECONDS", 0.0)

    class Stop(Exception):
        pass

    class Stopping:
        def trained(self, folder: Path, done: int, total: int, text: str) -> None:
            if done == 9:
                raise Stop

    network = Own()
    twin, third = copy.deepcopy(network), copy.deepcopy(network)
    whole = rf.place(network, loaders(), out=tmp_path / "whole", epochs=2)
    with pytest.raises(Stop):
        rf.place(twin, loaders(), out=tmp_path / "run", epochs=2, progress=Stopping())
    resumed = rf.place(third, loaders(), out=tmp_path / "run", epochs=2)
    assert resumed.summary == whole.summary
    one, other = resumed.network.state_dict(), whole.network.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
def test_a_compiled_network_is_trained_compiled(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    network = Own()
    result = rf.place(torch.compile(network, backend="eager"), loaders(), out=tmp_path / "run", epochs=1)
    assert result.network is network
    assert counters["stats"]["unique_graphs"] >= 2
    torch._dynamo.reset()
