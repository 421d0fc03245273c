"""The lock of a fingerprint between real processes, and whether the DVC that started one is still there."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest
import torch

import stages.train
from pipeline import store
from pipeline.checkpoints import Checkpoint, Checkpoints
from pipeline.config import compose_config
from pipeline.errors import TrainingError
from pipeline.files import write_text
from pipeline.parents import DIED_BEFORE, KnownProcess, find_starter, this_process
from pipeline.workspace import PROCESSED, QUANTIZED, Workspace
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


def watch_fsync(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is flushed from here on, by the name that it has then, in order."""
    flushed: list[Path] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    return flushed


def test_the_adapter_is_on_the_disk_before_it_is_marked_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = store.new_adapter_folder(tmp_path)
    (adapter / "more").mkdir()
    files = [adapter / "adapter_config.json", adapter / "more" / "adapter_model.safetensors"]
    for file in files:
        file.write_text("{}")
    flushed = watch_fsync(monkeypatch)
    store.finish(tmp_path, {"metrics": {}})
    *before, mark, folder = flushed
    assert set(before) == {*files, adapter / "more", adapter}
    assert (mark.parent, folder) == (tmp_path, tmp_path)
    assert mark.name.startswith(".result.json.")
    assert store.finished(tmp_path) is not None


def test_a_training_killed_before_its_checkpoints_were_removed_loses_them_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage itself, with a stand-in for the training and none for the store."""
    workspace = Workspace(tmp_path, tmp_path / "out")
    for split in ("train", "validation"):
        write_text(tmp_path / PROCESSED / f"{split}.arrow", split)
    (tmp_path / QUANTIZED).mkdir(parents=True)
    num_trainings = 0

    def finetune(config, processed, quantized, target: Path, checkpoints: Checkpoints, *_) -> tuple[dict, list]:
        nonlocal num_trainings
        num_trainings += 1
        (target / "adapter_config.json").write_text("{}")
        checkpoints.save(Checkpoint(1, {"w": torch.zeros(1)}, {}, {}))
        return {}, []

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for module in ("stages.train", "pipeline.stored_training"):
        monkeypatch.setattr(f"{module}.tracking", MagicMock())
    monkeypatch.setattr("pipeline.stored_training.check_provenance", lambda *args: None)
    monkeypatch.setattr("stages.train.check_fit", lambda *args: None)
    monkeypatch.setattr("stages.train.plot_training_curves", lambda *args: None)
    monkeypatch.setattr("pipeline.finetuning.finetune", finetune)
    config = compose_config(["train.method=lora"])

    with monkeypatch.context() as killed:
        killed.setattr("pipeline.stored_training._write", MagicMock(side_effect=SystemExit))
        with pytest.raises(SystemExit):
            stages.train.run(config, workspace)
    assert list(tmp_path.glob(".training/*/result.json"))
    assert list(tmp_path.glob(".training/*/checkpoints/checkpoint-*"))
    stages.train.run(config, workspace)
    assert num_trainings == 1
    assert list(tmp_path.glob(".training/*/adapter"))
    assert not list(tmp_path.glob(".training/*/checkpoints"))


OLD, NEW, DONE, HELD = (digit * 64 for digit in "abcd")


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], set[str]]]:
    """Three entries of ten days, one of today, and tracking's outbox; the function says which hold something yet."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    root = tmp_path / ".training"
    for name in (OLD, NEW, DONE, HELD, "outbox"):
        (root / name / "checkpoints").mkdir(parents=True)
        (root / name / "checkpoints" / "tensors").write_bytes(bytes(3_000_000))
        (root / name / "lock").touch()
    (root / DONE / "result.json").write_text("{}")
    with (root / HELD / "lock").open("r+") as file:  # one descriptor's lock shuts out another's, in one process too
        file.write(json.dumps(asdict(owner())))
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        for path in root.rglob("*"):
            if NEW not in path.parts:
                os.utime(path, (time.time() - 10 * 86400,) * 2)
        yield lambda: {folder.name for folder in root.iterdir() if any(p.name != "lock" for p in folder.iterdir())}


def test_the_list_says_what_is_there(entries, capsys: pytest.CaptureFixture) -> None:
    assert store.main(["list"]) == 0
    assert [re.split("  +", line) for line in capsys.readouterr().out.splitlines()] == [
        ["a" * 12, "training", "unfinished", "3.0 MB", "10.0 days", "not locked"],
        ["b" * 12, "training", "unfinished", "3.0 MB", "0.0 days", "not locked"],
        ["c" * 12, "training", "finished", "3.0 MB", "10.0 days", "not locked"],
        ["d" * 12, "training", "unfinished", "3.0 MB", "10.0 days", f"locked by {owner()}"],
    ]


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (["--unfinished", "--older-than", "7"], {OLD}),
        (["--unfinished"], {OLD, NEW}),
        (["--older-than", "9.5"], {OLD, DONE}),
        (["--older-than", "11"], set()),
        ([], {OLD, NEW, DONE}),
    ],
)
def test_what_a_living_process_has_locked_is_never_cleaned(
    entries, capsys: pytest.CaptureFixture, options: list[str], chosen: set[str]
) -> None:
    everything = {OLD, NEW, DONE, HELD, "outbox"}
    assert store.main(["clean", *options]) == 0
    assert f"would free {3 * len(chosen)}.0 MB; nothing was removed: give --yes" in capsys.readouterr().out
    assert entries() == everything
    assert store.main(["clean", *options, "--yes"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert total == f"freed {3 * len(chosen)}.0 MB"
    assert {line.split()[1] for line in lines if line.startswith("removed ")} == {name[:12] for name in chosen}
    assert all("locked by process" in line for line in lines if line.startswith("kept "))
    assert entries() == everything - chosen


def test_once_its_process_is_gone_it_is_cleaned(entries, start: Start, tmp_path: Path) -> None:
    holder = start(HOLD.replace('"key"', repr(OLD)))
    lines(tmp_path, 1)
    assert store.main(["clean", "--yes"]) == 0
    assert entries() == {OLD, HELD, "outbox"}
    holder.kill()
    holder.wait(timeout=20)
    assert store.main(["clean", "--yes"]) == 0
    assert entries() == {HELD, "outbox"}
    with store.locked(OLD) as folder:  # it is as if it had never been
        assert store.finished(folder) is None


@pytest.mark.parametrize("days", ["-1", "nan", "inf", "week"])
def test_a_wrong_number_of_days_is_refused(entries, capsys: pytest.CaptureFixture, days: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        store.main(["clean", f"--older-than={days}", "--yes"])
    assert f"'{days}' must be a number of days, 0 or more" in capsys.readouterr().err


def test_what_cannot_be_removed_is_said(entries, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refused)
    assert store.main(["clean", "--yes"]) == 1
    assert re.search(r"store: error: \S+/checkpoints: Permission denied\. Is it", capsys.readouterr().err)
