"""``rlnas compress``: one command to a compressed network, one line for bad input, and no work done twice."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rlnas_fast as rf
from rlnas_fast.cli import main
from rlnas_fast.compression.layers import prunable
from rlnas_fast.errors import ConfigError, DataError, RunError
from rlnas_fast.networks import make_network
from rlnas_fast.ops import native
from rlnas_fast.ops.masked_matmul import cost_model
from rlnas_fast.search import TaskSpec

SHORT = ["--base-epochs=3", "--set=latency_batch=8", "--set=method=lamp"]


@pytest.fixture(autouse=True, scope="module")
def _quick_cost_model(quick_cost_model: None) -> None:
    cost_model._coefficients(native.cpu().isa(), 1, "torch.float32")  # on disk for processes of their own


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def compress(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    code = main(["compress", *arguments, *SHORT, "--json"])
    out, message = capsys.readouterr()
    assert code == 0, message
    return json.loads(out)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("_here")
def test_from_a_name_to_a_network_that_can_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model=lenet-300-100", "--data=digits", "--density=0.1", "--out=run", "--seed=3"]
    summary = compress(*arguments, capsys=capsys)
    assert {path.name for path in Path("run").iterdir()} == {
        "allocation.png", "base.safetensors", "compressed.json", "compressed.safetensors", "compression.json",
        "evaluations.sqlite", "summary.json",
    }  # fmt: skip
    assert summary["density"] == 0.1
    assert summary["after"]["weights"] == 5020
    assert summary["after"]["bits"] == 32 * 5020
    assert summary["after"]["file_bytes"] < 0.25 * summary["before"]["file_bytes"]
    assert summary["after"]["latency_s"] > 0
    assert summary["before"]["validation_accuracy"] > 0.85
    network = rf.load_compressed("run")
    dense = network.to_dense()
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(dense(x), network(x))
    assert sum(int((layer.weight != 0).sum()) for layer in prunable(dense)) <= 5020
    first = Path("run/compressed.safetensors").read_bytes()
    again = compress(*arguments, capsys=capsys)
    assert Path("run/compressed.safetensors").read_bytes() == first
    assert again["after"]["test_accuracy"] == summary["after"]["test_accuracy"]
    assert main(["resume", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["after"]["test_accuracy"] == summary["after"]["test_accuracy"]
    assert main(["compress", *arguments[:2], *SHORT, "--seed=3", "--density=0.2", "--out=run"]) == 2
    assert "holds a compression with density = 0.1, now it is 0.2" in capsys.readouterr().err


@pytest.mark.usefixtures("_here")
def test_tables_for_a_terminal_name_what_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 10)).eval()
    result = rf.compress(
        module,
        density=0.5,
        method="lamp",
        groups="tiles:8x8",
        gather=True,
        int8=True,
        latency_batch=4,
        out="o",
    )
    assert result.summary["skipped"] == [
        {"name": "2", "reason": "is a BatchNorm1d, not nn.Linear or nn.Conv2d"}
    ]
    assert result.summary["after"]["bits"] <= 0.5 * result.summary["before"]["bits"]
    assert all(row["int8"] == row["kept"] for row in result.summary["layers"])
    with pytest.raises(ConfigError, match="made from a network of your own"):
        rf.load_compressed("o")
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(rf.load_compressed("o", module)(x), result.network(x))
    assert main(["resume", "o"]) == 2
    assert "was started with objects" in capsys.readouterr().err
    assert main(["compress", "--model=small-cnn", "--density=0.3", "--groups=2:4", *SHORT, "--out=t"]) == 0
    shown = capsys.readouterr().out
    assert "Where the weights stay" in shown
    assert "small-cnn on digits" in shown
    assert main(["show", "t"]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.usefixtures("_here")
def test_weights_from_files_of_either_kind(capsys: pytest.CaptureFixture[str]) -> None:
    network = make_network("lenet-300-100", TaskSpec((1, 8, 8), 10), seed=7)
    save_file(network.state_dict(), "own.safetensors")
    torch.save(network.state_dict(), "own.pt")
    for file in ("own.safetensors", "own.pt"):
        summary = compress(f"--model={file}", "--epochs=0", "--density=1", f"--out={file}-run", capsys=capsys)
        assert summary["model"] == "lenet-300-100"
        loaded = rf.load_compressed(f"{file}-run").to_dense()
        assert torch.equal(loaded[1].weight, network[1].weight)


@pytest.mark.usefixtures("_here")
def test_the_documents_own_procedure(capsys: pytest.CaptureFixture[str]) -> None:
    summary = compress(
        "--model=lenet-300-100", "--procedure=layerwise", "--groups=rows", "--density=0.2", "--out=run",
        "--set", "layer_steps=1", capsys=capsys,
    )  # fmt: skip
    assert summary["method"] == "layerwise"
    assert [row["layer"] for row in summary["history"]] == ["1", "3", "5"]
    assert summary["density"] == 0.2


class Touches:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("touched", "w")


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("name", ["bad.pt", "bad.safetensors", "bad.pkl"])
def test_an_untrusted_file_runs_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(name).write_bytes(pickle.dumps(Touches()))
    assert main(["compress", f"--model={name}", "--out=run"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "could run code" in message
    assert not Path("touched").exists()
    assert not Path("run").exists()
    torch.save(make_network("lenet-300-100", TaskSpec((1, 8, 8), 10)), "whole.pt")
    assert main(["compress", "--model=whole.pt", "--out=run"]) == 2
    assert "could run code" in capsys.readouterr().err


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model=lenet"], "unknown network 'lenet': did you mean 'lenet-300-100'?"),
        (["--model=lenet-300-100", "--density=0"], "density = 0.0: give the share of weights to keep"),
        (["--model=lenet-300-100", "--density=1.2"], "above 0 and at most 1"),
        (["--model=lenet-300-100", "--density=0.0001"], "the smallest layer, '5', has 1,000 weights"),
        (["--model=lenet-300-100", "--set=method=lamb"], "did you mean 'lamp'"),
        (["--model=lenet-300-100", "--groups=tile"], "groups 'tile'"),
        (["--model=lenet-300-100", "--gather"], "gather = True: gathers weights into tiles"),
        (["--model=lenet-300-100", "--groups=2:4", "--density=0.6"], "2:4 can keep at most 0.5"),
        (["--model=lenet-300-100", "--groups=2:4", "--int8"], "int8 = True with groups = 2:4"),
        (["--model=lenet-300-100", "--set", "evaluation=3"], "did you mean 'evaluations'"),
        (["--model=lenet-300-100", "--set", "price_density=-1"], "price_density = -1"),
        (["--model=lenet-300-100", "--procedure=other"], "procedure = 'other'"),
        (["--model=lenet-300-100", "--data=digit"], "did you mean 'digits'"),
        (["--model=lenet-300-100", "--data=no.npz"], "no.npz"),
        (["--model=no/file.pt"], "there is no such file or folder"),
        (["--model=nothing:here"], "cannot be imported"),
        (["--model=rlnas_fast.compression.layers:prunable"], "makes no network"),
        (["--model=rlnas_fast.search:TaskSpec"], "makes a TaskSpec, not a torch.nn.Module"),
        (["--model=rlnas_fast.errors:RlnasError"], "makes no network"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", *SHORT, *arguments, "--out=run"]) == 2
    out, message = capsys.readouterr()
    assert message.count("\n") == 1
    assert said in message
    assert not out
    assert not Path("run").exists()


@pytest.mark.usefixtures("_here")
def test_models_that_cannot_be_compressed_stay_as_they_are() -> None:
    cases = [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), "has 10 classes, the model's head answers with 7"),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)), "no layer that can be compressed"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "weights that are NaN"),
    ]
    with torch.no_grad():
        cases[2][0][1].weight[2, 3] = torch.nan
    for module, said in cases:
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(ValueError, match=said):
            rf.compress(module, out="run")
        assert not Path("run").exists()
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ConfigError, match="model is a int"):
        rf.compress(3)  # type: ignore[arg-type]
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        rf.compress(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), out="full")


@pytest.mark.usefixtures("_here")
def test_a_saved_description_runs_no_code(capsys: pytest.CaptureFixture[str]) -> None:
    compress("--model=lenet-300-100", "--out=run", "--epochs=0", capsys=capsys)
    file = Path("run/compressed.json")
    description = json.loads(file.read_text())
    spec = description["origin"]["task_spec"]
    file.write_text(
        json.dumps(
            description | {"origin": {"space": {"name": "antigravity:x"}, "choices": [], "task_spec": spec}}
        )
    )
    with pytest.raises(ConfigError, match="network of your own"):
        rf.load_compressed("run")
    assert "antigravity" not in sys.modules
    file.write_text(json.dumps(description | {"origin": {"network": 3, "task_spec": {}}}))
    with pytest.raises(DataError, match="what network it was cannot be read"):
        rf.load_compressed("run")
    file.write_text(json.dumps(description | {"origin": {"network": "x", "task_spec": spec}}))
    with pytest.raises(ValueError, match="unknown network 'x'"):
        rf.load_compressed("run")


@pytest.mark.usefixtures("_here")
def test_the_winner_of_a_search_is_compressed(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--trials=1", "--epochs=1", "--set=confirm_seeds=1", "--set=confirm=1", "--strategy=random"]
    assert main(["search", *small, "--batch-size=1", "--out=found", "--json"]) == 0
    capsys.readouterr()
    summary = compress("--model=found", "--density=0.3", "--out=run", capsys=capsys)
    assert summary["model"] == "found"
    assert summary["density"] == pytest.approx(0.3, abs=1e-3)
    x = torch.randn(2, 1, 8, 8)
    network = rf.load_compressed("run")
    with torch.no_grad():
        torch.testing.assert_close(network(x), network.to_dense()(x))


def rlnas(folder: Path, *arguments: str, **more: object) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "rlnas_fast.cli", *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # type: ignore[call-overload, no-any-return]  # fmt: skip


def small_files_only() -> None:
    """What a full disk looks like to a process: no file may grow beyond 100 KiB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, 100 << 10))


def test_a_full_disk_is_one_line_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = rlnas(
        tmp_path, "compress", "--model=lenet-300-100", "--out=run", *SHORT, preexec_fn=small_files_only
    )
    _, message = process.communicate(timeout=120)
    assert process.returncode == 2
    assert message.count("\n") == 1
    assert "free some space" in message
    assert not (tmp_path / "run" / "base.safetensors").exists()
    assert (
        compress("--model=lenet-300-100", f"--out={tmp_path / 'run'}", capsys=capsys)["after"]["weights"]
        == 5020
    )


def rows(log: Path) -> dict[str, str]:
    connection = sqlite3.connect(f"file:{log}?mode=ro", uri=True)
    try:
        return dict(connection.execute("SELECT key, created_at FROM measurements"))
    except sqlite3.OperationalError:
        return {}
    finally:
        connection.close()


def test_a_killed_layerwise_run_goes_on_and_ends_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "compress", "--model=lenet-300-100", "--procedure=layerwise", "--groups=tiles:16x16", "--density=0.2",
        "--base-epochs=1", "--set=layer_steps=2", "--set=layer_epochs=3", "--set=latency_batch=4",
    ]  # fmt: skip
    process = rlnas(tmp_path, *arguments, "--out=killed")
    saved = tmp_path / "killed" / "layerwise.safetensors"
    deadline = time.monotonic() + 60
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, message = process.communicate()
    assert saved.exists(), message
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert main(["resume", str(tmp_path / "killed"), "--json"]) == 0
    out = capsys.readouterr().out
    assert main([*arguments, f"--out={tmp_path / 'whole'}", "--json"]) == 0
    one, other = json.loads(out), json.loads(capsys.readouterr().out)
    assert one["history"] == other["history"]
    assert one["layers"] == other["layers"]
    assert one["after"]["test_accuracy"] == other["after"]["test_accuracy"]
    kept = [load_file(tmp_path / name / "compressed.safetensors") for name in ("killed", "whole")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[1])


def test_a_killed_search_makes_no_evaluation_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "compress", "--model=lenet-300-100", "--method=ppo", "--density=0.05", "--base-epochs=1",
        "--evaluations=12", "--set=latency_batch=4",
    ]  # fmt: skip
    process = rlnas(tmp_path, *arguments, "--out=killed")
    log = tmp_path / "killed" / "evaluations.sqlite"
    deadline = time.monotonic() + 60
    while (not log.exists() or len(rows(log)) < 7) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, message = process.communicate()
    before = rows(log)
    assert 7 <= len(before) < 12, message
    assert main([*arguments, f"--out={tmp_path / 'killed'}", "--json"]) == 0
    out = capsys.readouterr().out
    after = rows(log)
    assert {key: after[key] for key in before} == before
    assert main([*arguments, f"--out={tmp_path / 'whole'}", "--json"]) == 0
    one, other = json.loads(out), json.loads(capsys.readouterr().out)
    assert one["evaluations"] == other["evaluations"] == 12
    assert one["history"] == other["history"]
    assert one["layers"] == other["layers"]
    assert set(after) == set(rows(tmp_path / "whole" / "evaluations.sqlite"))
    assert not (tmp_path / "killed" / "gains").exists()
