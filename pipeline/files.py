"""Files written whole or not at all, and read with errors that name them."""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import DataError


def write_text(path: Path, text: str) -> None:
    """Writes by a temporary file and a rename, so that a crash or a full disk leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(*paths: Path) -> None:
    """Waits until these files and folders are on the disk; a folder means its list of names, not what they hold."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def copy_folder(source: Path, target: Path, link: bool = False) -> None:
    """Replaces `target` by a copy of `source`.

    Args:
        link: the files stay the same files on the disk where it can do so: for what nobody changes in place.
    """
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, copy_function=_link if link else shutil.copy2)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def write_json(path: Path, value: Any) -> None:
    """Sorted keys, two spaces, a final newline: equal values give equal bytes. NaN is refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Raises: DataError: missing, or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Run the stage that makes it (`dvc repro`).") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error}). Remove it and run the stage that makes it again.") from None


def read_jsonl(path: Path) -> list[Any]:
    """Raises: DataError: missing, or a line is not JSON."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Run the stage that makes it (`dvc repro`).") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSONL ({error}). Remove it and make it again (`dvc repro`).") from None


def hash_file(path: Path) -> str:
    """SHA-256 of the content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_once(path: Path) -> str:
    """`hash_path`, remembered for as long as sizes and times of the files stay what they are."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(str(file), file.stat()) for file in files]
    return _hash_once(path.resolve(), tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@functools.cache
def _hash_once(path: Path, state: tuple[tuple[str, int, int], ...]) -> str:
    return hash_path(path)


def hash_path(path: Path) -> str:
    """SHA-256 of a file, or over names and contents of what a folder holds.

    Left out are dot files and `provenance.json`: how the folder came to be is not what it is.
    """
    if path.is_file():
        return hash_file(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix()
        if file.name != "provenance.json" and not any(part.startswith(".") for part in name.split("/")):
            digest.update(f"{name}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()
