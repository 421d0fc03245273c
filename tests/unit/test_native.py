"""Compiling C, and keeping what was compiled."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from pipeline import native


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "kernel.c"
    path.write_text("int answer(void) { return 10 * NUMBER; }\n")
    return path


@pytest.fixture
def compilations(tmp_path, monkeypatch) -> Path:
    """A line each time that the compiler was called, which is the real one."""
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho called >> {log}\nexec {shutil.which("cc") or "gcc"} "$@"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    log.touch()
    return log


def answer(source: Path, number: int) -> int:
    result: int = native.load_kernel(source, [f"-DNUMBER={number}"]).answer()
    return result


def count(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_a_kernel_is_compiled_once(source, compilations, tmp_path) -> None:
    assert [answer(source, 1), answer(source, 1)] == [10, 10]
    assert count(compilations) == 1
    (kept,) = (tmp_path / "cache/lora_pipeline").iterdir()
    assert kept.name.startswith("kernel-")


@pytest.mark.parametrize("change", ["source", "define", "compiler", "options", "system", "processor", "header"])
def test_what_decides_it_has_it_compiled_again(change: str, source, compilations, tmp_path, monkeypatch) -> None:
    answer(source, 1)
    number = 1
    if change == "source":
        source.write_text(source.read_text() + "int other;\n")
    if change == "define":
        number = 2
    if change == "compiler":
        os.utime(os.environ["CC"], (0, 0))
    if change == "options":
        monkeypatch.setenv("CC", os.environ["CC"] + " -g")
    if change == "system":
        monkeypatch.setattr(native.platform, "uname", lambda: ("Linux", "node", "6", "1", "another"))
    if change == "processor":
        monkeypatch.setattr(native, "CPUINFO", tmp_path / "cpuinfo")
        native.CPUINFO.write_text("processor : 0\nflags : fpu avx2\n")
    if change == "header":
        header = tmp_path / "native.h"
        header.write_text("// another\n")
        monkeypatch.setattr(native, "HEADER", header)
    assert answer(source, number) == 10 * number
    assert count(compilations) == 2


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.99])
def test_a_damaged_one_is_made_again(share: float, source, compilations, tmp_path, monkeypatch) -> None:
    """Loading half a library would kill the process."""
    answer(source, 1)
    (kept,) = (tmp_path / "cache/lora_pipeline").iterdir()
    damaged = tmp_path / "other/lora_pipeline" / kept.name
    damaged.parent.mkdir(parents=True)
    whole = kept.read_bytes()
    damaged.write_bytes(whole[: int(share * len(whole))])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert answer(source, 1) == 10
    assert count(compilations) == 2
    assert native._is_whole(damaged.read_bytes())


def test_a_user_without_a_home(source, compilations, monkeypatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(native.Path, "home", no_home)
    assert [answer(source, 1), answer(source, 1)] == [10, 10]
    assert count(compilations) == 2


@pytest.mark.parametrize(("is_cache", "times"), [(True, 2), (False, 1)])
def test_a_folder_whose_programs_may_not_run(
    is_cache: bool, times: int, source, compilations, monkeypatch, tmp_path
) -> None:
    """As on a home, or a folder for temporary files, that is mounted so: the other one will do."""
    load = native.ctypes.CDLL

    def refuse(path: str):
        if path.startswith(str(tmp_path / "cache")) is is_cache:
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(native.ctypes, "CDLL", refuse)
    assert [answer(source, 1), answer(source, 1)] == [10, 10]
    assert count(compilations) == times


def test_where_nothing_can_be_kept_it_works_all_the_same(source, compilations, tmp_path) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    assert [answer(source, 1), answer(source, 1)] == [10, 10]
    assert count(compilations) == 2


def test_what_does_not_compile_leaves_nothing(source, compilations, tmp_path) -> None:
    source.write_text("no C")
    with pytest.raises(native.CannotCompile, match="error"):
        answer(source, 1)
    assert not (tmp_path / "cache").exists()
