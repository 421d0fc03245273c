"""C beside this package, compiled for the machine at hand as `torch.compile` does it: needs a compiler with OpenMP.

What was compiled is kept in the user's cache (`XDG_CACHE_HOME` or `~/.cache`, under `lora_pipeline`), by the hash of
everything that decides it; where nothing can be written there, it is compiled for each process.
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
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pipeline.errors import PipelineError

HEADER = Path(__file__).with_suffix(".h")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-strict-aliasing", "-fPIC", "-shared", "-Wno-psabi")
COMPILE_SECONDS = 120
OF_A_CPU = ("vendor_id", "model name", "flags", "Features", "CPU implementer", "CPU part")  # /proc/cpuinfo's


class CannotCompile(PipelineError):
    """This machine has no compiler for a kernel."""


class HeadsInC(ctypes.Structure):
    """float32 or bfloat16 [B, H, N, D] as C reads it: where it begins, and the strides of all but the width D."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "HeadsInC":
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


def load_kernel(source: Path, defines: Sequence[str] = ()) -> ctypes.CDLL:
    """The functions of a C file here. Raises: CannotCompile."""
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    try:
        command = [*shlex.split(compiler), *FLAGS, *defines]
        with _folder() as folder:
            library = folder / f"{source.stem}-{_key(source, command)}.so"
            if library.exists():
                with contextlib.suppress(OSError):  # damaged: made again
                    return ctypes.CDLL(str(library))
            _compile([*command, str(source), "-lm"], library)
            return ctypes.CDLL(str(library))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        lines = (str(getattr(error, "stderr", None) or error).strip() or "no reason given").splitlines()
        said = next((line for line in lines if "error" in line), lines[0])
        raise CannotCompile(
            f"it cannot be compiled ({compiler}: {said}). Install gcc with OpenMP, or name a C compiler in the "
            "environment variable CC."
        ) from error


def _compile(command: Sequence[str], library: Path) -> None:
    """All at once: another process may look for it."""
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        complete = [*command, "-o", unfinished]
        subprocess.run(complete, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        Path(unfinished).replace(library)
    finally:
        Path(unfinished).unlink(missing_ok=True)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_pipeline"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        yield folder
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def _key(source: Path, command: Sequence[str]) -> str:
    """Of the code, the command, the compiler and the processor: a home may be shared by several machines."""
    cpuinfo, compiler = Path("/proc/cpuinfo"), Path(shutil.which(command[0]) or command[0])
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    parts = [source.read_bytes(), HEADER.read_bytes(), repr(command).encode(), repr(platform.uname()[4:]).encode()]
    parts += sorted({line.encode() for line in lines if line.startswith(OF_A_CPU)})
    if compiler.exists():
        parts.append(repr((compiler.resolve(), compiler.stat().st_size, compiler.stat().st_mtime_ns)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
