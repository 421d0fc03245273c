"""Training results by fingerprint, under `.training/<fingerprint>/` of the project: outside DVC's outs and of git.

A result is complete when `result.json` stands there; it is written last. A lock keeps two
processes off one fingerprint.
"""

import contextlib
import fcntl
import json
import logging
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import Interrupted, TrainingError
from pipeline.files import hash_path, read_json, write_json
from pipeline.parents import KnownProcess, find_starter, this_process
from pipeline.workspace import project_root

logger = logging.getLogger(__name__)
RESULT = "result.json"
ORPHAN_SECONDS = 120.0  # a step and a checkpoint of a large model
SIGNING_SECONDS = 2.0  # between taking the lock and having written one's name into it
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Owner:
    """What the lock file says of the process that took the lock last.

    Attributes:
        starter: the DVC that runs it; None when it was started by hand.
        started: when it took the lock, for people.
    """

    process: KnownProcess
    starter: KnownProcess | None
    host: str
    started: str

    @property
    def here(self) -> bool:
        """Whether its processes can be looked at."""
        return self.host == socket.gethostname()

    @property
    def orphaned(self) -> bool:
        return self.here and self.starter is not None and self.starter.gone()

    def __str__(self) -> str:
        return f"process {self.process.pid}{'' if self.here else f' on {self.host}'} (since {self.started})"


def entry(fingerprint: str) -> Path:
    """The folder of this fingerprint's result."""
    return project_root() / ".training" / fingerprint


@contextlib.contextmanager
def locked(fingerprint: str, orphan_seconds: float = ORPHAN_SECONDS) -> Iterator[Path]:
    """Holds the entry while inside; the lock goes with the process, however it ends.

    A holder whose DVC is dead is waited for: it stops at its next step and leaves a checkpoint.

    Raises:
        TrainingError: another live process holds it, or an orphan did not let go in `orphan_seconds`.
        Interrupted: the DVC that started this process is dead.
    """
    folder = entry(fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    starter = find_starter()
    with (folder / "lock").open("a+", encoding="utf-8") as file:
        _acquire(file, folder, starter, orphan_seconds)
        owner = Owner(this_process(), starter, socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S %z"))
        file.truncate(0)
        file.write(json.dumps(asdict(owner)))
        file.flush()
        yield folder


def _acquire(file: TextIO, folder: Path, starter: KnownProcess | None, orphan_seconds: float) -> None:
    began = signed = time.monotonic()
    awaited = None
    while True:
        if starter is not None and starter.gone():
            raise Interrupted("the dvc that started this was killed.")
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner, now = _read_owner(file), time.monotonic()
        if owner is None or (owner.here and owner.process.gone()):  # the next one has it, and has not signed yet
            if now - signed > SIGNING_SECONDS:
                raise TrainingError(f"another process is training exactly this ({folder}). Wait, or end it.")
        elif not owner.orphaned:
            raise TrainingError(f"{owner} is training exactly this ({folder}). Wait, or end it.")
        elif now - began > orphan_seconds:
            raise TrainingError(
                f"{owner} is training exactly this ({folder}). The dvc that started it is dead, and it has not stopped "
                f"by itself in {orphan_seconds:.0f} s: end it with `kill {owner.process.pid}` (again, and it stops at "
                "once), then run this again."
            )
        else:
            signed = now
            if owner != awaited:
                logger.info("%s trains exactly this, and its dvc is dead: waiting for it to stop", owner)
                awaited = owner
        time.sleep(POLL_SECONDS)


def _read_owner(file: TextIO) -> Owner | None:
    """None: empty, torn, or of an older version."""
    try:
        file.seek(0)
        values = json.load(file)
        starter = values["starter"] and KnownProcess(**values["starter"])
        return Owner(KnownProcess(**values["process"]), starter, values["host"], values["started"])
    except (ValueError, TypeError, KeyError):
        return None


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
