"""What several trainings and evaluations share, made once: prepared data, a quantized base, a base's evaluation.

Each lies in `.training/shared/<key>/`, the key a hash of everything that it follows from. Whoever wants one that
another process is making waits for it; what a running sweep uses is not cleaned.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from pipeline.files import flush, read_json, write_json
from pipeline.workspace import project_root

logger = logging.getLogger(__name__)
RESULT = "result.json"


def make_once(
    kind: str, inputs: Mapping[str, Any], make: Callable[[Path], None], held: contextlib.ExitStack | None = None
) -> Path:
    """The folder of what follows from the inputs; made by `make` where it is not there yet.

    Args:
        kind: for people, such as `prepare`.
        inputs: JSON values: settings, hashes of files and code, versions.
        make: fills an empty folder; what it raises is raised here, and nothing is kept.
        held: until it is closed, or this process has ended, `pipeline.store clean` keeps the folder. None: as soon as
            this returns it may go.
    """
    folder = _folder(kind, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((folder / "lock").open("a+", encoding="utf-8"))
        while True:  # from one lock to the other there is a moment with none
            _acquire(lock, fcntl.LOCK_SH, kind)  # shared by all users; cleaning takes it alone
            os.utime(lock.fileno())  # in use: `pipeline.store clean --older-than` looks at it
            if _is_made(folder):
                break
            # on NFS the shared one would be kept while waiting: two processes would wait for each other for ever
            fcntl.flock(lock, fcntl.LOCK_UN)
            _acquire(lock, fcntl.LOCK_EX, kind)
            if not _is_made(folder):
                _make(folder, kind, inputs, make)
        if held is not None:
            held.push(stack.pop_all())
    return folder / "content"


def _acquire(lock: TextIO, operation: int, kind: str) -> None:
    try:
        fcntl.flock(lock, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("%s: another process is making or removing it: waiting", kind)
        fcntl.flock(lock, operation)


def _is_made(folder: Path) -> bool:
    return (folder / RESULT).exists() and (folder / "content").is_dir()


def _make(folder: Path, kind: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> None:
    (folder / RESULT).unlink(missing_ok=True)
    for leftover in folder.glob("content*"):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished = folder / f"content.{os.getpid()}"  # a killed one's child may still be writing into its own
    unfinished.mkdir()
    make(unfinished)
    flush(*(path for path in unfinished.rglob("*") if not path.is_symlink()), unfinished)
    unfinished.rename(folder / "content")
    write_json(folder / RESULT, {"kind": kind, "inputs": dict(inputs)})


def find_made(kind: str, inputs: Mapping[str, Any]) -> Path | None:
    """The folder that `make_once` would give without making it; None where it is not there."""
    folder = _folder(kind, inputs)
    return folder / "content" if _is_made(folder) else None


def is_being_made(kind: str, inputs: Mapping[str, Any]) -> bool:
    """Whether `make_once` would have to wait now, for a process that makes or removes it."""
    path = _folder(kind, inputs) / "lock"
    if not path.exists():
        return False
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _folder(kind: str, inputs: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps({"kind": kind, **inputs}, sort_keys=True).encode()).hexdigest()
    return project_root() / ".training" / "shared" / key


def shared_kind(folder: Path) -> str:
    """What kind of result an entry of `.training/shared` holds."""
    path = folder / RESULT
    return str(read_json(path)["kind"]) if path.exists() else "unfinished"
