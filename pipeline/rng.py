"""The state of every random number generator that a training draws from, to be put back exactly."""

import logging
import random
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


def torch_rng_state() -> list[torch.Tensor]:
    """Of the CPU, and of the GPU that trains where there is one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_torch_rng_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if torch.cuda.is_available() and len(state) > 1:
        torch.cuda.set_rng_state(state[1])
    elif torch.cuda.is_available() or len(state) > 1:
        logger.warning("the checkpoint is of another kind of device (CPU or GPU): random numbers go on otherwise")


def rng_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch_rng_state(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    set_torch_rng_state(state["torch"])
