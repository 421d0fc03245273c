"""Files of a model: where the base lies (folder or Hub), what its safetensors hold, folders written whole or not."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ConfigError, ModelError
from pipeline.files import hash_once
from pipeline.schema import ModelConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "README.md"]
LEFT_ON_THE_HUB = ["original/*", "consolidated*", "*.gguf"]  # second copies of the weights


def model_folder(model: ModelConfig, weights: bool = True) -> Path:
    """The base's folder: `model.path`, or the Hub's snapshot at `model.revision` (fetched where the cache has it not).

    Args:
        weights: False fetches configuration and tokenizer alone.

    Raises:
        ConfigError: a Hub id without a commit; a relative path that leaves the project.
        ModelError: no such folder; the Hub cannot be reached or has no such model.
    """
    if model.hub_id is not None:
        return _hub_snapshot(model, weights)
    path = Path(model.path)
    if not path.is_absolute() and os.path.normpath(path).split(os.sep)[0] == "..":
        raise ConfigError(
            f"model.path: '{model.path}' is relative and leaves the project; temporary experiment folders would "
            "lose it. Give an "
            f"absolute path (`model.path={path.resolve()}`), or copy the folder into the project and track it "
            "with `dvc add`."
        )
    if not path.is_dir():
        what = "is a file, not a model folder" if path.exists() else "no such folder"
        raise ModelError(
            f"model.path: '{model.path}': {what}. It takes a folder with config.json, *.safetensors and a tokenizer."
        )
    if not (path / CONFIG).is_file():
        raise ModelError(f"model.path: '{model.path}' has no {CONFIG}. It takes a folder that `save_pretrained` wrote.")
    return path


def check_revision(model: ModelConfig) -> None:
    """Raises: ConfigError: a Hub model without a pinned commit."""
    if model.hub_id is not None and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        raise ConfigError(
            f"model.revision: {model.revision!r} does not pin a commit of {model.hub_id}; it takes 40 hex digits, "
            "so that the same "
            f"weights load every time. Open https://huggingface.co/{model.hub_id}/commits/main, read the change, "
            "copy the full hash "
            f"of its newest commit, and write it into {model.path} (`revision: ...`)."
        )


def _hub_snapshot(model: ModelConfig, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    check_revision(model)
    patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else []), *(["*.py"] if model.trust_remote_code else [])]
    with hub_errors(model):
        folder = snapshot_download(
            str(model.hub_id), revision=model.revision, allow_patterns=patterns, ignore_patterns=LEFT_ON_THE_HUB
        )
    return Path(folder)


@contextmanager
def hub_errors(model: ModelConfig) -> Iterator[None]:
    """Turns what can go wrong between here and the Hub into one ModelError."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"model.hub_id: {model.hub_id} at revision {model.revision}"
    try:
        yield
    except GatedRepoError:
        raise ModelError(
            f"{where}: its owner lets in only who accepted the licence. Accept it on the model's "
            "page, then `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{where}: the Hub has no such commit. See https://huggingface.co/{model.hub_id}/commits/main."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"{where}: the Hub has no such model, or it is private and you are not logged in (`hf auth login`)."
        ) from None
    except NotASafetensorsRepoError:
        raise ModelError(
            f"{where}: holds no safetensors, and pickle weights are not loaded. "
            f"{_conversion_advice(model.hub_id or '')}"
        ) from None
    except Exception as error:  # the Hub's client changes its HTTP library, and with it the classes, between versions
        raise ModelError(
            f"{where}: the Hub cannot be reached and the cache does not hold the model ({type(error).__name__}). "
            "Check the network and "
            f"HF_HUB_OFFLINE, or fetch it elsewhere (`hf download {model.hub_id} --revision {model.revision} "
            "--local-dir FOLDER`), "
            "bring the folder here and set model.hub_id=null model.path=/absolute/FOLDER."
        ) from None


def _conversion_advice(source: str) -> str:
    return (
        "Convert it once, in an environment where you trust that file: `AutoModelForCausalLM.from_pretrained"
        f"({source!r}).save_pretrained(FOLDER)` writes safetensors (save the tokenizer there too)."
    )


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, in order.

    Raises:
        ModelError: there are none (pickles are refused), or a shard is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise ModelError(f"{folder / INDEX}: not a safetensors index ({error}). Fetch the model again.") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder}: {INDEX} names {', '.join(missing)}, which is not there. Fetch the model again."
            )
        return [folder / name for name in names]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise ModelError(
            f"{folder}: holds pickle weights only ({', '.join(pickles[:3])}), which can run code when loaded, so "
            "they are not. " + _conversion_advice(str(folder))
        )
    raise ModelError(
        f"{folder}: holds no weights (looked for {WEIGHTS} and {INDEX}). Fetch the whole model (with "
        "git: `git lfs pull`)."
    )


def weight_bytes(folder: Path) -> int:
    """Size of the weight files on disk: a model's, or an adapter's."""
    adapter = folder / "adapter_model.safetensors"
    return sum(path.stat().st_size for path in ([adapter] if adapter.exists() else weight_files(folder)))


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors by name, from the headers alone.

    Raises:
        ModelError: see `weight_files`; a file is cut short or is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                names = list(file.keys())
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            hint = "It is a git LFS pointer: run `git lfs pull`." if path.stat().st_size < 1000 else "Fetch it again."
            raise ModelError(f"{path}: cannot be read as safetensors ({error}). {hint}") from None
    return shapes


def hash_model(model: ModelConfig) -> str:
    """What identifies the base: id and commit on the Hub, SHA-256 of configuration and weights in a folder."""
    if model.hub_id is not None:
        return f"{model.hub_id}@{model.revision}"
    return hash_folder(model_folder(model))


def small_files(model: ModelConfig) -> list[str]:
    """Hashes of the base's configurations, tokenizer and (where it brings any) code."""
    folder = model_folder(model, weights=False)
    suffixes = (".json", ".jinja", ".model", ".txt", ".py")
    return [hash_once(path) for path in sorted(folder.iterdir()) if path.suffix in suffixes]


def hash_folder(folder: Path) -> str:
    """SHA-256 over the configuration and the weights."""
    hashes = [hash_once(folder / CONFIG), *(hash_once(path) for path in weight_files(folder))]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


@contextmanager
def written_folder(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and is removed when not.

    Args:
        num_bytes: what the block is going to write; the disk must have that, and 5 % more, free.

    Raises:
        ModelError: the disk has not the room, or was filled while writing; `folder` is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    needed = int(num_bytes * 1.05)
    if free < needed:
        raise ModelError(
            f"{folder}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free. Free some (`dvc gc "
            "--workspace` drops "
            "old cached outputs, `hf cache prune` old downloads) and run the stage again; nothing was written."
        )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise ModelError(
                f"{folder}: the disk was full while writing. Free some space and run the stage again."
            ) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
