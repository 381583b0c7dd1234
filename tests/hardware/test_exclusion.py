from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

from rlnas_fast.hardware.exclusion import measuring, training


class Watch:
    """Counts who is on the device."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.trainings = 0
        self.steps = 0

    def train(self, stop: threading.Event) -> None:
        while not stop.is_set():
            with training("cpu") as let_measurements_through:
                for _ in range(50):
                    with self.lock:
                        self.trainings += 1
                        self.steps += 1
                    time.sleep(0.001)
                    with self.lock:
                        self.trainings -= 1
                    let_measurements_through()


def test_a_measurement_gets_its_turn_alone_while_two_train_all_the_time() -> None:
    watch = Watch()
    stop = threading.Event()
    trainers = [threading.Thread(target=watch.train, args=(stop,)) for _ in range(2)]
    for trainer in trainers:
        trainer.start()
    try:
        for _ in range(10):
            time.sleep(0.005)
            with measuring("cpu"):
                steps = watch.steps
                assert watch.trainings == 0
                time.sleep(0.005)
                assert watch.trainings == 0
                assert watch.steps == steps
    finally:
        stop.set()
        for trainer in trainers:
            trainer.join()
    assert watch.steps > 10


def test_trainings_share_a_device() -> None:
    with training("cpu"), training("cpu") as let_measurements_through:
        let_measurements_through()


def test_another_device_is_another_room() -> None:
    with training("cpu"):
        done = threading.Event()

        def measure() -> None:
            with measuring("another"):
                done.set()

        thread = threading.Thread(target=measure)
        thread.start()
        thread.join(timeout=30)
        assert done.is_set()


def test_measuring_in_the_middle_of_a_training_stands_its_own_training_back() -> None:
    with training("cpu"):
        with measuring("cpu"):
            pass
        entered = threading.Event()

        def measure() -> None:
            with measuring("cpu"):
                entered.set()

        thread = threading.Thread(target=measure)
        thread.start()
        assert not entered.wait(0.05)  # the training holds its place again
    thread.join(timeout=30)
    assert entered.is_set()


HOLD = """
import sys, time
from rlnas_fast.hardware.exclusion import measuring, training
with {how}("cpu"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_dead_hold_nothing() -> None:
    for how in ("measuring", "training"):
        command = [sys.executable, "-c", HOLD.format(how=how)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            process.send_signal(signal.SIGKILL)
            process.wait()
        with measuring("cpu"):
            pass
