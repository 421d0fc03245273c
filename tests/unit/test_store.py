"""The lock of a fingerprint between real processes, and whether the DVC that started one is still there."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from pipeline import store
from pipeline.errors import TrainingError
from pipeline.parents import DIED_BEFORE, KnownProcess, find_starter, this_process
from tests.conftest import ROOT

# stands for dvc: runs its arguments as a stage's command, and waits
DVC = "import os, subprocess, sys; subprocess.run(sys.argv[1:], env=os.environ | {'DVC_STAGE': 'train'})"
WATCH = """
import os, sys, time
from pathlib import Path
from pipeline.parents import find_starter
while not Path("look").exists():
    time.sleep(0.01)
starter = find_starter()
print("found", starter and starter.pid, os.getpid(), flush=True)
while not Path("end").exists():
    time.sleep(0.01)
print("gone" if starter and starter.gone() else "there", flush=True)
"""
HOLD = """
import os, sys, time
from pipeline import store
from pipeline.parents import find_starter
with store.locked("key"):
    print("in", os.getpid(), flush=True)
    starter = find_starter()
    while "stubborn" in sys.argv or not (starter and starter.gone()):
        time.sleep(0.01)
    print("out", os.getpid(), flush=True)
"""
WAIT = """
import os, time
from pathlib import Path
from pipeline import store
from pipeline.errors import TrainingError
try:
    with store.locked("key"):
        print("in", os.getpid(), flush=True)
        while not Path("end").exists():
            time.sleep(0.01)
        print("out", os.getpid(), flush=True)
except TrainingError as error:
    print("refused", error, flush=True)
"""
Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start(script, *arguments, via="hand" | "dvc" | "shell"): a process whose output is `tmp_path / "log"`."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DVC_STAGE", raising=False)
    started: list[subprocess.Popen] = []

    def start(script: str, *arguments: str, via: str = "hand") -> subprocess.Popen:
        command = [sys.executable, "-c", script, *arguments]
        if via == "shell":  # one that stands between
            command = ["/bin/sh", "-c", '"$@"; true', "sh", *command]
        if via != "hand":
            command = [sys.executable, "-c", DVC, *command]
        with (tmp_path / "log").open("a") as log:
            started.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        for member in psutil.process_iter():
            try:
                if os.getsid(member.pid) == process.pid:
                    member.kill()
            except (psutil.NoSuchProcess, ProcessLookupError):
                pass
        process.wait(timeout=20)


def lines(folder: Path, number: int, containing: str = "") -> list[str]:
    """The log, once it has so many lines, and the text."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        text = (folder / "log").read_text()
        if text.count("\n") >= number and containing in text:
            return text.splitlines()
        time.sleep(0.01)
    raise AssertionError(f"{number} lines expected, and {containing!r}: {text}")


def write_owner(folder: Path, owner: store.Owner) -> Path:
    lock = folder / ".training" / "key" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps(asdict(owner)))
    return lock


def owner(starter: KnownProcess | None = None, host: str = socket.gethostname()) -> store.Owner:
    return store.Owner(this_process(), starter, host, "2026-11-22 10:00:00 +0000")


def test_a_process_is_known_by_more_than_its_number(start: Start) -> None:
    me = this_process()
    assert not me.gone()
    assert KnownProcess(me.pid, me.created - 60).gone()
    assert DIED_BEFORE.gone()
    child = start("import time; time.sleep(60)")
    known = KnownProcess.of(psutil.Process(child.pid))
    assert not known.gone()
    child.kill()
    deadline = time.monotonic() + 20
    while not known.gone() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    assert known.gone()
    child.wait()
    assert known.gone()


@pytest.mark.parametrize("via", ["dvc", "shell"])
@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGKILL])
def test_the_death_of_the_starter_is_seen(start: Start, tmp_path: Path, via: str, number: int | None) -> None:
    dvc = start(WATCH, via=via)
    (tmp_path / "look").touch()
    assert lines(tmp_path, 1)[0].startswith(f"found {dvc.pid} ")
    if number is not None:
        dvc.send_signal(number)
        dvc.wait(timeout=20)
    (tmp_path / "end").touch()
    assert lines(tmp_path, 2)[1] == ("there" if number is None else "gone")


def test_a_starter_that_dies_before_anybody_looks_is_gone(start: Start, tmp_path: Path) -> None:
    dvc = start(WATCH, via="shell")
    deadline = time.monotonic() + 20
    while not psutil.Process(dvc.pid).children() and time.monotonic() < deadline:
        time.sleep(0.01)
    dvc.kill()
    dvc.wait(timeout=20)
    for name in ("look", "end"):
        (tmp_path / name).touch()
    assert lines(tmp_path, 2)[0].startswith(f"found {DIED_BEFORE.pid} ")
    assert lines(tmp_path, 2)[1] == "gone"


def test_one_started_by_hand_outlives_its_shell(start: Start, tmp_path: Path) -> None:
    shell = start("import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])", WATCH)
    (tmp_path / "look").touch()
    assert lines(tmp_path, 1)[0].startswith("found None ")
    shell.kill()
    shell.wait(timeout=20)
    (tmp_path / "end").touch()
    assert lines(tmp_path, 2)[1] == "there"
    assert find_starter() is None


@pytest.mark.parametrize("content", ["", '{"process": {"pi', "4711", "[]", "null", '{"process": 3}', "\x00\xff"])
def test_a_lock_that_nobody_holds_is_free_whatever_it_says(start: Start, tmp_path: Path, content: str) -> None:
    lock = write_owner(tmp_path, owner())
    for text in (content, lock.read_text()):  # the second: of a live process, which does not hold it
        lock.write_bytes(text.encode("latin-1"))
        with store.locked("key"):
            assert json.loads(lock.read_text())["process"] == asdict(this_process())
            assert json.loads(lock.read_text())["starter"] is None


@pytest.mark.parametrize("via", ["hand", "dvc"])
def test_a_holder_in_good_order_is_not_waited_for(start: Start, tmp_path: Path, via: str) -> None:
    holder = start(HOLD, via=via)
    pid = lines(tmp_path, 1)[0].split()[1]
    began = time.monotonic()
    with (
        pytest.raises(TrainingError, match=rf"process {pid} \(since 20.*\) is training exactly this"),
        store.locked("key"),
    ):
        pass
    assert time.monotonic() - began < store.SIGNING_SECONDS
    os.kill(int(pid), signal.SIGKILL)
    holder.wait(timeout=20)
    with store.locked("key"):
        pass


@pytest.mark.parametrize("via", ["dvc", "shell"])
def test_an_orphan_is_waited_for(start: Start, tmp_path: Path, via: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    dvc = start(HOLD, "stubborn", via=via)
    pid = int(lines(tmp_path, 1)[0].split()[1])
    dvc.kill()
    dvc.wait(timeout=20)
    began = time.monotonic()
    with (
        pytest.raises(TrainingError, match=rf"process {pid} .* not stopped by itself in 1 s: end it with `kill {pid}`"),
        store.locked("key", 1),
    ):
        pass
    assert 1 <= time.monotonic() - began < 5
    began = time.monotonic()
    threading.Timer(1, os.kill, (pid, signal.SIGTERM)).start()
    with store.locked("key", 20):
        assert time.monotonic() - began > 0.9
    assert caplog.text.count(f"process {pid} (since") == 2


def test_of_two_that_wait_for_an_orphan_one_gets_it(start: Start, tmp_path: Path) -> None:
    dvc = start(HOLD, "stubborn", via="dvc")
    pid = int(lines(tmp_path, 1)[0].split()[1])
    dvc.kill()
    dvc.wait(timeout=20)
    waiting = [start(WAIT), start(WAIT)]
    time.sleep(1.5)
    os.kill(pid, signal.SIGKILL)
    _, entered, refused = lines(tmp_path, 3)
    winner = entered.removeprefix("in ")
    assert f"refused process {winner} (since" in refused
    (tmp_path / "end").touch()
    assert [process.wait(timeout=30) for process in waiting] == [0, 0]
    assert lines(tmp_path, 4)[3:] == [f"out {winner}"]


def test_whoever_waits_stops_when_its_own_starter_dies(start: Start, tmp_path: Path) -> None:
    first = start(HOLD, "stubborn", via="dvc")
    lines(tmp_path, 1)
    first.kill()
    first.wait(timeout=20)
    second = start(WAIT, via="dvc")
    time.sleep(1.5)
    second.kill()
    second.wait(timeout=20)
    assert lines(tmp_path, 3, containing="Interrupted: the dvc that started this was killed.\n")


DEAD = json.dumps(asdict(store.Owner(DIED_BEFORE, None, socket.gethostname(), "2026-11-22 10:00:00 +0000")))


@pytest.mark.parametrize("content", ["", '{"process": {"pi', DEAD], ids=["empty", "torn", "of the one before"])
def test_a_holder_that_never_signs_is_not_waited_for_long(start: Start, tmp_path: Path, content: str) -> None:
    lock = write_owner(tmp_path, owner())
    lock.write_text(content)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(TrainingError, match="another process is training exactly this"), store.locked("key"):
            pass
        assert time.monotonic() - began < store.SIGNING_SECONDS + 2


def test_the_starter_of_a_holder_on_another_machine_is_not_looked_for(start: Start, tmp_path: Path) -> None:
    lock = write_owner(tmp_path, owner(DIED_BEFORE, host="elsewhere"))
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (
            pytest.raises(TrainingError, match=rf"process {os.getpid()} on elsewhere \(since"),
            store.locked("key", 0.5),
        ):
            pass  # fmt: skip


def test_a_starter_whose_number_another_process_has_now_is_dead(start: Start, tmp_path: Path) -> None:
    me = this_process()
    lock = write_owner(tmp_path, owner(KnownProcess(me.pid, me.created - 3600)))
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match="has not stopped by itself"), store.locked("key", 0.5):
            pass
        write_owner(tmp_path, owner(me))
        with (
            pytest.raises(TrainingError, match=r"is training exactly this .* Wait, or end it"),
            store.locked("key", 0.5),
        ):
            pass  # fmt: skip
