"""What a process that was launched as one of several knows of itself: its number, and where to say why it ends."""

import os
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.files import write_text
from pipeline.schema import Engine, RuntimeConfig

MESSAGES = "LORA_PIPELINE_MESSAGES"  # the folder for the processes' last words; set by `pipeline.launching`
LAUNCHER = "LORA_PIPELINE_LAUNCHER"  # its process: number, and seconds from the machine's boot to its start


def rank() -> int:
    """Number of this process among those of one training, from 0; 0 where none was launched."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the training has; 1 where none was launched."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process among those of this machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def by_a_stage() -> bool:
    """Whether a stage launched this process, not somebody's own `accelerate launch`."""
    return MESSAGES in os.environ and world_size() > 1


def check_launch(runtime: RuntimeConfig) -> None:
    """Raises: ConfigError: another number of processes than the settings say."""
    if world_size() not in (1, runtime.num_processes):
        raise ConfigError(
            f"runtime.num_processes: {runtime.num_processes}, but {world_size()} processes were launched (WORLD_SIZE). "
            f"Give runtime.num_processes={world_size()}, which the checks and the plan go by."
        )


def check_package(runtime: RuntimeConfig) -> None:
    """Raises: ConfigError: the engine's package is not installed."""
    if runtime.engine is Engine.deepspeed and find_spec("deepspeed") is None:
        raise ConfigError(
            "runtime.engine: deepspeed, and the package is not installed. `pip install -e '.[deepspeed]'`, or set "
            "runtime=fsdp, which cuts the weights too."
        )


def leave_message(text: str) -> bool:
    """Leaves why this process ends for the one that launched it; False where nobody asked for it."""
    if not by_a_stage():
        return False
    write_text(Path(os.environ[MESSAGES]) / str(rank()), text)
    return True
