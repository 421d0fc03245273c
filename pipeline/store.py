"""Training results by fingerprint, under `.training/<fingerprint>/` of the project: outside DVC's outs and of git.

A result is complete when `result.json` stands there; it is written last. A lock keeps two
processes off one fingerprint.

Commands: python -m pipeline.store list
          python -m pipeline.store clean [--unfinished] [--older-than DAYS] [--yes]
"""

import argparse
import contextlib
import fcntl
import json
import logging
import math
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import Interrupted, TrainingError
from pipeline.files import flush, hash_path, read_json, write_json
from pipeline.parents import KnownProcess, find_starter, this_process
from pipeline.shared_results import shared_kind
from pipeline.workspace import project_root

logger = logging.getLogger(__name__)
RESULT = "result.json"
FINGERPRINT = re.compile("[0-9a-f]{64}")
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
def locked(fingerprint: str, orphan_seconds: float = ORPHAN_SECONDS, wait: bool = False) -> Iterator[Path]:
    """Holds the entry while inside; the lock goes with the process, however it ends.

    A holder whose DVC is dead is waited for: it stops at its next step and leaves a checkpoint.

    Args:
        wait: for any other holder too, as long as it lives. Whoever waits for several asks in the order of their names.

    Raises:
        TrainingError: another live process holds it, or an orphan did not let go in `orphan_seconds`.
        Interrupted: the DVC that started this process is dead.
    """
    folder = entry(fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    starter = find_starter()
    with (folder / "lock").open("a+", encoding="utf-8") as file:
        _acquire(file, folder, starter, orphan_seconds, wait)
        owner = Owner(this_process(), starter, socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S %z"))
        file.truncate(0)
        file.write(json.dumps(asdict(owner)))
        file.flush()
        yield folder


def _acquire(file: TextIO, folder: Path, starter: KnownProcess | None, orphan_seconds: float, wait: bool) -> None:
    began = signed = time.monotonic()
    awaited = None
    while True:
        if starter is not None and starter.gone():
            raise Interrupted("the dvc that started this was killed.")
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner, now = _read_owner(file), time.monotonic()
        if wait:
            if owner is not None and owner != awaited:
                logger.info("%s trains exactly this: waiting for its result", owner)
                awaited = owner
        elif owner is None or (owner.here and owner.process.gone()):  # the next one has it, and has not signed yet
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


def is_finished(fingerprint: str) -> bool:
    """Whether it has a result, be it damaged: a quick look."""
    return (entry(fingerprint) / RESULT).exists()


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
    """Marks the entry complete; its adapter stands in `folder/adapter`, and is on the disk before the mark."""
    adapter = folder / "adapter"
    flush(*adapter.rglob("*"), adapter)
    write_json(folder / RESULT, {**result, "adapter_hash": hash_path(adapter)})
    flush(folder)


def new_adapter_folder(folder: Path) -> Path:
    """An empty folder for the adapter; leftovers of an unfinished training go."""
    (folder / RESULT).unlink(missing_ok=True)
    target = folder / "adapter"
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    return target


@dataclass(frozen=True)
class Entry:
    """Attributes:
    kind: training, or what of `pipeline.shared_results` it is.
    age_days: since something was written into it, or it was last locked.
    holder: the living process that has its lock, for people; None: nobody.
    """

    folder: Path
    kind: str
    is_finished: bool
    num_bytes: int
    age_days: float
    holder: str | None

    def __str__(self) -> str:
        state = "finished" if self.is_finished else "unfinished"
        lock = f"locked by {self.holder}" if self.holder else "not locked"
        size, age = f"{self.num_bytes / 1e6:.1f} MB", f"{self.age_days:.1f} days"
        return f"{self.folder.name[:12]}  {self.kind:<23}  {state:<10}  {size:>12}  {age:>11}  {lock}"


def entry_folders() -> list[Path]:
    """By name. One that holds nothing but its lock was cleaned, and is left out."""
    root = project_root() / ".training"
    folders = [lock.parent for pattern in ("*/lock", "shared/*/lock") for lock in root.glob(pattern)]
    return sorted(f for f in folders if FINGERPRINT.fullmatch(f.name) and any(p.name != "lock" for p in f.iterdir()))


@contextlib.contextmanager
def inspected(folder: Path) -> Iterator[Entry]:
    """The entry as it is; where nobody holds it, nobody takes it while inside."""
    with (folder / "lock").open("a+", encoding="utf-8") as file:
        holder = None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = str(_read_owner(file) or "another process")
        stats = []
        for parent, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # its holder may remove a checkpoint meanwhile
                    stats.append(Path(parent, name).lstat())
        age_days = (time.time() - max(stat.st_mtime for stat in stats)) / 86400
        kind = shared_kind(folder) if folder.parent.name == "shared" else "training"
        yield Entry(
            folder, kind, (folder / RESULT).exists(), sum(stat.st_size for stat in stats), max(age_days, 0.0), holder
        )


def clean(unfinished_only: bool, older_than_days: float, remove: bool) -> Iterator[str]:
    """Removes what nobody holds of the entries chosen, or (remove=False) only says what it would; a line an entry.

    The lock file stays: a process may be waiting for it.

    Raises:
        OSError: something cannot be removed.
    """
    num_bytes = 0
    for folder in entry_folders():
        with inspected(folder) as found:
            if (unfinished_only and found.is_finished) or found.age_days < older_than_days:
                continue
            if found.holder is not None:
                yield f"kept          {found}"
                continue
            if remove:
                (folder / RESULT).unlink(missing_ok=True)  # first: what is half removed is not finished
            for path in list(folder.iterdir()) if remove else ():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
            num_bytes += found.num_bytes
            yield f"{'removed' if remove else 'would remove'}  {found}"
    if remove:
        yield f"freed {num_bytes / 1e6:.1f} MB"
    else:
        yield f"would free {num_bytes / 1e6:.1f} MB; nothing was removed: give --yes to do it"


def _days(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of days, 0 or more")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.store", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="fingerprint, kind, state, size, days since its last use, and who has its lock")
    cleaning = commands.add_parser("clean", help="remove entries that no living process has locked, finished ones too")
    cleaning.add_argument("--unfinished", action="store_true", help="keep the finished ones")
    cleaning.add_argument("--older-than", type=_days, default=0.0, metavar="DAYS", help="keep what was used since")
    cleaning.add_argument("--yes", action="store_true", help="remove; without it, only say what would be freed")
    options = parser.parse_args(arguments)
    try:
        if options.command == "clean":
            for line in clean(options.unfinished, options.older_than, options.yes):
                print(line)
        else:
            for folder in entry_folders():
                with inspected(folder) as found:
                    print(found)
        return 0
    except OSError as error:
        print(
            f"store: error: {error.filename}: {error.strerror}. Is it another user's? Ask its owner, or change its "
            "permissions; the entries before it are done.",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
