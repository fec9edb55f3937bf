"""A run that hangs ends within a bound, and names who hung, where; a run that is slow but moves goes on."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed import HashStore

from mtl_dist import results
from mtl_dist.data import batch_loader
from mtl_dist.engine.world import World
from mtl_dist.figures import run_figures
from mtl_dist.hangs import watch as watching
from mtl_dist.hangs.ranks import Failure, Pulse, Ranks, culprits, reason_of_hang
from mtl_dist.hangs.watch import HangWatch
from mtl_dist.heartbeat import Beat, beat, getting_on, last_beat
from mtl_dist.launch import local
from mtl_dist.status import Status, read_status, write_status
from mtl_dist.stopping import StopSignal
from mtl_dist.tasks.user_metrics import AllMetrics
from tests.ranks import RankFailure, RankPool
from tests.tiny_runs import train_run

# The watch's thread ends by what stands in for the end of the process.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The exit codes with which the watch wanted to end this process."""
    codes: list[int] = []

    def exit(code: int) -> None:
        codes.append(code)
        raise SystemExit  # ends the watch's thread only

    monkeypatch.setattr(watching.os, "_exit", exit)
    yield codes


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Signals are heard though the tests were started by nohup or in a shell's background."""
    defaults = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_for(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------- one rank
def test_a_main_thread_without_a_beat_ends_the_process_and_says_where(
    exits: list[int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_status(tmp_path, Status("running", step=7))
    with HangWatch(ALONE, 0.3, StopSignal()) as watch:
        watch.directory = tmp_path
        beat("the forward", 8)
        wait_for(lambda: exits)
    assert exits == [1]
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.retry) == ("failed", 7, True)
    assert status.reason.startswith("hang: it stayed in the forward, step 8 at test_hangs.py:")
    assert status.reason.endswith("no progress in 0.3 s, so the run was ended")
    assert "wait_for" in (tmp_path / "hang" / "rank_0.txt").read_text()
    assert status.reason in (tmp_path / "log.txt").read_text()
    assert status.reason in capfd.readouterr().err


def test_beats_keep_a_run_alive_and_what_may_be_slow_has_longer(exits: list[int]) -> None:
    with HangWatch(ALONE, 0.4, StopSignal()):
        for _ in range(10):
            beat("the forward")
            time.sleep(0.1)
        beat("saving", slow=True)
        time.sleep(1.2)
        assert exits == []
    with HangWatch(ALONE, 0.4, StopSignal(), compiling=True):
        beat("the forward")
        time.sleep(1.2)
    with HangWatch(ALONE, None, StopSignal()):
        beat("the forward")
        time.sleep(0.6)
    assert exits == []


def test_a_rank_that_gets_on_alone_is_alive_and_counts_as_the_others_do(exits: list[int]) -> None:
    with HangWatch(ALONE, 0.4, StopSignal()):
        beat("writing the results")
        before = last_beat()
        for _ in range(10):
            getting_on()
            time.sleep(0.1)
    assert exits == []
    assert last_beat() == before


def test_each_figure_and_the_metrics_of_each_task_are_progress(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Beat] = []
    calls: list[str] = []

    def watched(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            assert last_beat().slow, name
            assert all(last_beat() is not earlier for earlier in seen), name
            seen.append(last_beat())
            calls.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(results, "draw_confusion", watched("figure", lambda *arguments: None))
    monkeypatch.setattr(results, "intervals", watched("intervals", results.intervals))
    monkeypatch.setattr(run_figures, "draw_learning_curves", watched("curves", lambda *arguments: None))
    monkeypatch.setattr(AllMetrics, "compute", watched("metrics", AllMetrics.compute))
    overrides = ["train.epochs=1", "train.evaluate_at_end=true", "tracking=[]"]
    assert train_run(recipe, tmp_path / "run", overrides) == "done"
    assert {"figure", "intervals", "curves", "metrics"} == set(calls)


def test_a_process_that_was_suspended_as_a_whole_does_not_hang(
    exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])
    with HangWatch(ALONE, 1.0, StopSignal()):
        beat("the forward")
        time.sleep(0.4)
        clock[0] += 3600  # Ctrl-Z, and an hour later fg
        time.sleep(0.4)
    assert exits == []


def test_what_hangs_while_it_is_said_has_a_bound(
    exits: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead file system: nothing that is written returns."""
    monkeypatch.setattr(watching, "_TELL_S", 0.2)
    monkeypatch.setattr(watching, "write_down", lambda *args: time.sleep(30))
    with HangWatch(ALONE, 0.2, StopSignal()) as watch:
        watch.directory = tmp_path
        beat("saving", 3)
        wait_for(lambda: exits)
    assert exits == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_asked_to_stop_a_run_that_hangs_ends_sooner(
    exits: list[int], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(watching, "STOP_PATIENCE_S", 0.3)
    monkeypatch.setattr(watching, "_TICK_S", 0.1)
    stop = StopSignal()
    stop.install()
    try:
        with HangWatch(ALONE, 600, stop):
            beat("the forward")
            time.sleep(0.5)
            assert exits == []
            os.kill(os.getpid(), number)
            wait_for(lambda: exits)
    finally:
        stop.restore()
    assert exits == [1]


def test_a_second_interrupt_ends_what_cannot_handle_it(
    exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a call that does not return no handler runs; the watch hears the signals all the same."""
    monkeypatch.setattr(watching, "ABORT_PATIENCE_S", 0.2)
    monkeypatch.setattr(watching, "_TICK_S", 0.1)
    stop = StopSignal()
    stop.install()
    try:
        with HangWatch(ALONE, 600, stop):
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: exits)
    finally:
        stop.restore()
    assert exits == [130]


def test_a_second_interrupt_is_the_cause_of_what_breaks_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopSignal, "aborting", property(lambda stop: True))
    with HangWatch(ALONE, None, StopSignal()) as watch:
        cause = watch.first_cause(RuntimeError("Connection closed by peer"))
    assert (cause.rank, cause.reason) == (0, "a second Ctrl-C, which ends it at once")


def test_a_signal_is_heard_though_no_handler_runs() -> None:
    stop = StopSignal()
    stop.install()
    heard: list[bool] = []
    try:
        blocker = threading.Thread(target=lambda: (time.sleep(0.3), heard.append(stop.heard)))
        blocker.start()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        blocker.join()
    finally:
        stop.restore()
    assert heard == [True]


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    stop.install()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)


AT_A_TERMINAL = """
import sys, time
from pathlib import Path
from mtl_dist.stopping import StopSignal
from mtl_dist.tracking.tracker import Tracker

stop, tracker = StopSignal(), Tracker(Path(sys.argv[1]))
stop.install()
tracker.say("begun")
while not stop.requested:
    time.sleep(0.02)
for _ in range(3):
    print("saving", flush=True)
    tracker.say("saving")
Path(sys.argv[1], "saved").write_text(stop.reason)
"""


def test_a_closed_terminal_asks_to_stop_and_is_not_written_to(tmp_path: Path) -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", AT_A_TERMINAL, str(tmp_path)])
    assert b"begun" in os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "saved").read_text() == "signal SIGHUP"


# ---------------------------------------------------------------- the launcher
@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_under_nohup_the_launcher_forwards_no_hangup(sleeper: subprocess.Popen[bytes]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with local.forwarding([sleeper]) as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)
    assert sleeper.poll() is None


@pytest.mark.parametrize(
    ("received", "stopped"), [([signal.SIGTERM], True), ([signal.SIGINT, signal.SIGINT], False)]
)
def test_the_launcher_kills_a_rank_that_cannot_end(
    monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes], received: list[int], stopped: bool
) -> None:
    """One that a signal has stopped; after a second Ctrl-C any."""
    monkeypatch.setattr(local, "_SECONDS_TO_ABORT", 0.1)
    monkeypatch.setattr(local, "_SECONDS_TO_LEAVE", 0.1)
    monkeypatch.setattr(local, "ranks_of", lambda agent: [psutil.Process(agent)])
    if stopped:
        sleeper.send_signal(signal.SIGSTOP)
    patience = local._Patience(received)
    patience.enforce([sleeper])
    assert sleeper.poll() is None
    time.sleep(0.15)
    patience.enforce([sleeper])
    assert sleeper.wait(timeout=20) == -signal.SIGKILL


# ---------------------------------------------------------------- who it was
PULSE = Pulse(reports=5, turn=40, where="the backward, step 9", host="n1", pid=10)


def test_the_silent_rank_is_the_culprit_or_else_the_one_behind() -> None:
    pulses = {0: PULSE, 1: replace(PULSE, host="n2", turn=39, where="the forward, step 9")}
    assert culprits(pulses, ()) == [1]
    assert culprits(pulses, {0}) == [0]
    assert culprits({0: PULSE, 1: PULSE}, ()) == [0, 1]
    behind = reason_of_hang(pulses, (), "5 min")
    assert behind.startswith(
        "hang: rank 1 (n2, process 10) stayed in the forward, step 9; no progress in 5 min"
    )
    silent = reason_of_hang(pulses, {0}, "5 min")
    assert "rank 0 (n1, process 10) did not answer in the backward, step 9: stopped, or its" in silent
    assert "all ranks stayed in the backward" in reason_of_hang({0: PULSE, 1: PULSE}, (), "5 min")
    waiting = replace(PULSE, turn=3, where="waiting for data, step 9", waits_for="data worker 1 (process 12)")
    assert "rank 1 (n1, process 10) got no data from data worker 1 (process 12)" in reason_of_hang(
        {0: PULSE, 1: waiting}, (), "5 min"
    )


def test_the_line_is_the_users_own() -> None:
    stack = '  File "/x/site-packages/torch/nn/m.py", line 3, in f\n  File "/me/loss.py", line 12, in g\n'
    library = '  File "/usr/lib/python3.11/threading.py", line 9, in wait\n'
    assert replace(PULSE, stack=stack + library).line == "loss.py:12"


def two_ranks() -> tuple[Ranks, Ranks]:
    store = HashStore()
    return Ranks(0, 2, store, "mtl"), Ranks(1, 2, store, "mtl")


def test_the_first_failure_counts_and_not_its_echo() -> None:
    survivor, culprit = two_ranks()
    first = culprit.first_failure(Failure(1, "ValueError: in my own loss"))
    assert survivor.first_failure(Failure(0, "RuntimeError: Connection closed by peer")) == first
    assert first.rank == 1


def test_a_rank_that_ended_without_a_word_is_named() -> None:
    survivor, lost = two_ranks()
    lost.report(replace(PULSE, host="n2"))
    survivor.report(PULSE)
    found = survivor.lost_rank(0.1)
    assert found is not None
    assert found.rank == 1
    assert found.reason.startswith("rank 1 (n2, process 10) ended without a word in the backward, step 9")


def test_a_rank_that_says_why_it_failed_has_not_been_lost() -> None:
    survivor, culprit = two_ranks()
    for ranks in (survivor, culprit):
        ranks.report(PULSE)
    culprit.first_failure(Failure(1, "x: expected 1, found 2.", mistake=True))
    assert survivor.lost_rank(0.1) is None


def test_a_rank_that_never_meets_anothers_error_ends_as_well(
    exits: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collective does not break by itself where its neighbours are still there."""
    survivor, culprit = two_ranks()
    monkeypatch.setattr(survivor, "clone", lambda: survivor)
    monkeypatch.setattr(watching.Ranks, "of_group", lambda rank, size: survivor)
    write_status(tmp_path, Status("running", step=7))
    with HangWatch(replace(ALONE, size=2), 0.8, StopSignal()) as watch:
        watch.directory = tmp_path
        culprit.report_end(2)
        culprit.first_failure(Failure(1, "x: expected 1, found 2.", mistake=True))
        for _ in range(200):
            beat("the backward", 8)
            time.sleep(0.1)
            if exits:
                break
    assert exits == [2]
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.reason, status.retry) == ("failed", "x: expected 1, found 2.", False)


def test_who_fails_after_the_holder_of_the_store_speaks_to_nobody_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection to a store that is gone is tried for minutes: every line is made before."""
    survivor, lost = two_ranks()
    lines = [survivor, survivor]
    monkeypatch.setattr(survivor, "clone", lines.pop)
    monkeypatch.setattr(watching.Ranks, "of_group", lambda rank, size: survivor)
    with HangWatch(replace(ALONE, size=2), None, StopSignal()) as watch:
        error = ValueError("a loss of three numbers")
        assert watch.first_cause(error) == Failure(0, "ValueError: a loss of three numbers")
        lost.report_end(1)
        with pytest.raises(SystemExit):
            monkeypatch.setattr(watching.os, "_exit", lambda code: sys.exit(code))
            watch.follow(1)
    assert lines == []


# ---------------------------------------------------------------- data workers
WORKER = """
import os, signal, time
from mtl_dist.data.batch_loader import begin_worker
if os.fork() == 0:
    begin_worker(0)
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_data_worker_dies_with_its_rank() -> None:
    """It holds the rank's connections, which the other ranks wait for while they are open."""
    with subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        worker = psutil.Process(int(rank.stdout.readline()))
        rank.kill()
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def test_the_data_worker_that_is_late_is_named_with_what_it_does() -> None:
    workers = batch_loader.Workers(2)
    assert workers.late_with(3) == "data worker 1, which has not begun"
    sleeper = os.fork()
    if sleeper == 0:
        time.sleep(60)
        os._exit(0)
    try:
        workers._pids[0], workers._batches[0] = sleeper, 6
        os.kill(sleeper, signal.SIGSTOP)
        os.waitpid(sleeper, os.WUNTRACED)
        assert workers.late_with(6) == f"data worker 0 (process {sleeper}, which a signal has stopped)"
    finally:
        os.kill(sleeper, signal.SIGKILL)
        os.waitpid(sleeper, 0)
    assert workers.late_with(6) == f"data worker 0 (process {sleeper}, which is gone)"


# ---------------------------------------------------------------- two ranks
def train_with_a_sleeping_loss(recipe: Path, run: Path) -> None:
    from mtl_dist.tasks.number_losses import Mse

    if int(os.environ["RANK"]) == 1:
        Mse.numerators = lambda self, output, target: time.sleep(1000)  # type: ignore[assignment]
    train_run(recipe, run, ["train.hang_timeout=0.03", "tasks.value.loss={kind: mse}"])


def train_with_one_asleep_and_one_failing(recipe: Path, run: Path) -> None:
    from mtl_dist.tasks.number_losses import Mse

    def numerators(self: Mse, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if int(os.environ["RANK"]) == 0:
            time.sleep(1000)
        raise ValueError("in a loss of my own")

    Mse.numerators = numerators  # type: ignore[method-assign]
    try:
        train_run(recipe, run, ["tasks.value.loss={kind: mse}"])
    except ValueError:
        time.sleep(100)  # its connections stay open


@pytest.mark.slow
def test_an_error_of_one_rank_ends_one_that_waits_elsewhere(recipe: Path, tmp_path: Path) -> None:
    with RankPool(2) as pool, pytest.raises(RankFailure, match="rank 0: exit code 1"):
        pool.run(train_with_one_asleep_and_one_failing, recipe, tmp_path / "run")
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.reason) == ("failed", "ValueError: in a loss of my own")


@pytest.mark.slow
def test_a_loss_that_sleeps_on_one_rank_ends_all_and_is_named(recipe: Path, tmp_path: Path) -> None:
    with RankPool(2) as pool, pytest.raises(RankFailure, match="exit code 1"):
        pool.run(train_with_a_sleeping_loss, recipe, tmp_path / "run")
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status.reason.startswith("hang: rank 1 (")
    assert "stayed in the forward, step 1 at test_hangs.py:" in status.reason
