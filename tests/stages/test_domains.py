"""One domain after another, in every way, on a tiny base; killed and gone on with; and by its real command."""

import copy
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import stages.domains
from pipeline import crma, domains, o_lora, store
from pipeline.config import compose_config
from pipeline.dataset import load_split
from pipeline.domain_evaluation import Measurer
from pipeline.domain_matrix import summarize
from pipeline.domain_osf import check_osf_layers
from pipeline.domains import DomainRun, SeedLosses, find_domains, replayed
from pipeline.errors import ConfigError, Interrupted, ModelError
from pipeline.files import hash_path, read_json, read_jsonl
from pipeline.lora import load_adapter
from pipeline.losses import Loss, measure_loss
from pipeline.project_models import ProjectModels, check_adapter
from pipeline.provenance import check_provenance, write_provenance
from pipeline.schema import DomainMethod, RunConfig
from pipeline.shared_inputs import Inputs
from pipeline.training import Trainer
from pipeline.workspace import Workspace
from tests.conftest import ROOT, Project
from tests.standins import CPU, make_model, write_processed

WAYS = [str(method) for method in DomainMethod]
KILLED = ["orthogonal", *(pytest.param(way, marks=pytest.mark.slow) for way in ("sequential", "constrained", "osf"))]


class Small:
    """Two made-up domains and a random base; `run` trains on them, in a store of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.composed: dict[tuple[str, ...], RunConfig] = {}
        make_model(folder / "base")
        for number, name in enumerate("ab"):
            path = folder / f"conf/data/{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {name}\ndefaults: [base]\npath: {folder}\nfiles: {{train: {name}.jsonl}}\n")
            write_processed(folder / name / "processed", seed=100 * number)
        for domain in find_domains(["a", "b"], self.overrides()):
            write_provenance(folder / domain.name / "processed", "prepare", domain.config.data, domain.config.model)
        monkeypatch.setattr(domains.SharedInputs, "of", self._inputs)
        monkeypatch.setattr(domains, "compose_config", self._compose)  # half a second each time

    def _inputs(self, points: list) -> dict[int, Inputs]:
        processed = [self.folder / point.swept["domain"] / "processed" for point in points]
        return {point.number: Inputs(p, self.folder) for point, p in zip(points, processed, strict=True)}

    def _compose(self, overrides: Sequence[str]) -> RunConfig:
        key = tuple(overrides)
        if key not in self.composed:
            self.composed[key] = compose_config(overrides)
        return copy.deepcopy(self.composed[key])

    def overrides(self, *more: str) -> list[str]:
        return [
            f"hydra.searchpath=[file://{self.folder}/conf]", "data.domains=[a,b]", "model=local",
            f"model.path={self.folder / 'base'}", "model.dtype=float32", "train=lora", "quantization=none", "lora.r=2",
            "train.max_steps=6", "train.micro_batch_size=4", "train.eval_steps=3", "train.keep=last",
            "train.learning_rate=5e-3", "runtime.device=cpu", "runtime.progress=false", "runtime.tracking=false",
            "runtime.checkpoint_steps=2", "runtime.on_misfit=ignore", *more,
        ]  # fmt: skip

    def run(self, name: str, way: str, *more: str, store: str = "store") -> dict[int, SeedLosses]:
        self.monkeypatch.setenv("DVC_ROOT", str(self.folder / store))
        overrides = self.overrides(f"domains={way}", *more)
        return DomainRun(self._compose(overrides), overrides, "command", self.folder / name, CPU).run()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Small(tmp_path_factory.mktemp("domains"), monkeypatch)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_and_is_measured(small: Small, way: str) -> None:
    found = small.run(way, way)
    summary = summarize(["a", "b"], found)
    after = [summary["loss"]["a"][name]["value"] for name in ("base", "a", "b")]
    assert after[0] != after[1]
    if way == "modular":
        assert after[1] == after[2]
        assert summary["change"]["a"]["b"]["value"] == 0
        assert summary["loss"]["b"]["a"]["value"] == summary["loss"]["b"]["base"]["value"]
    else:
        assert after[1] != after[2]
    figures = summary["figures"]["b"]
    if way == "orthogonal":
        assert 0 < figures["overlap_after"] < figures["overlap_before"] < 0.2
        assert "overlap_before" not in summary["figures"]["a"]
        whole = small.folder / way / "seed0-sum/models/adapter"
        loss = measured(small, whole, "test")
        assert loss == pytest.approx(summary["loss"]["b"]["b"]["value"], rel=1e-5)
        assert loss != pytest.approx(measured(small, small.folder / way / "seed0-b/models/adapter", "test"), rel=2e-5)
    if way == "constrained":
        assert 0.99 < figures["spectral_norm"] <= 1 + 1e-6
        assert (small.folder / way / "seed0-b/models/adapter/mixing.safetensors").exists()
    if way == "osf":  # what was saved is a plain model, and the one that was measured
        model = AutoModelForCausalLM.from_pretrained(small.folder / way / "seed0-b/models/adapter").eval()
        loss = measure_loss(model, load_split(small.folder / "b/processed", "test"), 4, 0).loss
        assert loss == pytest.approx(summary["loss"]["b"]["b"]["value"], rel=1e-5)


def test_a_chain_goes_on_where_the_one_before_ended(small: Small) -> None:
    """The loss before the second training's first step is the first adapter's, and of modular the base's."""
    for way in ("sequential", "modular"):
        small.run(way, way)
    first = measured(small, small.folder / "sequential/seed0-a/models/adapter")
    history = read_jsonl(small.folder / "sequential/seed0-b/reports/train/history.jsonl")
    assert history[0]["validation.loss"] == pytest.approx(first, rel=1e-5)
    fresh = read_jsonl(small.folder / "modular/seed0-b/reports/train/history.jsonl")
    assert fresh[0]["validation.loss"] == pytest.approx(measured(small, None), rel=1e-5)
    assert first != pytest.approx(measured(small, None), rel=1e-3)


def test_replay_and_constrained_start_from_what_was_learned(small: Small) -> None:
    """Replay goes on with the first adapter, on the first domain's rows too; constrained with the first mixing alone."""
    for way in ("replay", "constrained"):
        small.run(way, way)
    first = {way: small.folder / way / "seed0-a/models/adapter" for way in ("replay", "constrained")}
    start = {way: before_training(small, way) for way in first}
    assert start["replay"] == pytest.approx(measured(small, first["replay"]), rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(small.folder / "base").eval()
    crma.attach_mixing(model, 2, 50, first["constrained"])
    validation = load_split(small.folder / "b/processed", "validation")
    assert start["constrained"] == pytest.approx(measure_loss(model, validation, 4, 0).loss, rel=1e-5)
    assert start["constrained"] != pytest.approx(measured(small, None), rel=1e-4)
    rows, of_a = (load_split(small.folder / f, "train") for f in ("replay/seed0-b/data/processed", "a/processed"))
    prompts = {rows.prompt(i) for i in range(len(rows)) if rows.row_id(i).startswith("a/")}
    assert len(rows) > len(load_split(small.folder / "b/processed", "train"))
    assert prompts
    assert prompts <= {of_a.prompt(i) for i in range(len(of_a))}
    alone = load_split(small.folder / "constrained/seed0-b/data/processed", "train")
    assert not any(alone.row_id(i).startswith("a/") for i in range(len(alone)))


def before_training(small: Small, way: str) -> float:
    """Loss on domain b's validation split before the second training's first step."""
    return read_jsonl(small.folder / way / "seed0-b/reports/train/history.jsonl")[0]["validation.loss"]


def test_half_of_a_constrained_model_is_refused(small: Small) -> None:
    """Without its mixing adapter it answers as another model: nothing else may load it as plain LoRA."""
    small.run("constrained", "constrained")
    folder = small.folder / "constrained/seed0-b/models/adapter"
    base = AutoModelForCausalLM.from_pretrained(small.folder / "base")
    with pytest.raises(ModelError, match=r"half of a model.*mixing\.safetensors"):
        load_adapter(base, folder)
    with pytest.raises(ModelError, match=r"mixing\.safetensors"):
        o_lora.check_plain(folder)
    load_adapter(base, folder, mixing_follows=True)


def test_provenance_names_the_way_and_all_domains(small: Small) -> None:
    """So that what was trained on a and b is not taken for a model of b, and merge refuses it."""
    for way in ("sequential", "orthogonal", "modular"):
        small.run(way, way)
    config = find_domains(["b"], small.overrides())[0].config
    for way in ("sequential/seed0-b", "orthogonal/seed0-b", "orthogonal/seed0-sum"):
        folder = small.folder / way / "models/adapter"
        with pytest.raises(ConfigError, match=r"data\.domains: made with \['a', 'b'\]"):
            check_provenance(folder, config.data)
        assert read_json(folder / "provenance.json")["way"][0] in ("chained", "orthogonal")
        check_adapter(folder, config)  # it may be asked
    check_provenance(small.folder / "modular/seed0-b/models/adapter", config.train, config.lora, config.data)
    assert "way" not in read_json(small.folder / "modular/seed0-b/models/adapter/provenance.json")
    whole = read_json(small.folder / "orthogonal/seed0-sum/models/adapter/provenance.json")
    assert whole["settings"]["lora"]["r"] == 4
    run = read_json(small.folder / "sequential/seed0-b/models/run.json")
    assert (run["tags"]["domains"], run["tags"]["domains.names"]) == ("chained", "a, b")


def test_what_osf_leaves_is_a_whole_model_to_the_project(small: Small) -> None:
    small.run("osf", "osf")
    folder = small.folder / "osf/seed0-b/models/adapter"
    config = compose_config(small.overrides("data=b", "data.domains=[]", "train=full"))
    check_adapter(folder, config)
    ids = torch.arange(3, 30)[None]
    models = ProjectModels(config, Workspace(small.folder, small.folder), CPU)
    loaded = models.load("adapter", {"default": folder})
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(loaded(ids).logits, expected(ids).logits)
    base = AutoModelForCausalLM.from_pretrained(small.folder / "base").eval()
    assert not torch.allclose(loaded(ids).logits, base(ids).logits)


@pytest.mark.parametrize("way", ["sequential", "osf"])
def test_a_domain_that_does_not_improve_leaves_the_start(
    small: Small, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With keep=best the second domain may keep step 0: the sequence goes to its end, and says so."""
    right, starts = Trainer._measure, []

    def better_then_worse(self: Trainer) -> Loss:
        found = right(self)
        starts.extend([found] * (self.progress.step == 0))
        factor = 1 + self.progress.step
        return dataclasses.replace(found, loss=found.loss / factor if len(starts) == 1 else found.loss * factor)

    monkeypatch.setattr(Trainer, "_measure", better_then_worse)
    found = small.run(f"worse-{way}", way, "train.keep=best", store=f"worse-{way}")
    assert len(starts) == 2
    assert "whose weights are kept and go on" in caplog.text
    summary = summarize(["a", "b"], found)
    assert summary["loss"]["a"]["b"]["value"] == pytest.approx(summary["loss"]["a"]["a"]["value"], rel=1e-4)


def test_osf_refuses_what_it_cannot_train() -> None:
    with pytest.raises(ConfigError, match=r"domains\.osf_share: 0\.01 of the 32 .*set 0\.032"):
        check_osf_layers({"up": torch.nn.Linear(32, 64)}, 0.01)
    assert check_osf_layers({"up": torch.nn.Linear(32, 64)}, 0.032)
    with pytest.raises(ConfigError, match="osf trains linear layers; h is a Conv1D"):
        check_osf_layers({"h": Conv1D(4, 4)}, 0.5)


def test_a_gates_conditions_on_answers_are_no_matter_here(small: Small) -> None:
    condition = "gate.conditions=['adapter.rouge_l > 0.1']"
    (domain,) = find_domains(["a"], small.overrides(condition))
    assert domain.config.gate.conditions == []


def test_what_was_trained_before_a_failure_goes_to_mlflow(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    class Failing:
        def __init__(self, *_: object) -> None:
            called.append("made")

        def run(self) -> None:
            raise Interrupted("stopped")

        def record(self) -> None:
            called.append("recorded")

    monkeypatch.setattr("stages.domains.DomainRun", Failing)
    with pytest.raises(Interrupted):
        stages.domains.run(compose_config(small.overrides()), Workspace(small.folder, small.folder))
    assert called == ["made", "recorded"]


def test_no_measured_model_is_held_while_the_next_domain_trains(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[tuple[bool, bool]] = []  # before and after it is let go
    right, train = Measurer.release, DomainRun._train
    measurers = set()

    def watched(self: Measurer) -> None:
        was_held = self._loaded is not None
        right(self)
        held.append((was_held, self._loaded is not None))
        measurers.add(self)

    def watched_train(self: DomainRun, *arguments: Any) -> Path:
        assert all(measurer._loaded is None for measurer in measurers)
        assert held[-1] == (True, False)
        return train(self, *arguments)

    monkeypatch.setattr(Measurer, "release", watched)
    monkeypatch.setattr(DomainRun, "_train", watched_train)
    small.run("released", "sequential", store="released")
    assert len(measurers) == 1


def measured(small: Small, adapter: Path | None, split: str = "validation") -> float:
    """Loss on a split of domain b."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(small.folder / "base")
    model = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)
    return measure_loss(model.eval(), load_split(small.folder / "b/processed", split), 4, 0).loss


def test_nothing_is_computed_twice(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small.run("orthogonal", "orthogonal")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained or measured again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.finetuning.finetune", refuse)
        patch.setattr("pipeline.domain_evaluation.measure_rows", refuse)
        assert small.run("again", "orthogonal") == first
    points = [read_json(path) for path in sorted((small.folder / "again").glob("*/point.json"))]
    assert [point["training"] for point in points] == ["store", "store"]
    same = [hash_path(small.folder / name / "seed0-a/models/adapter") for name in ("sequential", "orthogonal")]
    assert same[0] == same[1]  # the first training is the same whatever comes after


class StopAfter:
    """In the place of `StopRequest`: a stop comes after so many steps."""

    left = 0

    def __enter__(self) -> "StopAfter":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @property
    def received(self) -> str | None:
        StopAfter.left -= 1
        return "SIGTERM" if StopAfter.left == 0 else None


@pytest.mark.parametrize("way", KILLED)
def test_killed_in_the_second_domain_it_goes_on_to_the_same_bytes(small: Small, way: str) -> None:
    small.run(way, way)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.training.StopRequest", StopAfter)
        StopAfter.left = 6 + 3  # of the second training's 6 steps
        with pytest.raises(Interrupted):
            small.run(f"killed-{way}", way, store=f"killed-{way}")
    small.run(f"killed-{way}", way, store=f"killed-{way}")
    again = [read_json(path)["training"] for path in sorted((small.folder / f"killed-{way}").glob("*/point.json"))]
    assert again == ["store", "resumed"]
    hashes = [hash_path(small.folder / name / "seed0-b/models/adapter") for name in (way, f"killed-{way}")]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hash_path(small.folder / way / "seed0-a/models/adapter")


def test_seeds_are_trained_each(small: Small) -> None:
    found = small.run("seeds", "sequential", "domains.seeds=[0,1]")
    assert list(found) == [0, 1]
    assert found[0].test[0] == found[1].test[0]  # the base
    assert found[0].test[1] != found[1].test[1]


def test_replay_draws_as_many_of_each_domain(small: Small) -> None:
    own, a, b = (load_split(small.folder / name / "processed", "train") for name in ("b", "a", "b"))
    rows = replayed(own, {"a": a, "b": b}, 0.5, 0)
    names = [row.row_id for row in rows]
    assert len(rows) == 12 + 3 + 3
    assert [sum(name.startswith(f"{domain}/") for name in names) for domain in "ab"] == [3, 3]
    assert len(set(names)) == len(names)
    assert [row.row_id for row in replayed(own, {"a": a, "b": b}, 0.5, 0)] == names
    assert [row.row_id for row in replayed(own, {"a": a, "b": b}, 0.5, 1)] != names
    first = next(row for row in rows if row.row_id.startswith("a/"))
    index = next(i for i in range(12) if f"a/{a.row_id(i)}" == first.row_id)
    assert list(first.input_ids) == list(a.input_ids(index))


def test_a_domain_that_is_not_there_is_named(small: Small) -> None:
    with pytest.raises(ConfigError, match=r"data\.domains: nosuch: .*data/nosuch"):
        find_domains(["a", "nosuch"], small.overrides())


def test_the_overrides_hold_for_all_domains(small: Small) -> None:
    first, second = find_domains(["a", "b"], small.overrides("data.max_rows=7", "domains=replay"))
    assert (first.config.data.max_rows, second.config.data.files.train) == (7, "b.jsonl")
    assert second.config.data.domains == []
    assert second.config.domains.method == "replay"


@pytest.mark.parametrize("override", ["data.path=/x", "data.files.train=y.jsonl", "data.hub_id=a/b"])
def test_rows_for_all_domains_are_refused(small: Small, override: str) -> None:
    with pytest.raises(ConfigError, match="the same rows"):
        find_domains(["a", "b"], small.overrides(override))


def test_plain_trainings_are_not_of_a_way(small: Small) -> None:
    """A first domain's training has the fingerprint that `stages.train` gives it."""
    small.run("modular", "modular")
    from pipeline.stored_training import identify

    folder = small.folder / "modular/seed0-a"
    config = find_domains(["a"], small.overrides())[0].config
    small.monkeypatch.setenv("DVC_ROOT", str(small.folder / "store"))
    assert read_json(folder / "point.json")["fingerprint"] == identify(config, Workspace(folder, folder))[0]
    assert store.is_finished(read_json(folder / "point.json")["fingerprint"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_command_prepares_trains_and_reports(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    conf = tmp_path / "conf/data"
    conf.mkdir(parents=True)
    for name, answer in (("left", "yes"), ("right", "no")):
        numbers = torch.randperm(1000, generator=generator)[:80].tolist()  # no two rows the same
        rows = [{"instruction": f"Say it for {n}.", "input": "", "output": f"{answer} {n}"} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (conf / f"{name}.yaml").write_text(
            f"# {name}\ndefaults: [base]\npath: {tmp_path}\nfiles: {{train: {name}.jsonl}}\nmax_length: 128\n"
        )
    project = Project(ROOT)
    project.env |= {"DVC_ROOT": str(tmp_path / "store"), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    command = (
        f"python -m stages.domains 'hydra.searchpath=[file://{tmp_path}/conf]' data.domains=[left,right] train=lora "
        "quantization=none train.max_steps=8 train.micro_batch_size=8 runtime.device=cpu runtime.progress=false "
        f"runtime.system_metrics=false evaluate.general_max_rows=8 runtime.output_dir={tmp_path}/out"
    )
    said = project.run(command, timeout=900)
    assert "MLflow: out/seed0-left" in said
    assert "| change since its own training |" in said
    found = read_json(tmp_path / "out/metrics/domains.json")
    assert found["method"] == "sequential"
    assert (tmp_path / "out/reports/domains/matrix.png").stat().st_size > 5000
    assert "taken from .training" in project.run(command, timeout=900)
    assert "such as data.domains=[a,b,c]" in project.run("python -m stages.domains", ok=False)
