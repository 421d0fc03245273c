"""Plans that leave nothing behind in the engine whose code they run."""

import warnings

from pipeline import row_attention
from pipeline.architecture import Architecture
from pipeline.memory import Memory, Setup, plan_memory


def clean_plan(architecture: Architecture, setup: Setup) -> Memory:
    """`plan_memory`, with attention's masks made anew before and after it.

    They are remembered by dtype and length. Those of a plan have no memory: a training in the same process, or the next
    plan, must not get them.

    Raises:
        ConfigError, ModelError: see `plan_memory`.
    """
    row_attention._causal_mask.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names that peft asks it by
            return plan_memory(architecture, setup)
    finally:
        row_attention._causal_mask.cache_clear()
