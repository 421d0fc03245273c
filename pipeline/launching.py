"""Several processes of one training, started on this machine by `accelerate launch`.

This process keeps nothing of the training: it starts one process a GPU (torch's elastic agent inside accelerate does),
passes signals on, and says in one line what ended them. Every one of them runs the same command; `pipeline.ranks`
tells it which one it is.
"""

import json
import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import Interrupted, TrainingError
from pipeline.launched import LAUNCHER, MESSAGES, check_package, world_size
from pipeline.parents import this_process
from pipeline.schema import RuntimeConfig

logger = logging.getLogger(__name__)
SHUTDOWN_SECONDS = 300  # after SIGTERM, for a step, its validation and a checkpoint; then SIGKILL
DEFAULTS = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "mixed_precision": "no",
    "use_cpu": False, "debug": False, "gpu_ids": "all",
}  # fmt: skip


def is_wanted(runtime: RuntimeConfig) -> bool:
    """Whether this process is to start others: several are asked for, and it is none of them."""
    return runtime.num_processes > 1 and world_size() == 1


def launch(runtime: RuntimeConfig, module: str, arguments: Sequence[str]) -> None:
    """Runs `python -m MODULE ARGUMENTS` in this machine's share of `runtime.num_processes` processes, to their end.

    Raises:
        ConfigError: the engine's package is not installed.
        TrainingError: one of them failed or was killed; the others were stopped.
        Interrupted: SIGTERM or Ctrl-C; they had time for a checkpoint.
    """
    check_package(runtime)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its tables say less than the message
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    here = runtime.num_processes // runtime.num_machines
    logger.info(
        "%d processes (%s)%s", runtime.num_processes, runtime.engine,
        f", {here} of them here" if runtime.num_machines > 1 else "",
    )  # fmt: skip
    process = this_process()
    with tempfile.TemporaryDirectory() as messages, tempfile.NamedTemporaryFile("w", suffix=".json") as defaults:
        json.dump(DEFAULTS, defaults)  # else accelerate takes what `accelerate config` once wrote for other work
        defaults.flush()
        os.environ |= {
            MESSAGES: messages, LAUNCHER: f"{process.pid} {process.created}",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
        }  # fmt: skip
        options = [f"--config_file={defaults.name}", *_options(runtime, here)]
        try:
            launch_command(launch_command_parser().parse_args([*options, "-m", module, *arguments]))
        except ChildFailedError as error:
            raise TrainingError(_reason(error, Path(messages), runtime.num_processes)) from None
        except SignalException as error:
            raise Interrupted(f"stopped by {signal.Signals(error.sigval).name}.") from None
        finally:
            del os.environ[MESSAGES], os.environ[LAUNCHER]


def _options(runtime: RuntimeConfig, here: int) -> list[str]:
    """What accelerate is told; the engine and the precision are the training's own settings, not the launcher's."""
    set_outside = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a number for each level of nesting
    outside = int(set_outside) if set_outside.isdigit() else 0
    threads = runtime.num_threads or outside or len(os.sched_getaffinity(0)) // here
    options = {
        "num_processes": runtime.num_processes,
        "num_machines": runtime.num_machines,
        "machine_rank": runtime.machine_rank,
        "main_process_port": runtime.main_process_port or 0,
        "num_cpu_threads_per_process": max(1, threads),
        "mixed_precision": "no",
        "dynamo_backend": "no",
    }
    if runtime.main_process_address is not None:
        options["main_process_ip"] = runtime.main_process_address
    return ["--multi_gpu", *(f"--{name}={value}" for name, value in options.items())]


def _reason(error: Any, messages: Path, num_processes: int) -> str:
    """Which process was killed; else what the processes left to be said, each text once."""
    killed = [(rank, each) for rank, each in error.failures.items() if each.exitcode < 0]
    by_whom = [(rank, each) for rank, each in killed if each.exitcode != -signal.SIGTERM]  # so the others are stopped
    texts = list(dict.fromkeys(path.read_text(encoding="utf-8") for path in sorted(messages.iterdir())))
    if texts and not by_whom:
        return "\n".join(texts)
    rank, failure = (by_whom or killed or [error.get_first_failure()])[0]
    code = failure.exitcode
    how = f"was ended by {failure.signal_name()}" if code < 0 else f"failed with exit code {code} (see above)"
    hint = " (the system does that where memory runs out)" if code == -signal.SIGKILL else ""
    return (
        f"process {rank} of {num_processes} {how}{hint}, and the others were stopped. Run the same command again: the "
        "training goes on from its last checkpoint."
    )
