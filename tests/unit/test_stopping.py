"""A stop is asked for by flag only, in the process that installed it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from mtl_dist.stopping import StopSignal


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    stop = StopSignal()
    stop.install()
    yield stop
    stop.restore()


def test_nothing_is_requested_before_a_signal(stop: StopSignal) -> None:
    assert not stop.requested
    assert stop.reason == ""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_names_itself(stop: StopSignal, number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    assert stop.requested
    assert stop.reason == f"signal {number.name}"


def test_signals_that_come_twice_change_nothing(stop: StopSignal) -> None:
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert stop.reason == "signal SIGUSR2"


def test_a_second_interrupt_ends_the_program(stop: StopSignal) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_first_interrupt_after_another_signal_does_not_end_the_program(stop: StopSignal) -> None:
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_forked_worker_neither_stops_nor_dies_of_the_signal(stop: StopSignal) -> None:
    worker = os.fork()
    if worker == 0:
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        os._exit(1 if stop.requested else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
    assert not stop.requested


def test_the_deadline_is_a_request_from_the_margin_on() -> None:
    now = 0.0
    stop = StopSignal(deadline=100.0, margin_s=30.0, clock=lambda: now)
    now = 69.9
    assert not stop.requested
    now = 70.0
    assert stop.requested
    assert stop.reason == "time limit"


def test_a_signal_shortly_before_the_deadline_is_the_time_limit(stop: StopSignal) -> None:
    stop.deadline = 0.0
    os.kill(os.getpid(), signal.SIGUSR2)
    assert stop.reason == "time limit"


def test_restoring_brings_the_earlier_handlers_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)]
    stop = StopSignal()
    stop.install()
    stop.install()
    stop.restore()
    assert [signal.getsignal(n) for n in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)] == before


def test_a_late_signal_meets_no_earlier_handler_where_the_process_only_has_to_end() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    outer = StopSignal()
    outer.install()
    outer.ignore_afterwards()
    outer.install()
    outer.restore()
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert heard == []
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        signal.signal(signal.SIGUSR2, before)


def test_batches_come_until_a_stop_is_asked_for() -> None:
    import torch

    from mtl_dist.engine.world import World
    from mtl_dist.stopping import StopAsked, until_stopped

    now = [0.0]
    stop = StopSignal(deadline=100.0, margin_s=10.0, clock=lambda: now[0])
    batches = until_stopped(range(3), stop, World(0, 1, 0, torch.device("cpu")))
    assert next(batches) == 0
    now[0] = 95.0
    with pytest.raises(StopAsked, match="time limit"):
        next(batches)
