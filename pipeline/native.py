"""What the kernels in C beside this package share: how they are compiled and kept, and how heads are passed to them.

They are compiled for the machine at hand as `torch.compile` does it: needs a compiler with OpenMP. What was compiled is
kept in the user's cache (`XDG_CACHE_HOME` or `~/.cache`, under `lora_pipeline`), by the hash of all that decides it.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.errors import PipelineError

HEADER = Path(__file__).with_suffix(".h")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-strict-aliasing", "-fPIC", "-shared", "-Wno-psabi")
COMPILE_SECONDS = 120
CPUINFO = Path("/proc/cpuinfo")
OF_A_CPU = ("vendor_id", "model name", "flags", "Features", "CPU implementer", "CPU part")


class CannotCompile(PipelineError):
    """This machine has no compiler for a kernel."""


class HeadsInC(ctypes.Structure):
    """float32 or bfloat16 [B, H, N, D] as C reads it: where it begins, and the strides of all but the width D."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "HeadsInC":
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


def load_kernel(source: Path, defines: Sequence[str] = ()) -> ctypes.CDLL:
    """The functions of a C file: as it was kept, or compiled, and kept where that is possible.

    Raises:
        CannotCompile: there is no compiler, or it fails.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    try:
        command = [*shlex.split(compiler), *FLAGS, *defines]
        kept = _kept(f"{source.stem}-{_key(source, command)}.so")
        with contextlib.suppress(OSError):  # not there, or no program may be run there
            if kept is not None and _is_whole(kept.read_bytes()):
                return ctypes.CDLL(str(kept))
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # NFS keeps what is loaded from it
            library = Path(folder) / source.with_suffix(".so").name
            complete = [*command, "-o", str(library), str(source), "-lm"]
            subprocess.run(complete, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            with contextlib.suppress(OSError):  # a full disk, a home not to be written: made again next time
                if kept is not None:
                    _keep(library.read_bytes(), kept)
                    return ctypes.CDLL(str(kept))
            return ctypes.CDLL(str(library))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        lines = (str(getattr(error, "stderr", None) or error).strip() or "no reason given").splitlines()
        said = next((line for line in lines if "error" in line), lines[0])
        raise CannotCompile(
            f"it cannot be compiled ({compiler}: {said}). Install gcc with OpenMP, or name a C compiler in the "
            "environment variable CC."
        ) from error


def _kept(name: str) -> Path | None:
    """Where it is kept; None for a user without a home, as in some containers: others could write anywhere else."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_pipeline" / name
    except RuntimeError:
        return None


def _keep(library: bytes, path: Path) -> None:
    """With its digest at the end, which a loader does not read: half a library would kill the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as unfinished:
        try:
            unfinished.write(library + hashlib.sha256(library).digest())
            unfinished.close()
            Path(unfinished.name).replace(path)
        finally:
            Path(unfinished.name).unlink(missing_ok=True)


def _is_whole(kept: bytes) -> bool:
    size = hashlib.sha256().digest_size
    return hashlib.sha256(kept[:-size]).digest() == kept[-size:]


def _key(source: Path, command: Sequence[str]) -> str:
    """Of the code, the command, the compiler and the processor: a home may be shared by several machines."""
    compiler = Path(shutil.which(command[0]) or command[0])
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    parts = [source.read_bytes(), HEADER.read_bytes(), repr(command).encode(), repr(platform.uname()[4:]).encode()]
    parts += sorted({line.encode() for line in lines if line.startswith(OF_A_CPU)})
    if compiler.exists():
        parts.append(repr((compiler.resolve(), compiler.stat().st_size, compiler.stat().st_mtime_ns)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
