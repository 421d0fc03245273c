"""Shared results are made once, by one process, never half, and are not cleaned away under whoever uses them."""

import contextlib
import dataclasses
import fcntl
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TextIO

import pytest

from pipeline import store
from pipeline.config import compose_config
from pipeline.files import copy_folder, hash_once, hash_path
from pipeline.points import Point
from pipeline.shared_inputs import Inputs, SharedInputs
from pipeline.shared_results import RESULT, find_made, is_being_made, make_once, shared_kind
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def test_it_is_made_once_and_again_for_other_inputs(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text(str(len(made)))

    assert find_made("thing", {"a": 1}) is None
    first = make_once("thing", {"a": 1}, make)
    assert make_once("thing", {"a": 1}, make) == first == find_made("thing", {"a": 1})
    assert len(made) == 1
    assert shared_kind(first.parent) == "thing"
    assert make_once("thing", {"a": 2}, make) != first
    assert make_once("other", {"a": 1}, make) != first


def test_what_fails_half_way_is_made_again(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        make_once("thing", {}, fails)
    assert find_made("thing", {}) is None
    found = make_once("thing", {}, lambda folder: None)
    assert list(found.iterdir()) == []
    (found.parent / RESULT).unlink()  # as after a kill before the mark
    assert find_made("thing", {}) is None


def test_a_lost_content_is_not_believed_to_be_there(tmp_path: Path) -> None:
    found = make_once("thing", {}, lambda folder: None)
    found.rmdir()

    def fails(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        make_once("thing", {}, fails)
    assert find_made("thing", {}) is None
    assert list(make_once("thing", {}, lambda folder: None).iterdir()) == []


def _slowly(folder: Path) -> None:
    (folder / f"{multiprocessing.current_process().pid}").write_text("")
    time.sleep(0.5)


def _want(_: int) -> list[str]:
    return [path.name for path in make_once("thing", {}, _slowly).iterdir()]


def _is_being_made(_: int) -> bool:
    return is_being_made("thing", {})


def test_another_process_sees_that_it_is_being_made_and_then_that_it_is_there(tmp_path: Path) -> None:
    assert not is_being_made("thing", {})
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seen: list[bool] = []
        with contextlib.ExitStack() as held:
            make_once("thing", {}, lambda folder: seen.append(pool.map(_is_being_made, [0])[0]), held)
            seen += pool.map(_is_being_made, [0])  # held is not being made
    assert seen == [True, False]


def test_processes_at_once_wait_for_the_one_that_makes_it(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.map(_want, range(3), chunksize=1)
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 1


def _lock_as_on_nfs(both_share: multiprocessing.synchronize.Barrier) -> None:
    """There flock is made of fcntl's locks, which keep the shared one while they wait for the exclusive one."""
    met: list[bool] = []

    def flock(file: TextIO, operation: int) -> None:
        fcntl.lockf(file, operation)
        if operation & fcntl.LOCK_SH and not met:
            met.append(True)
            both_share.wait(timeout=60)

    setattr(fcntl, "flock", flock)  # noqa: B010


def test_two_processes_that_share_a_lock_on_nfs_do_not_wait_for_ever(tmp_path: Path) -> None:
    """On this machine's disk the kernel would see it: `OSError: Resource deadlock avoided`; on NFS nobody does."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn, _lock_as_on_nfs, (spawn.Barrier(2),)) as pool:
        found = list(pool.map(_want, range(2), timeout=120))
    assert found[0] == found[1]
    assert len(found[0]) == 1


USE = """
import contextlib, sys, time
from pipeline.shared_results import make_once
with contextlib.ExitStack() as held:
    print(make_once("thing", {}, lambda folder: None, held if sys.argv[1] == "held" else None), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("way", ["held", "made only"])
def test_what_a_living_process_uses_is_not_cleaned(way: str, capsys: pytest.CaptureFixture) -> None:
    """The control: a process that has made it and does not hold it."""
    user = subprocess.Popen([sys.executable, "-c", USE, way], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert user.stdout is not None
        content = Path(user.stdout.readline().strip())
        assert content.is_dir()
        assert store.main(["clean", "--yes"]) == 0
        said = capsys.readouterr().out
        assert content.exists() is (way == "held")
        assert said.startswith("kept " if way == "held" else "removed ")
        assert ("locked by another process" in said) is (way == "held")
        began = time.monotonic()
        assert make_once("thing", {}, lambda folder: None) == content  # a second user waits for nobody
        assert time.monotonic() - began < 5
        os.kill(user.pid, signal.SIGKILL)
        user.wait(timeout=20)
        assert store.main(["clean", "--yes"]) == 0
        assert not content.exists()
    finally:
        user.kill()
        user.communicate()


def test_the_inputs_of_a_sweep_are_held_until_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr("pipeline.shared_inputs.subprocess.run", lambda *arguments, **options: done)
    overrides = ["data.max_rows=7", "quantization.double_quant=false"]  # neither is the project's own
    settings = dataclasses.asdict(compose_config(overrides))
    shared = SharedInputs()
    inputs = shared.of([Point(tmp_path / "000", 0, overrides, {}, "", settings)])[0]
    assert isinstance(inputs, Inputs)
    entries = [inputs.processed.parents[2], inputs.quantized.parents[2]]
    assert [line.split()[0] for line in store.clean(False, 0, True)] == ["kept", "kept", "freed"]
    assert all(find_result(entry) for entry in entries)
    shared.close()
    assert [line.split()[0] for line in store.clean(False, 0, True)] == ["removed", "removed", "freed"]
    assert not any(find_result(entry) for entry in entries)


def find_result(entry: Path) -> bool:
    return (entry / RESULT).exists() and (entry / "content").is_dir()


def test_what_is_cleaned_between_the_two_locks_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as it is made its lock is let go for a moment; here cleaning comes exactly then, once."""
    cleaned: list[str] = []
    made: list[Path] = []

    def flock(file: object, operation: int) -> None:
        if made and not cleaned and operation & fcntl.LOCK_SH:
            before(file, fcntl.LOCK_UN)
            cleaned.extend(store.clean(False, 0, True))
        before(file, operation)

    before = fcntl.flock
    monkeypatch.setattr("pipeline.shared_results.fcntl.flock", flock)
    with contextlib.ExitStack() as held:
        content = make_once("thing", {}, made.append, held)
        assert content.is_dir()
    assert cleaned[0].startswith("removed")
    assert len(made) == 2


def test_a_remembered_hash_follows_a_change(tmp_path: Path) -> None:
    file = tmp_path / "folder/file"
    file.parent.mkdir()
    file.write_text("one")
    before = hash_once(file.parent)
    assert before == hash_path(file.parent) == hash_once(file.parent)
    file.write_text("two!")
    assert hash_once(file.parent) == hash_path(file.parent) != before


def test_a_linked_copy_is_the_same_file_and_a_plain_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "a/sub").mkdir(parents=True)
    (tmp_path / "a/sub/file").write_text("x")
    for link in (True, False):
        copy_folder(tmp_path / "a", tmp_path / "b", link)
        assert (tmp_path / "b/sub/file").samefile(tmp_path / "a/sub/file") is link
