"""Where a stage finds its inputs and puts its outputs.

Under DVC both are the working folder (a temporary one for queued experiments). By hand, outputs go to a folder
of their own, and inputs come from `runtime.inputs_dir` where they stand there, else from the project.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError

PROCESSED = "data/processed"
QUANTIZED = "models/quantized"
ADAPTER = "models/adapter"
RUN = "models/run.json"
MERGED = "models/merged"


def project_root() -> Path:
    """The project that owns the stores: DVC's parent repository inside a temporary experiment, else this folder."""
    return Path(os.environ.get("DVC_ROOT") or Path(__file__).resolve().parent.parent)


@dataclass(frozen=True)
class Workspace:
    """Attributes:
    inputs: looked in first for what earlier stages made.
    outputs: where this stage writes.
    """

    inputs: Path
    outputs: Path

    def input(self, name: str) -> Path:
        """Path of an earlier stage's output such as `data/processed`.

        Raises:
            DataError: neither `inputs` nor the working folder has it.
        """
        for folder in (self.inputs, Path()):
            if (folder / name).exists():
                return folder / name
        raise DataError(f"{name}: not found in {self.inputs} or here. Run `dvc repro`, or `dvc pull` what others made.")

    def output(self, name: str) -> Path:
        """Path for an output of this stage; its parent exists."""
        path = self.outputs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @classmethod
    def here(cls) -> "Workspace":
        """The working folder on both sides, as under DVC."""
        return cls(Path(), Path())
