"""Checkpoints of a training: written whole or not at all, verified when read.

A checkpoint is a folder `checkpoint-STEP` with `tensors.safetensors` (weights), `state.pt` (optimizer, random number
generators; read with weights_only) and `state.json` (numbers), and, written last, `complete.json` with a hash of each.
It is made under another name and renamed, so that a crash or a full disk leaves the ones before as they are.
"""

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.errors import DataError, TrainingError
from pipeline.files import flush, hash_file, read_json, write_json

logger = logging.getLogger(__name__)
MARKER = "complete.json"
FILES = ("tensors.safetensors", "state.pt", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """Attributes:
    tensors: weights by name, on the CPU.
    state: state dicts of optimizer and schedule, random number generators: tensors and plain values.
    numbers: what JSON holds.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    numbers: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training, in a folder of its own; None of another's is ever looked at."""

    def __init__(self, folder: Path, every_steps: int, num_kept: int):
        self.folder = folder
        self.every_steps = every_steps
        self.num_kept = num_kept

    def due(self, step: int) -> bool:
        return step % self.every_steps == 0

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes the checkpoint, then removes those of later steps, and the oldest over the number kept.

        Later ones are torn: this training would have gone on from a whole one. What killed writers left goes too: the
        store's lock lets one process write.

        Raises:
            TrainingError: the disk is full; the checkpoints before are as they were.
        """
        target = _folder(self.folder, checkpoint.step)
        temporary = self.folder / f".unfinished-{os.getpid()}"
        for leftover in self.folder.glob(".unfinished-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            save_file({n: t.contiguous() for n, t in checkpoint.tensors.items()}, temporary / FILES[0])
            torch.save(checkpoint.state, temporary / FILES[1])
            write_json(temporary / FILES[2], checkpoint.numbers)
            write_json(temporary / MARKER, {name: hash_file(temporary / name) for name in FILES})
            flush(*temporary.iterdir(), temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            flush(self.folder)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch says "unexpected pos" of a full disk
            if "No space left" in str(error) or shutil.disk_usage(self.folder).free < 2**20:
                raise TrainingError(
                    f"{self.folder}: the disk is full: the checkpoint of step {checkpoint.step} was not written, those "
                    "before are kept. Free some space and run the same command: training goes on from there."
                ) from None
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        folders = self._folders()
        place = folders.index(target)
        for useless in [*folders[place + 1 :], *folders[: place + 1][: -self.num_kept]]:
            shutil.rmtree(useless)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; torn or altered ones are reported and passed over."""
        for folder in reversed(self._folders()):
            problem = _problem(folder)
            if problem is None:
                return _load(folder)
            logger.warning("%s: %s; passed over for the one before", folder, problem)
        return None

    def of_step(self, step: int) -> Checkpoint | None:
        """The checkpoint of this step; None where it is not there, torn or altered."""
        folder = _folder(self.folder, step)
        return _load(folder) if _problem(folder) is None else None

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"))


def _folder(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:08d}"


def _load(folder: Path) -> Checkpoint:
    return Checkpoint(
        step=int(folder.name.rpartition("-")[2]),
        tensors=load_file(folder / FILES[0]),
        state=torch.load(folder / FILES[1], weights_only=True, map_location="cpu"),
        numbers=read_json(folder / FILES[2]),
    )


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where nothing is."""
    try:
        hashes = read_json(folder / MARKER)
        changed = [name for name in FILES if hash_file(folder / name) != hashes[name]]
    except (DataError, OSError, KeyError):
        return "incomplete"
    return f"{changed[0]} was altered" if changed else None
