"""Which model a plan is for: the configured one, a folder, a Hub id, or a size known by name. Without weights."""

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig
from transformers import AutoConfig, PreTrainedConfig

from pipeline.config import CONF
from pipeline.errors import ConfigError, ModelError
from pipeline.model_files import CONFIG, check_revision, hub_errors, model_folder
from pipeline.modeling import load_config
from pipeline.schema import ModelConfig

SIZES = Path(__file__).parent / "sizes"


@dataclass(frozen=True)
class Size:
    """A published architecture by a short name.

    Attributes:
        source: address of the config.json that it was read from.
        hub_ids: models on the Hub with this architecture.
        num_parameters: as published.
    """

    name: str
    source: str
    hub_ids: tuple[str, ...]
    num_parameters: int
    config: dict[str, Any]

    def model_config(self) -> PreTrainedConfig:
        settings = {key: value for key, value in self.config.items() if key != "model_type"}
        return AutoConfig.for_model(self.config["model_type"], **settings)


@dataclass(frozen=True)
class PlannedModel:
    """Attributes:
    source: where `config` comes from, for people.
    """

    name: str
    source: str
    config: PreTrainedConfig


def sizes() -> dict[str, Size]:
    """Every named size, the smallest first."""
    found = []
    for path in SIZES.glob("*.json"):
        size = json.loads(path.read_text(encoding="utf-8"))
        found.append(Size(path.stem, size["source"], tuple(size["hub_ids"]), size["num_parameters"], size["config"]))
    return {size.name: size for size in sorted(found, key=lambda size: size.num_parameters)}


def find_model(composed: DictConfig, asked: str | None) -> PlannedModel:
    """The model to plan for. Where it is not the folder `model.path`, `composed.model` no longer names the Hub.

    Args:
        composed: the settings before they are checked: a plan needs no pinned revision.
        asked: the name of a size, a folder, or a Hub id (`owner/name`, `owner/name@REVISION`); None: `model.*`.

    Raises:
        ConfigError: `asked` is none of these; a configured Hub model that is not pinned and no named size.
        ModelError: a folder or config.json that cannot be used; the Hub cannot be reached.
    """
    model = composed.model
    hub_id, revision = model.hub_id, model.revision
    if asked is None and hub_id is None:
        folder = model_folder(ModelConfig(path=model.path, hub_id=None))
        return PlannedModel(folder.name, f"config.json of {folder}", load_config(folder, model.trust_remote_code))
    if asked is None and revision is None and _size_of(hub_id) is None:
        check_revision(ModelConfig(path=model.path, hub_id=hub_id, revision=None))
    model.hub_id = model.revision = None
    if asked is None:
        return _from_hub(hub_id, revision) if revision is not None else _in_its_place(hub_id, "no model.revision")
    if asked in sizes():
        size = sizes()[asked]
        return PlannedModel(asked, f"named size, from {size.source}", size.model_config())
    if Path(asked).is_dir():
        folder = model_folder(ModelConfig(path=str(Path(asked).resolve()), hub_id=None))
        return PlannedModel(folder.name, f"config.json of {folder}", load_config(folder))
    wanted = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(\w+))?", asked)
    if wanted is None or asked.startswith((".", "/")):
        near = difflib.get_close_matches(asked, sizes(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known sizes: {', '.join(sizes())}."
        raise ConfigError(f"--model: {asked!r} is no folder, no Hub id (owner/name) and no named size; {hint}")
    return _from_hub(wanted[1], wanted[2] or _pinned_revision(wanted[1]))


def _size_of(hub_id: str) -> Size | None:
    return next((size for size in sizes().values() if hub_id in size.hub_ids), None)


def _in_its_place(hub_id: str, why: str) -> PlannedModel:
    size = _size_of(hub_id)
    assert size is not None
    return PlannedModel(size.name, f"the named size of {hub_id}: {why}", size.model_config())


def _from_hub(hub_id: str, revision: str | None) -> PlannedModel:
    """By its config.json alone; by its named size where the Hub does not give that."""
    from huggingface_hub import hf_hub_download

    model = ModelConfig(hub_id=hub_id, revision=revision or "main", path=hub_id)
    try:
        with hub_errors(model):
            path = Path(hf_hub_download(hub_id, CONFIG, revision=revision))
    except ModelError as error:
        if _size_of(hub_id) is not None:
            return _in_its_place(hub_id, str(error).partition(": ")[2].partition("(")[0].partition(". ")[0].strip())
        raise ModelError(f"{error} A plan needs no Hub with --model and one of {', '.join(sizes())}.") from None
    commit = path.parent.name
    pinned = "" if revision else ", the newest today: pin it in conf/model before you train"
    return PlannedModel(hub_id, f"config.json of the Hub at commit {commit[:12]}{pinned}", load_config(path.parent))


def _pinned_revision(hub_id: str) -> str | None:
    """The revision that a file of conf/model pins for this model."""
    for path in sorted((CONF / "model").glob("*.yaml")):
        model = yaml.safe_load(path.read_text(encoding="utf-8"))
        if model.get("hub_id") == hub_id and model.get("revision"):
            return str(model["revision"])
    return None
