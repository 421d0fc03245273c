"""One process a GPU, on a machine that several sweeps and users share.

`python -m pipeline.gpu_leases COMMAND ...` waits for a free GPU, and becomes the command with that GPU alone in sight.
"""

import contextlib
import csv
import fcntl
import getpass
import io
import logging
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import ConfigError, PipelineError

logger = logging.getLogger(__name__)
QUERY = ["--query-gpu=index,uuid,memory.total,mig.mode.current", "--format=csv,noheader,nounits"]
QUERY_SECONDS = 60.0  # a driver that is not held loaded takes many seconds a GPU
POLL_SECONDS = 0.5


class LeaseError(PipelineError, TimeoutError):
    """No GPU came free in time."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a MIG device, which is a part of one.

    Attributes:
        index: of the GPU in nvidia-smi's order (CUDA's own order, fastest first, may be another).
        uuid: `GPU-...` or `MIG-...`, as CUDA_VISIBLE_DEVICES takes it.
        memory_bytes: in all; of a MIG device the rounded figure of its profile's name; None: not told.
    """

    index: int
    uuid: str
    memory_bytes: int | None

    def environment(self) -> dict[str, str]:
        """What a child's environment needs, before it starts, to see this GPU alone."""
        return {"CUDA_VISIBLE_DEVICES": self.uuid}


@dataclass(frozen=True)
class Lease(Gpu):
    """Attributes:
    descriptor: of the locked file. A child started with `pass_fds=[lease.descriptor]` holds the lease too, and
        keeps it if this process is killed.
    """

    descriptor: int


def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA would show this process, from nvidia-smi; neither CUDA nor torch is started.

    CUDA_VISIBLE_DEVICES is read as CUDA does: indices (in nvidia-smi's order), UUIDs or their beginnings, in its order,
    up to the first negative one; empty: none. Without nvidia-smi there are none.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES names a GPU that this machine lacks.
    """
    devices = _devices()
    choice = os.environ.get("CUDA_VISIBLE_DEVICES")
    if choice is None or not devices:
        return devices
    chosen: list[Gpu] = []
    for name in (part.strip() for part in choice.split(",")):
        if name in ("", "NoDevFiles") or re.fullmatch(r"-\d+", name):
            break
        matches = [d for d in devices if (str(d.index) == name if name.isdigit() else d.uuid.startswith(name))]
        if not matches or (not name.isdigit() and len(matches) > 1):
            known = ", ".join(f"{d.index} ({d.uuid})" for d in devices)
            raise ConfigError(f"CUDA_VISIBLE_DEVICES: {name!r} names no GPU here: {known}. Mend or unset it.")
        chosen += [d for d in matches if d not in chosen]
    return chosen


def _devices() -> list[Gpu]:
    """Every GPU of the machine; in place of a GPU that is split by MIG, its parts."""
    text = _nvidia_smi(*QUERY)
    gpus: list[Gpu] = []
    for index, uuid, memory, mig_mode in csv.reader(io.StringIO(text), skipinitialspace=True):
        if mig_mode == "Enabled":
            gpus += _mig_devices(int(index))
        else:
            gpus.append(Gpu(int(index), uuid, int(memory) * 2**20 if memory.isdigit() else None))
    return gpus


def _mig_devices(index: int) -> list[Gpu]:
    lines = _nvidia_smi("-L", "-i", str(index))
    found = re.findall(r"MIG \S*?(\d+)gb\S*\s+Device\s+\d+: \(UUID: (MIG-[^)]+)\)", lines)
    return [Gpu(index, uuid, int(gigabytes) * 2**30) for gigabytes, uuid in found]


def _nvidia_smi(*arguments: str) -> str:
    """Its output; empty, with a warning, where there is the tool and no working driver."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=QUERY_SECONDS)
    except FileNotFoundError:
        return ""
    except subprocess.TimeoutExpired:
        logger.warning("nvidia-smi did not answer in %.0f s: no GPU is used", QUERY_SECONDS)
        return ""
    if done.returncode != 0:
        logger.warning("nvidia-smi: %s: no GPU is used", (done.stdout + done.stderr).strip() or done.returncode)
        return ""
    return done.stdout


def lease_folder() -> Path:
    """The folder of the locked files, one for all users who have the same TMPDIR; made here if need be.

    Raises:
        ConfigError: it cannot be written.
    """
    folder = Path(tempfile.gettempdir(), "lora-pipeline-gpus")
    try:
        folder.mkdir()
        folder.chmod(0o1777)  # mkdir's mode is cut by the umask
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror}). Point TMPDIR at one that can.") from None
    return folder


@contextlib.contextmanager
def lease(gpus: Sequence[Gpu], wait_seconds: float | None = None) -> Iterator[Lease]:
    """Holds one of these GPUs, the first that is or comes free, until the end of the block or of the process.

    Args:
        wait_seconds: how long to wait for one; None: until there is one.

    Raises:
        ConfigError: `gpus` is empty, or the lease files cannot be used.
        LeaseError: none came free in time.
    """
    if not gpus:
        raise ConfigError(
            "no GPU to lease: nvidia-smi shows none. Mend the driver, or ask for none (runtime.device=cpu)."
        )
    began, told = time.monotonic(), False
    while True:
        for gpu in gpus:
            descriptor = _acquire(gpu)
            if descriptor is not None:
                try:
                    yield Lease(**asdict(gpu), descriptor=descriptor)
                finally:
                    os.close(descriptor)
                return
        if wait_seconds is not None and time.monotonic() - began >= wait_seconds:
            raise LeaseError(f"no GPU came free in {wait_seconds:g} s: {_holders(gpus)}. Wait, or end one of these.")
        if not told:
            logger.info("waiting for a GPU: %s", _holders(gpus))
            told = True
        time.sleep(POLL_SECONDS)


def _acquire(gpu: Gpu) -> int | None:
    """The descriptor of its locked file, which tells who has it; None: somebody else holds it."""
    path = _lease_file(gpu)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)  # O_CREAT on another user's file is refused in /tmp
    except OSError as error:
        raise ConfigError(f"{path}: cannot be opened ({error.strerror}). Ask its owner to remove it.") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    text = f"process {os.getpid()} of {_user()} (since {time.strftime('%Y-%m-%d %H:%M:%S %z')})"
    os.write(descriptor, text.encode())
    return descriptor


def _lease_file(gpu: Gpu) -> Path:
    """Its path; the file appears with its mode already set, so that no other user meets it half made."""
    path = lease_folder() / gpu.uuid.replace("/", "_")  # older MIG names have slashes
    if not path.exists():
        made = path.with_name(f".{secrets.token_hex(8)}")
        try:
            made.touch()
            made.chmod(0o666)
            with contextlib.suppress(FileExistsError):
                os.link(made, path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be made ({error.strerror}). Ask its folder's owner.") from None
        finally:
            made.unlink(missing_ok=True)
    return path


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"


def _holders(gpus: Sequence[Gpu]) -> str:
    return "; ".join(f"{g.index} ({g.uuid}) is held by {_lease_file(g).read_text() or 'another process'}" for g in gpus)


def main(command: Sequence[str]) -> int:
    if not command:
        print("usage: python -m pipeline.gpu_leases COMMAND ...", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        with lease(visible_gpus()) as held:
            os.set_inheritable(held.descriptor, True)
            os.execvpe(command[0], list(command), os.environ | held.environment())
    except KeyboardInterrupt:
        return 130
    except PipelineError as error:
        print(f"gpu_leases: error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"gpu_leases: error: {command[0]}: {error.strerror}. Is it on the PATH?", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
