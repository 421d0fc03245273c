"""The machine: device, threads, determinism. Every choice is logged; nothing falls back in silence."""

import logging
import os
import random

import numpy as np
import torch

from pipeline.errors import ConfigError
from pipeline.launched import local_rank, world_size
from pipeline.schema import Device, Dtype, RuntimeConfig

logger = logging.getLogger(__name__)


def select_device(runtime: RuntimeConfig, one_of_several: bool = False) -> torch.device:
    """The device asked for, after setting the number of CPU threads.

    Args:
        one_of_several: this process may be one of several that were launched; each gets a GPU of its own.

    Raises:
        ConfigError: `cuda` is asked for and torch sees none, or fewer than there are processes here; several
            processes where one does the work.
    """
    if world_size() > 1 and not one_of_several:
        raise ConfigError(
            f"{world_size()} processes were launched, and each would do the same: only the train stage runs in "
            "several. Start this one alone."
        )
    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    if runtime.device is Device.cuda and not torch.cuda.is_available():
        build = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else f"torch {torch.__version__} is a CPU build"
        )
        raise ConfigError(
            f"runtime.device: cuda, but torch finds no GPU ({build}). Mend the driver or set runtime.device=cpu."
        )
    use_cuda = runtime.device is Device.cuda or (runtime.device is Device.auto and torch.cuda.is_available())
    device = torch.device("cuda" if use_cuda else "cpu")
    if use_cuda and world_size() > 1:
        if local_rank() >= torch.cuda.device_count():
            raise ConfigError(
                f"runtime.num_processes: process {local_rank()} of this machine finds "
                f"{torch.cuda.device_count()} GPUs; one process a GPU."
            )
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    name = torch.cuda.get_device_name(device) if use_cuda else f"{torch.get_num_threads()} threads"
    logger.info("device: %s (%s)", device.type, name)
    return device


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def use_deterministic_kernels() -> None:
    """Asks torch for deterministic kernels; on CUDA it warns of operations without one and runs them.

    The backward pass of fused attention is one of them there: equal bytes are promised on a CPU alone.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # else every new tensor is filled with NaN first
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def torch_dtype(dtype: Dtype) -> torch.dtype:
    return {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16, Dtype.float16: torch.float16}[dtype]
