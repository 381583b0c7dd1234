"""``rlnas place``: from the command line to a run folder, and on after an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlnas_fast.cli import main

SMALL = ["--epochs=1", "--set=task.train_size=100", "--delay=1", "--device=cpu"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_place_and_resume(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["place", *SMALL, "--out=run", "--set=block.kind=dot_product", "--regimes=clean,blur:0.7"]
    assert main([*arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["folder"] == "run"
    assert summary["decisions"] == 3
    assert main(["resume", "run"]) == 0
    shown = capsys.readouterr().out
    assert f"block at {summary['stage']}" in shown
    assert "stage3" in shown
    assert main(["show", "run"]) == 0
    assert capsys.readouterr().out == shown
    assert main(["show", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary
    (tmp_path / "run" / "summary.json").unlink()
    assert main(["show", "run"]) == 0
    assert capsys.readouterr().out == "not finished: go on with `rlnas resume run`\n"
    assert json.loads((tmp_path / "run" / "placement.json").read_text())["block"] == {"kind": "dot_product"}


def test_a_network_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine_to_place.py").write_text(
        "from torch import nn\n"
        "def network():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))\n"
    )
    arguments = ["place", *SMALL, "--model=mine_to_place:network", "--stages=0", "--json", "--out=run"]
    assert main(arguments) == 0
    assert set(json.loads(capsys.readouterr().out)["fixed"]) == {"none", "0"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model=resnet2"], "did you mean 'resnet20'"),
        (["--model=json:dumps"], "json:dumps"),
        (["--model=json:no_such"], "cannot be imported"),
        (["--data=digit"], "did you mean 'digits'"),
        (["--stages=stage1,stage7"], "unknown stage 'stage7'"),
        (["--stages=classifier"], "feature map"),
        (["--agent=ppp"], "did you mean 'ppo'"),
        (["--agent=fixed:stage7"], "no stage 'stage7'"),
        (["--decide=never"], "unknown decide"),
        (["--metric=f2"], "did you mean 'f1'"),
        (["--delay=0"], "delay = 0"),
        (["--regimes=fog"], "give noise, blur"),
        (["--set=kind=x"], "--set kind=x"),
        (["--set=agent.epsilonn=1"], "did you mean 'epsilon'"),
        (["--set=recipe.nonsense=1"], "recipe.nonsense"),
        (["--epochs=0"], "epochs = 0"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["place", "--set=task.train_size=100", "--device=cpu", "--out=run", *arguments]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rlnas_fast.cli", "place", "--epochs=400", "--device=cpu", "--out=run"],
        cwd=tmp_path, env=dict(os.environ), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(600):
        time.sleep(0.05)
        if (tmp_path / "run" / "checkpoint.pt").exists():
            break
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message == "rlnas: interrupted; go on with: rlnas resume run\n"
    assert (tmp_path / "run" / "checkpoint.pt").exists()
