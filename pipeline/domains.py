"""Trains on one domain after another and measures every domain after each; what was done before is not done again."""

import contextlib
import dataclasses
import logging
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import o_lora
from pipeline.config import compose_config, parse_overrides
from pipeline.dataset import Example, Split, load_split, write_split
from pipeline.domain_evaluation import Measurer, RowLosses
from pipeline.domain_training import train_domain, want_domain
from pipeline.domain_ways import answering, plan_training, summed
from pipeline.errors import ConfigError, PipelineError
from pipeline.files import copy_folder, hash_once, read_json
from pipeline.imports import code_hash
from pipeline.points import Point, State, Sweep, link_inputs
from pipeline.provenance import FILE as PROVENANCE
from pipeline.provenance import write_provenance
from pipeline.schema import DomainMethod, RunConfig
from pipeline.shared_inputs import SharedInputs
from pipeline.shared_results import make_once
from pipeline.tracking_sweeps import open_sweep, record_sweep, tag_point
from pipeline.workspace import ADAPTER, Workspace

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
ROWS = re.compile(r"data\.(path|hub_id|revision|files)\b")  # which rows there are: each domain's file says it
OWN_KEYS = ("data", "data.domains", "runtime.output_dir", "runtime.inputs_dir")  # a domain's are not the sequence's
SPLITS = ("train", "validation", "test", "general")


@dataclass(frozen=True)
class Domain:
    """Attributes:
    overrides: what makes its settings.
    """

    name: str
    overrides: list[str]
    config: RunConfig


@dataclass(frozen=True)
class SeedLosses:
    """What was measured of one seed.

    Attributes:
        test: by number of domains trained on (0: the base), then by domain.
        general: by number of domains trained on, of the model that answers the newest of them.
        figures: by domain, what its training says of its way and cost.
    """

    test: list[list[RowLosses]]
    general: list[RowLosses]
    figures: list[dict[str, float]]


def find_domains(names: Sequence[str], overrides: Sequence[str]) -> list[Domain]:
    """The settings of each: of conf/data/NAME.yaml, and the overrides, which hold for all.

    Raises:
        ConfigError: no such file (it lists those there are), or settings that cannot be; it names the domain.
    """
    kept = []
    for override in parse_overrides(overrides):
        if ROWS.match(override.key_or_group):
            raise ConfigError(
                f"{override.input_line}: would give all domains the same rows; write it into each conf/data/NAME.yaml"
            )
        if override.key_or_group not in OWN_KEYS:
            kept.append(override.input_line or "")
    domains = []
    for name in names:
        # losses alone are measured, and no gate is asked
        own = ["data.domains=[]", "evaluate.generate=false", "gate.conditions=[]"]
        of_domain = [f"data={name}", *kept, *own]
        try:
            domains.append(Domain(name, of_domain, compose_config(of_domain)))
        except ConfigError as error:
            raise ConfigError(f"data.domains: {name}: {error}") from None
    return domains


class DomainRun:
    """A sequence of domains, in a folder shaped like a sweep: a point for each training.

    Args:
        config: of the sequence; `overrides` made it.
    """

    def __init__(self, config: RunConfig, overrides: Sequence[str], command: str, folder: Path, device: "torch.device"):
        self.domains = find_domains(config.data.domains, overrides)
        self.method, self.seeds = config.domains.method, config.domains.seeds or [config.train.seed]
        self._share, self._runtime = config.domains.replay_share, config.runtime
        self._device, self._folder = device, folder
        self._shared, self._held = SharedInputs(), contextlib.ExitStack()
        names = [f"seed{seed}-{domain.name}" for seed in self.seeds for domain in self.domains]
        axes: dict[str, list[Any]] = {"domain": [d.name for d in self.domains], "train.seed": list(self.seeds)}
        self._sweep = Sweep(folder, command, f"domains {self.method}", axes, names, int(time.time() * 1000))

    def run(self) -> dict[int, SeedLosses]:
        """By seed, what was measured.

        Raises:
            PipelineError: a domain's data or training; what was done is kept in the store.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep.save()
        self._sweep.run_id = open_sweep(self._folder, self._runtime)
        self._sweep.save()
        try:
            inputs = self._find_inputs()
            measurer = Measurer(self.domains[0].config, inputs[0].quantized, self._device)
            found = {seed: self._run_seed(seed, inputs, measurer) for seed in self.seeds}
        except BaseException as error:
            self._sweep.end(State.interrupted if isinstance(error, KeyboardInterrupt) else State.failed)
            raise
        finally:
            self._shared.close()
            self._held.close()
        self._sweep.end(State.finished)
        return found

    def record(self) -> None:
        """Sends the trainings to MLflow, children of one run; never raises."""
        record_sweep(self._folder, self._runtime)

    def _find_inputs(self) -> list[Any]:
        """Prepared data and quantised base of each domain."""
        points = [self._point(number, self.seeds[0]) for number in range(len(self.domains))]
        found = self._shared.of(points)
        for point in points:
            inputs = found[point.number]
            if isinstance(inputs, PipelineError):
                raise type(inputs)(f"data.domains: {self.domains[point.number].name}: {inputs}")
        return [found[point.number] for point in points]

    def _point(self, number: int, seed: int) -> Point:
        domain = self.domains[number]
        config = dataclasses.replace(domain.config, train=dataclasses.replace(domain.config.train, seed=seed))
        swept = {"domain": domain.name, "train.seed": seed}
        place = self.seeds.index(seed) * len(self.domains) + number
        folder = self._folder / self._sweep.points[place]
        return Point(folder, place, domain.overrides, swept, self._sweep.command, dataclasses.asdict(config))

    def _run_seed(self, seed: int, inputs: Sequence[Any], measurer: Measurer) -> SeedLosses:
        done: list[Path] = []
        losses = SeedLosses([], [], [])
        self._measure(losses, done, inputs, measurer)
        for number, domain in enumerate(self.domains):
            point = self._point(number, seed)
            processed = inputs[number].processed
            if self.method is DomainMethod.replay and number:
                processed = self._with_replay(number, seed, inputs)
            point.folder.mkdir(parents=True, exist_ok=True)
            link_inputs(point.folder, processed, inputs[number].quantized)
            point.end(State.running)
            measurer.release()
            try:
                done.append(self._train(point, done, losses))
            except BaseException as error:
                stopped = isinstance(error, KeyboardInterrupt)
                point.end(State.interrupted if stopped else State.failed, str(error) or type(error).__name__)
                raise
            logger.info("%s, seed %d: %s", domain.name, seed, point.training)
            self._measure(losses, done, inputs, measurer)
        if self.method is DomainMethod.orthogonal:  # which no training has saved
            self._write_sum(done, self._folder / f"seed{seed}-sum" / ADAPTER, seed)
        return losses

    def _write_sum(self, done: Sequence[Path], folder: Path, seed: int) -> None:
        """Of all adapters; its provenance names all domains, and the rank that it has."""
        copy_folder(summed(done, self._held), folder, link=True)
        config, made = self._point(len(done) - 1, seed).config, read_json(done[-1] / PROVENANCE)
        rank = int(read_json(folder / o_lora.CONFIG)["r"])
        lora = dataclasses.replace(config.lora, r=rank, lora_alpha=rank, lora_dropout=0.0, use_rslora=False)
        data = dataclasses.replace(config.data, domains=[domain.name for domain in self.domains])
        groups = (config.train, lora, config.quantization, config.model, data)
        hashes = [hash_once(each) for each in done]
        extra = {"base_sha256": made["base_sha256"], "way": [str(self.method), "sum", *hashes]}
        write_provenance(folder, "domains", *groups, **extra)

    def _train(self, point: Point, done: Sequence[Path], losses: SeedLosses) -> Path:
        started = time.perf_counter()
        training = plan_training(point.config.domains, done, self._held)
        workspace = Workspace(point.folder, point.folder)
        names = [domain.name for domain in self.domains[: len(done) + 1]]
        wanted = want_domain(point.config, workspace, training, names)
        run = tag_point(wanted.run, self._sweep.name, self._sweep.run_id, point.number, self._sweep.command)
        point.fingerprint = wanted.key
        trained = train_domain(dataclasses.replace(wanted, run=run), self._device)
        point.training, metrics = trained.source, trained.result["metrics"]
        point.seconds = {"train": time.perf_counter() - started}
        keys = ("trainable_parameters", "training_seconds", "validation_loss", *training_figures(metrics))
        losses.figures.append({key: float(metrics[key]) for key in keys})
        point.end(State.finished)
        return workspace.input(ADAPTER)

    def _measure(self, losses: SeedLosses, done: Sequence[Path], inputs: Sequence[Any], measurer: Measurer) -> None:
        row = []
        for number, domain in enumerate(self.domains):
            used = answering(self.method, done, number, self._held)
            row.append(measurer.measure(used, inputs[number].processed, "test", domain.config.evaluate.max_rows))
        losses.test.append(row)
        newest = answering(self.method, done, max(0, len(done) - 1), self._held)
        rows = self.domains[0].config.evaluate.general_max_rows
        losses.general.append(measurer.measure(newest, inputs[0].processed, "general", rows))

    def _with_replay(self, number: int, seed: int, inputs: Sequence[Any]) -> Path:
        """The domain's prepared data with rows of the domains before among its training rows; made once."""
        folders = [each.processed for each in inputs[: number + 1]]
        names = [domain.name for domain in self.domains[:number]]

        def make(target: Path) -> None:
            *earlier, own = (load_split(folder, "train") for folder in folders)
            rows = replayed(own, dict(zip(names, earlier, strict=True)), self._share, seed)
            write_split(target / "train.arrow", rows)
            for name in (*(f"{split}.arrow" for split in SPLITS[1:]), PROVENANCE):
                shutil.copy2(folders[-1] / name, target / name)

        hashes = [hash_once(folder / f"{split}.arrow") for folder in folders for split in SPLITS]
        follows = {"rows": hashes, "names": names, "share": self._share, "seed": seed}
        return make_once("replayed rows", follows | {"code": code_hash("pipeline.domains")}, make, self._held)


def training_figures(metrics: dict[str, Any]) -> list[str]:
    """Names of what a way measures of itself."""
    return [key for key in ("overlap_before", "overlap_after", "spectral_norm", "stochastic_error") if key in metrics]


def replayed(own: Split, earlier: dict[str, Split], share: float, seed: int) -> list[Example]:
    """All own rows, and of each earlier domain equally many, drawn by seed without repeats.

    Args:
        share: rows of the earlier domains together, as a share of the own; at least one of each, at most all.
    """
    examples = [_example(own, row, "") for row in range(len(own))]
    rng = np.random.default_rng([seed, len(earlier)])
    each = max(1, round(share * len(own) / len(earlier)))
    for name, split in earlier.items():
        rows = np.sort(rng.permutation(len(split))[:each])
        examples += [_example(split, int(row), f"{name}/") for row in rows]
    return examples


def _example(split: Split, row: int, prefix: str) -> Example:
    return Example(
        prefix + split.row_id(row), split.input_ids(row), split.completion_mask(row), split.num_prompt_tokens(row),
        split.prompt(row), split.references(row),
    )  # fmt: skip
