from __future__ import annotations

import pytest

from rlnas_fast.errors import MeterError
from rlnas_fast.hardware.identity import device_identity


def test_a_cpu_has_a_name_and_a_number_of_threads() -> None:
    identity = device_identity("cpu")
    assert identity["kind"] == "cpu"
    assert identity["name"]
    assert int(identity["cores"]) >= 1
    assert int(identity["threads"]) >= 1
    assert device_identity("cpu") == identity


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(MeterError, match="'tpu' is not known"):
        device_identity("tpu")
    with pytest.raises(MeterError, match="'cuda:97' cannot be used"):
        device_identity("cuda:97")


@pytest.mark.gpu
def test_a_gpu_is_identified_by_its_uuid() -> None:
    identity = device_identity("cuda:0")
    assert identity["kind"] == "cuda"
    assert len(identity["uuid"]) >= 32
