"""One trained adapter as a run: its name, params, tags and datasets, kept in `models/run.json`. No MLflow here."""

import contextlib
import dataclasses
import getpass
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.adapter_names import adapter_name, adapter_size
from pipeline.errors import DataError
from pipeline.files import hash_once, read_json, write_json
from pipeline.provenance import package_versions
from pipeline.schema import RunConfig, TrainMethod

PARAM_GROUPS = ("data", "model", "quantization", "lora", "train")
USER_KEYED = ("rank_pattern", "alpha_pattern")  # by regular expressions, which MLflow takes in no name
PARENT = "mlflow.parentRunId"
CONTEXTS = {"train": "training", "validation": "validation", "test": "test", "general": "forgetting"}


@dataclass(frozen=True)
class RunRecord:
    """What `models/run.json` holds.

    Attributes:
        fingerprint: of the training; the key of the run in every store.
        params: flat settings (`lora.r`), native JSON values.
        datasets: name, digest (36 characters at most), context, num_rows, source.
        run_id: in the store that knew the run first; None when tracking was off or out of reach.
        started_at: milliseconds since 1970.
    """

    fingerprint: str
    run_name: str
    params: dict[str, Any]
    tags: dict[str, str]
    datasets: list[dict[str, Any]] = field(default_factory=list)
    run_id: str | None = None
    started_at: int | None = None

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """Raises: DataError: missing, or not such a file."""
        content = read_json(path)
        names = {f.name for f in dataclasses.fields(cls)}
        try:
            return cls(**{key: value for key, value in content.items() if key in names})
        except (TypeError, AttributeError):
            raise DataError(f"{path}: not a run record. Make it again with `dvc repro --force train`.") from None


def describe_training(
    config: RunConfig,
    fingerprint: str,
    fingerprints: Mapping[str, str],
    datasets: Sequence[Mapping[str, Any]] = (),
    environment: Mapping[str, str] | None = None,
) -> RunRecord:
    """The run of one training.

    Args:
        fingerprint: of the training, hex.
        fingerprints: of what went in: `data`, `base`, `code`.
        datasets: see `describe_datasets`.
        environment: more tags, see `read_environment`.
    """
    settings = dataclasses.asdict(config)
    params = dict(flatten({group: settings[group] for group in PARAM_GROUPS}))
    tags = {"fingerprint": fingerprint, "method": str(config.train.method)}
    tags |= {f"fingerprint.{name}": value for name, value in fingerprints.items()}
    tags |= {f"version.{name}": value for name, value in package_versions().items()}
    name = f"{describe_params(params)} · {fingerprint[:6]}"
    return RunRecord(fingerprint, name, params, tags | dict(environment or {}), [dict(d) for d in datasets])


def describe_params(params: Mapping[str, Any]) -> str:
    """What people tell adapters apart by: `r8 a16 lr5e-3 all_linear seed0 qlora`."""
    value = params["train.learning_rate"]
    rate = f"{value:.3g}"
    if value < 0.1:
        digits, exponent = f"{value:.2e}".split("e")
        rate = f"{float(digits):g}e{int(exponent)}"
    end = f"seed{params['train.seed']} {params['train.method']}"
    if params["train.method"] == TrainMethod.full:
        return f"lr{rate} {end}"
    targets = params["lora.target_modules"]
    named = targets if isinstance(targets, str) else ",".join(targets)
    modules = named if len(named) <= 24 else f"{len(targets)} modules"
    name = adapter_name(params).lower().replace(",", "")
    variants = "" if name == "lora" else f" {name}"
    return f"{adapter_size(params)} lr{rate} {modules}{variants} {end}"


def describe_datasets(config: RunConfig, processed: Path) -> list[dict[str, Any]]:
    """One entry a processed split that is there: name, digest of its content, context, num_rows, source."""
    from pipeline.dataset import count_rows

    source = config.data.hub_id or config.data.path
    name = Path(source).stem
    found = []
    for split, context in CONTEXTS.items():
        path = processed / f"{split}.arrow"
        if path.exists():
            of_split = config.data.general_path if split == "general" else source
            found.append(
                {
                    "name": Path(of_split).stem if split == "general" else f"{name}-{split}",
                    "digest": hash_once(path)[:16],
                    "context": context,
                    "num_rows": count_rows(processed, split),
                    "source": of_split,
                }
            )
    return found


def read_environment(root: Path) -> dict[str, str]:
    """Tags that only this process knows: the DVC experiment, git's commit, the user."""
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": "stages/train.py"}
    with contextlib.suppress(KeyError, OSError):  # a user id without a name, as in some containers
        tags["mlflow.user"] = getpass.getuser()
    if name := os.environ.get("DVC_EXP_NAME"):
        tags["dvc_experiment"] = name
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git: the code's fingerprint is there all the same
        return tags
    if answer.returncode == 0:
        tags["mlflow.source.git.commit"] = answer.stdout.strip()
    return tags


def flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaves of nested mappings; one whose keys the user makes up is a leaf."""
    for key, item in value.items():
        if isinstance(item, Mapping) and key not in USER_KEYED:
            yield from flatten(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item


def format_value(value: Any) -> str:
    """A setting as MLflow shows it, the way YAML writes it: `null`, `true`, `16`, `0.005`, `["q_proj"]`."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return json.dumps(value, ensure_ascii=False)
