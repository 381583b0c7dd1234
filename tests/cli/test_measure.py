import json

import pytest

from rlnas_fast.cli import main


def test_a_module_by_name_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "torch.nn:Flatten", "--shape=1,8,8", "--batch=4", "--device=cpu", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["eager"]["median_s"] > 0
    assert (cost["batch"], cost["parameters"], cost["flops"]) == (4, 0, 0)
    assert set(cost["unknown"]) >= {"graph", "peak_memory_bytes"}  # unknown is None, and says why
    assert cost["peak_memory_bytes"] is None


def test_a_network_of_ours_is_measured_for_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "lenet-300-100", "--shape=1,28,28", "--device=cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 266_610


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such-run"], "no-such-run is no run folder"),
        (["torch.nn:Flatten"], "give --shape"),
        (["resnet20"], "give --shape"),
        (["small-cnn", "--shape=3,1,1"], "at least 2 x 2"),
        (["torch.nn:Flatten", "--shape=a"], "--shape"),
        (["torch.nn:Flatten", "--shape=1,8,8", "--batch=0"], "batch = 0"),
        (["torch.nn:Flatten", "--shape=1,8,8", "--dtype=int3"], "int3"),
        (["torch.nn:Flatten", "--shape=-1,8,8"], "--shape -1,8,8"),
        (["torch.nn:Flatten", "--shape=1,0,8"], "--shape 1,0,8"),
        (["torch.nn:no_such", "--shape=3"], "cannot be imported"),
        (["json:dumps", "--shape=1"], "json:dumps"),
        (["no-such-run"], "no-such-run"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", *arguments, "--device=cpu"]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1
