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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such-run"], "no-such-run is no run folder"),
        (["torch.nn:Flatten"], "give --shape"),
        (["torch.nn:Flatten", "--shape=a"], "--shape"),
        (["torch.nn:Flatten", "--shape=1,8,8", "--batch=0"], "batch = 0"),
        (["torch.nn:Flatten", "--shape=1,8,8", "--dtype=int3"], "int3"),
        (["torch.nn:Flatten", "--shape=-1,8,8"], "--shape -1,8,8"),
        (["torch.nn:Flatten", "--shape=1,0,8"], "--shape 1,0,8"),
        (["torch.nn:no_such"], "cannot be imported"),
        (["json:dumps", "--shape=1"], "json:dumps"),
        (["no-such-run"], "no-such-run"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", *arguments, "--device=cpu"]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1
