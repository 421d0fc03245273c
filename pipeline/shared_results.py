"""What several trainings and evaluations share, made once: prepared data, a quantized base, a base's evaluation.

Each lies in `.training/shared/<key>/`, the key a hash of everything that it follows from. Whoever wants one that
another process is making waits for it.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.files import flush, read_json, write_json
from pipeline.workspace import project_root

logger = logging.getLogger(__name__)
RESULT = "result.json"


def make_once(kind: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder of what follows from the inputs; made by `make` where it is not there yet.

    Args:
        kind: for people, such as `prepare`.
        inputs: JSON values: settings, hashes of files and code, versions.
        make: fills an empty folder; what it raises is raised here, and nothing is kept.
    """
    folder = _folder(kind, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    content = folder / "content"
    with (folder / "lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process is making it: waiting", kind)
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(lock.fileno())  # in use: `pipeline.store clean --older-than` looks at it
        if (folder / RESULT).exists() and content.is_dir():
            return content
        (folder / RESULT).unlink(missing_ok=True)
        for leftover in folder.glob("content*"):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished = folder / f"content.{os.getpid()}"  # a killed one's child may still be writing into its own
        unfinished.mkdir()
        make(unfinished)
        flush(*(path for path in unfinished.rglob("*") if not path.is_symlink()), unfinished)
        unfinished.rename(content)
        write_json(folder / RESULT, {"kind": kind, "inputs": dict(inputs)})
    return content


def find_made(kind: str, inputs: Mapping[str, Any]) -> Path | None:
    """The folder that `make_once` would give without making it; None where it is not there."""
    folder = _folder(kind, inputs)
    return folder / "content" if (folder / RESULT).exists() and (folder / "content").is_dir() else None


def _folder(kind: str, inputs: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps({"kind": kind, **inputs}, sort_keys=True).encode()).hexdigest()
    return project_root() / ".training" / "shared" / key


def shared_kind(folder: Path) -> str:
    """What kind of result an entry of `.training/shared` holds."""
    path = folder / RESULT
    return str(read_json(path)["kind"]) if path.exists() else "unfinished"
