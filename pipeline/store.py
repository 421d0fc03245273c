"""Training results by fingerprint, under `.training/<fingerprint>/` of the project: outside DVC's outs and of git.

A result is complete when `result.json` stands there; it is written last. A lock keeps two
processes off one fingerprint.
"""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import TrainingError
from pipeline.files import hash_path, read_json, write_json
from pipeline.workspace import project_root

logger = logging.getLogger(__name__)
RESULT = "result.json"


def entry(fingerprint: str) -> Path:
    """The folder of this fingerprint's result."""
    return project_root() / ".training" / fingerprint


@contextlib.contextmanager
def locked(fingerprint: str) -> Iterator[Path]:
    """Holds the entry while inside; the lock goes with the process, however it ends.

    Raises:
        TrainingError: another live process holds it.
    """
    folder = entry(fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise TrainingError(
                f"process {file.read().strip() or '(unknown)'} is training exactly this ({folder}). Wait, or end it."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield folder


def finished(folder: Path) -> dict[str, Any] | None:
    """The entry's result, or None when there is none or its adapter is not what was stored (then it is said)."""
    if not (folder / RESULT).exists():
        return None
    result = read_json(folder / RESULT)
    if not (folder / "adapter").is_dir() or hash_path(folder / "adapter") != result["adapter_hash"]:
        logger.warning("%s: the stored adapter was altered or is incomplete; training again", folder)
        return None
    return result


def finish(folder: Path, result: dict[str, Any]) -> None:
    """Marks the entry complete; its adapter stands in `folder/adapter`."""
    write_json(folder / RESULT, {**result, "adapter_hash": hash_path(folder / "adapter")})


def new_adapter_folder(folder: Path) -> Path:
    """An empty folder for the adapter; leftovers of an unfinished training go."""
    (folder / RESULT).unlink(missing_ok=True)
    target = folder / "adapter"
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    return target
