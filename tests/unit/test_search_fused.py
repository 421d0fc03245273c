"""A search on the launcher that fuses: each batch is one job, and each of its trials is told its own end."""

import contextlib
import hashlib
import json
import queue
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from hydra_plugins.lora_pipeline.launchers import LocalLauncher
from hydra_plugins.lora_pipeline.optuna_sweeper import OptunaSweeper, OptunaSweeperConf
from pipeline.files import read_json, write_json
from pipeline.jobs import Job, OnEnd
from pipeline.points import Point, State, Sweep
from pipeline.pruning import TRIAL
from pipeline.shared_inputs import Inputs, SharedInputs

MAX_FUSED = 3
PRUNED, FAILED = 1, 3  # numbers of points


class Workers:
    """Stands for the processes: every point gets its end and figures, none is trained."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def count(self) -> int:
        return 1

    def expect(self, num_jobs: int) -> None:
        """Nothing has to start."""

    def close(self) -> None:
        """Nothing runs."""

    def run(self, jobs: Sequence[Job], on_end: OnEnd) -> None:
        for job in jobs:
            self.jobs.append(job)
            for folder in job.folders:
                assert (folder / TRIAL).exists()
                point = Point.load(folder)
                rank = point.swept["lora.r"]
                for name, values in (
                    ("train", {"validation_loss": 1 / rank, "fingerprint": point.fingerprint}),
                    ("evaluate", {"adapter": {"loss": 1 / rank}}),
                ):
                    write_json(folder / f"metrics/{name}.json", values)
                ends = {PRUNED: (State.pruned, "given up"), FAILED: (State.failed, "no luck")}
                point.end(*ends.get(point.number, (State.finished, None)))
            on_end(job, None)


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workers:
    """In the place of processes; of what points share, of MLflow and of the comparison there is nothing here."""
    workers = Workers()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(LocalLauncher, "backend", lambda self: workers)
    inputs = Inputs(tmp_path / "processed", tmp_path / "quantized")
    monkeypatch.setattr(SharedInputs, "of", lambda self, points: {point.number: inputs for point in points})
    monkeypatch.setattr("pipeline.sweeps.identify", lambda config, _: (fingerprint(config.lora.r), {}))
    monkeypatch.setattr("pipeline.sweeps.open_sweep", lambda *_: None)
    monkeypatch.setattr("pipeline.sweeps.record_sweep", lambda *_: None)
    monkeypatch.setattr("pipeline.sweeps.reporting", lambda *_: contextlib.nullcontext(queue.SimpleQueue()))
    monkeypatch.setattr("pipeline.compare.compare", lambda folder: SimpleNamespace(text="compared"))
    return workers


def fingerprint(rank: int) -> str:
    return hashlib.sha256(str(rank).encode()).hexdigest()


def search(folder: Path, fused: bool, *arguments: str) -> None:
    """`stages.train -m hydra/sweeper=optuna hydra/launcher=fused`, all random; a failed point ends it with 1."""
    launcher = LocalLauncher(num_threads=None, fused=fused, max_fused=MAX_FUSED, num_workers=1)
    launcher.stage = "train"
    launcher.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}, "runtime": {"device": "cpu"}})
    settings = OmegaConf.structured(OptunaSweeperConf(n_trials=8, sampler="random"))
    values = {str(key): value for key, value in OmegaConf.to_container(settings).items() if key != "_target_"}
    sweeper = OptunaSweeper(**values)
    sweeper.launcher, sweeper.config = launcher, launcher.config
    sweeper.hydra_context = SimpleNamespace(config_loader=None)  # type: ignore[assignment]
    with pytest.raises(SystemExit, match="1"):
        sweeper.sweep(["lora.r=range(1,30)", "lora.lora_alpha=8", *arguments])


@pytest.mark.parametrize("fused", [True, False])
def test_a_batch_is_one_job_and_each_trial_has_its_own_end(tmp_path: Path, workers: Workers, fused: bool) -> None:
    folder = tmp_path / "multirun/search"
    search(folder, fused)
    names = [[path.name for path in job.folders] for job in workers.jobs]
    made = [name for job in names for name in job]
    assert made == [f"{number:03d}" for number in range(len(made))]
    assert [job.fused for job in workers.jobs] == [fused and len(job.folders) > 1 for job in workers.jobs]
    assert max(map(len, names)) == (MAX_FUSED if fused else 1)  # without, a search waits for each
    trials = json.loads((folder / "search.json").read_text())["trials"]
    assert len(trials) == 8
    points = {name: Point.load(folder / name) for name in Sweep.load(folder).points}
    told = {"complete": State.finished, "pruned": State.pruned, "fail": State.failed}
    assert all(told[trial["state"]] is points[trial["point"]].state for trial in trials)
    assert {trial["state"] for trial in trials} == set(told)
    for trial in trials:
        rank = points[trial["point"]].swept["lora.r"]
        assert trial["value"] == (1 / rank if trial["state"] == "complete" else None)
    assert read_json(folder / "search.json")["best"]["value"] == min(t["value"] for t in trials if t["value"])


def test_what_cannot_share_a_base_is_a_job_of_its_own_in_the_same_batch(tmp_path: Path, workers: Workers) -> None:
    search(tmp_path / "multirun/search", True, "lora.lora_dropout=0.0,0.1")
    for job in workers.jobs:
        dropouts = [Point.load(folder).config.lora.lora_dropout for folder in job.folders]
        assert len(dropouts) == 1 or set(dropouts) == {0.0}
    assert {len(job.folders) for job in workers.jobs} > {1}
