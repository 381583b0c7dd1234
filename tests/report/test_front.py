from pathlib import Path

from rich.console import Console

from rlnas_fast.report.front import front_of, front_table, save_front_picture
from rlnas_fast.search import Architecture, Cost, Measurement, Trial


class Named:
    def describe(self, architecture: Architecture) -> str:
        return f"network {architecture.choices[0]}"


def trial(number: int, accuracy: float | None, latency_s: float | None, parameters: int | None) -> Trial:
    failure = "out of memory" if accuracy is None else None
    measurement = Measurement(
        accuracy=accuracy, parameters=parameters, cost=Cost(latency_s=latency_s), failure=failure
    )
    return Trial(number, 0, Architecture("s", (number,)), str(number), measurement, accuracy or 0.0)


TRIALS = [
    trial(0, 0.90, 2e-3, 100),
    trial(1, 0.95, 4e-3, 300),
    trial(2, 0.90, 3e-3, 200),  # beaten by 0
    trial(3, None, None, None),  # failed
    trial(4, 0.85, 5e-3, 50),  # the smallest
]


def test_front_keeps_what_nothing_beats_in_every_objective() -> None:
    assert [t.number for t in front_of(TRIALS)] == [1, 0, 4]


def test_front_ignores_an_objective_that_nobody_measured() -> None:
    assert [t.number for t in front_of([trial(0, 0.9, None, 100), trial(1, 0.8, None, 200)])] == [0]


def test_front_of_nothing_is_empty() -> None:
    assert front_of([]) == ()
    assert front_of([TRIALS[3]]) == ()


def test_table_shows_units_and_marks_the_chosen() -> None:
    console = Console(record=True, width=100)
    console.print(front_table(TRIALS, Named(), chosen=1))
    text = console.export_text()
    assert "* 1" in text
    assert "95.00" in text
    assert "4.000" in text
    assert "network 4" in text
    assert "network 2" not in text


def test_picture_is_a_png_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    for name, trials in (("some.png", TRIALS), ("none.png", []), ("failed.png", [TRIALS[3]])):
        save_front_picture(trials, tmp_path / name, chosen=1)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))
