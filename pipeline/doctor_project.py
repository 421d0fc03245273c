"""The doctor on the project: git, DVC and its cache, Hydra, params.yaml, code deps, locks and GPU leases."""

import configparser
import fcntl
import json
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.doctor_refusal import ROOT, Finding, Patient
from pipeline.errors import ConfigError
from pipeline.parents import KnownProcess

LARGE_BYTES = 1_000_000_000
COMMAND_SECONDS = 60.0


def check_git(patient: Patient) -> Iterator[Finding]:
    top = _run("git", "rev-parse", "--show-toplevel")
    foreign = re.search(r"git config --global --add safe\.directory .+", top.stderr)  # in every language of git
    if foreign is not None:
        yield Finding("fail", f"{ROOT}: git uses no repository that another user owns", f"`{foreign[0]}`")
    elif top.returncode != 0:
        yield Finding("fail", f"{ROOT}: no git repository ({_last(top)})", "`git init && git add -A && git commit`")
    elif _run("git", "rev-parse", "--verify", "-q", "HEAD").returncode != 0:
        yield Finding("fail", f"{top.stdout.strip()}: no commit yet, which `dvc exp run` needs", "`git commit`")
    else:
        yield Finding("ok", f"{_run('git', 'describe', '--always', '--dirty').stdout.strip()} in {top.stdout.strip()}")


def check_dvc(patient: Patient) -> Iterator[Finding]:
    """DVC's folder, and Hydra switched on in its configuration, else `dvc exp run -S` knows nothing of conf/."""
    path = ROOT / ".dvc" / "config"
    if not path.is_file():
        yield Finding("fail", f"{path.parent}: not set up", "`git checkout .dvc`, or `dvc init`")
        return
    settings = configparser.ConfigParser()
    for file in (path, path.with_name("config.local")):
        if file.is_file():
            settings.read_string(re.sub(r"^\s+", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE), str(file))
    if settings.get("hydra", "enabled", fallback="false").lower() != "true":
        yield Finding(
            "fail", "hydra.enabled is not set, so that -S would not compose conf/", "`dvc config hydra.enabled True`"
        )
    else:
        yield Finding("ok", "set up, with Hydra")


def check_dvc_cache(patient: Patient) -> Iterator[Finding]:
    """How DVC's cache and the workspace share a file: by reflink, hardlink, symlink, or a copy (twice the room)."""
    from dvc.repo import Repo
    from dvc_objects.fs.generic import test_links

    if not os.access(ROOT, os.W_OK):  # opening writes files
        yield _unknown_links(ROOT)
        return
    with Repo(str(ROOT)) as repo:
        cache = repo.cache.local
        wanted = repo.config["cache"].get("type") or ["reflink", "copy"]
        if not os.path.exists(cache.path):
            yield Finding("ok", f"{cache.path} is not there yet: the first `dvc repro` makes it")
            return
        if not os.access(cache.path, os.W_OK):  # trying does, too
            yield _unknown_links(cache.path)
            return
        inside = os.path.join(repo.root_dir, "file")  # the trial is made beside it
        links = test_links(["reflink", "hardlink", "symlink"], cache.fs, cache.path, repo.fs, inside)
    used = next((name for name in wanted if name in links), "copy")
    text = f"{cache.path}: files by {used} (it could by {', '.join(links) or 'copy alone'})"
    size = _model_bytes(patient)
    if used == "copy" and size > LARGE_BYTES:
        found = f"{text}; a model of {size / 1e9:.1f} GB is there twice for each output"
        yield Finding(
            "warn", found, "a file system with reflinks (XFS, Btrfs), or `dvc config cache.type hardlink,symlink`"
        )
    else:
        yield Finding("ok", text)


def _unknown_links(folder: str | Path) -> Finding:
    found = f"{folder}: cannot be written, so `dvc repro` cannot run here, and how it would share files is not known"
    return Finding("warn", found, "give this user the right to, or work in another clone of the project")


def _model_bytes(patient: Patient) -> int:
    if patient.config is None or patient.config.model.hub_id is not None:
        return 0
    folder = Path(patient.config.model.path)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def check_hydra(patient: Patient) -> Iterator[Finding]:
    """What `hydra_plugins/` registers: the schema, launchers and sweepers."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()
    known = {group: ConfigStore.instance().list(f"hydra/{group}") for group in ("launcher", "sweeper")}
    missing = {"launcher": "local.yaml", "sweeper": "grid.yaml"}
    lost = [name for group, name in missing.items() if name not in known[group]]
    if lost:
        found = f"hydra_plugins/ is not found: {', '.join(lost)} missing"
        yield Finding("fail", found, "run from the project's folder; look for another hydra_plugins on PYTHONPATH")
    else:
        names = ", ".join(sorted(name.removesuffix(".yaml") for name in known["launcher"]))
        yield Finding("ok", f"the project's plugins are found; launchers: {names}")


def check_params_file(patient: Patient) -> Iterator[Finding]:
    from pipeline.config import check_params

    try:
        check_params()
    except ConfigError as error:
        first, *rest = str(error).splitlines()
        listed = "; ".join(line.strip() for line in rest if line.startswith("  "))
        yield Finding(
            "fail", f"{first} {listed}", "`make params` takes what conf/ says; `dvc exp run -S` tries a value once"
        )
    else:
        yield Finding("ok", "params.yaml is what conf/ composes to")


def check_code_deps(patient: Patient) -> Iterator[Finding]:
    from pipeline.imports import with_code_deps

    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    if with_code_deps(text) == text:
        yield Finding("ok", "dvc.yaml lists exactly what each stage imports")
    else:
        yield Finding("fail", "dvc.yaml does not list what the stages import: changes would not rebuild", "`make deps`")


def check_store(patient: Patient) -> Iterator[Finding]:
    """Stored trainings: unfinished ones that nobody holds, and those held by a process whose DVC is dead."""
    from pipeline.store import entry_folders, inspected

    num_entries, unfinished = 0, []
    for folder in entry_folders():
        with inspected(folder) as found:
            num_entries += 1
            if found.holder is None and not found.is_finished:
                unfinished.append(found.num_bytes)
            if found.holder is not None and _is_orphaned(folder / "lock"):
                text = f"{folder.name[:12]} is held by {found.holder}, whose dvc is dead: it stops at its next step"
                yield Finding("warn", text, "if it does not, end it with `kill`")
    if unfinished:
        text = f"{len(unfinished)} of {num_entries} stored trainings are unfinished ({sum(unfinished) / 1e6:.0f} MB)"
        remedy = "the same command again goes on; `python -m pipeline.store clean --unfinished --yes` removes them"
        yield Finding("warn", text, remedy)
    else:
        yield Finding("ok", f"{num_entries} stored results, none left unfinished")


def _is_orphaned(lock: Path) -> bool:
    """Whether the lock's text names, on this machine, a DVC that is gone."""
    try:
        owner = json.loads(lock.read_text(encoding="utf-8"))
        starter, host = owner["starter"], owner["host"]
        return starter is not None and host == socket.gethostname() and KnownProcess(**starter).gone()
    except (ValueError, TypeError, KeyError):  # empty, or being written
        return False


def check_leases(patient: Patient) -> Iterator[Finding]:
    """GPUs that are held though the process that took them is gone: a child of it holds on."""
    folder = Path(tempfile.gettempdir(), "lora-pipeline-gpus")  # looked at, never made here
    held, lost, closed = 0, [], []
    for path in sorted(folder.glob("[!.]*")):
        try:
            lease = path.open(encoding="utf-8")
        except OSError as error:
            closed.append(f"{path}: cannot be opened ({error.strerror}), so who holds this GPU is not known")
            continue
        with lease as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                continue
            except BlockingIOError:
                held += 1
            owner = re.match(r"process (\d+) of", file.read())
            if owner is not None and not psutil.pid_exists(int(owner[1])):
                lost.append(f"{path.name} was taken by process {owner[1]}, which is gone")
    for text in lost:
        yield Finding("warn", f"{text}; a child of it holds the GPU", f"find it with `fuser {folder}/*` and end it")
    for text in closed:
        yield Finding("warn", text, "ask its owner to remove it")
    if not lost and not closed:
        yield Finding("ok", f"{held} GPUs are held, by living processes" if held else "no GPU is held")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    """Raises: ConfigError: the program is missing, or does not end."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"{command[0]}: cannot be run ({type(error).__name__}). Install it, and look at PATH."
        ) from None


def _last(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
