"""Shared results are made once, by one process, and never half."""

import multiprocessing
import time
from pathlib import Path

import pytest

from pipeline.files import copy_folder, hash_once, hash_path
from pipeline.shared_results import RESULT, find_made, make_once, shared_kind


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


def test_processes_at_once_wait_for_the_one_that_makes_it(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.map(_want, range(3), chunksize=1)
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 1


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
