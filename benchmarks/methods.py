"""Every adapter method on one task with one budget: which differences are real.

    python -m benchmarks.methods --out methods                    # all methods, three seeds
    python -m benchmarks.methods qlora dora vera --seeds 2 --out some

E2E with stories260K (--real), the same rows and steps for all. Each method's learning rate is chosen on validation loss
with seed 0 among three values, and one more where the best lies on an end (`edge`: it still does). Then every method
gets the same seeds. Peak memory, above what imports take, is of a process of its own that makes half of the steps.
Intervals are over test rows and seeds (`pipeline.sweep_statistics`). Results are kept by fingerprint in --out: the same
command goes on where it was stopped. Writes methods.json and methods.md there.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ALL_SCORES = ("loss", "bleu", "rouge_l", "forgetting")
MAX_WIDER = 1  # values tried beyond an end of the three


@dataclass(frozen=True)
class Method:
    """Attributes:
    lora, train, quantization: files of these groups.
    rates: learning rates to choose from, rising.
    """

    lora: str = "all_linear"
    train: str = "qlora"
    quantization: str = "nf4"
    rates: tuple[float, ...] = (2e-3, 5e-3, 1e-2)

    @property
    def reference(self) -> str:
        """Plain LoRA on the same base."""
        return "lora" if self.train in ("lora", "full") else "qlora"

    @property
    def overrides(self) -> list[str]:
        return [f"lora={self.lora}", f"train={self.train}", f"quantization={self.quantization}"]


HIGH, LOW = (2e-2, 4e-2, 8e-2), (5e-4, 1e-3, 2e-3)
METHODS = {
    "qlora": Method(),
    "qlora_fp4": Method(quantization="fp4"),
    "qlora_int8": Method(quantization="int8"),
    "lora": Method(train="lora"),
    "full": Method(train="full", rates=LOW),
    "rslora": Method("rslora"),
    "dora": Method("dora"),
    "lora_plus": Method(train="lora_plus", rates=LOW),
    "lora_fa": Method(train="lora_fa"),
    "adalora": Method("adalora", rates=(5e-3, 1e-2, 2e-2)),
    "pissa": Method("pissa", "lora"),
    "olora": Method("olora", "lora"),
    "corda": Method("corda", "lora"),
    "loftq": Method("loftq"),
    "eva": Method("eva"),
    "mora": Method("mora"),
    "adamix": Method("adamix"),
    "vera": Method("vera", rates=HIGH),
    "hira": Method("hira", rates=HIGH),
    "miss": Method("miss"),
    "oft": Method("oft"),
    "adamw_8bit": Method(train="adamw_8bit"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)}; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=300, help="test rows that are answered and scored")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at once, of one thread")
    parser.add_argument("--real", type=Path, default=Path("../shared/real"), help="folder of stories260K and E2E")
    parser.add_argument("--out", type=Path, required=True, help="folder for trainings and results")
    options = parser.parse_args()
    names = options.methods or list(METHODS)
    if unknown := set(names) - set(METHODS):
        parser.error(f"{', '.join(sorted(unknown))}: no such method; there are {', '.join(METHODS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["DVC_ROOT"] = str(options.out.resolve())  # the store and the runs lie there
    os.chdir(ROOT)
    common = settings(options.real.resolve(), options.steps)
    quick = ["evaluate=loss_only", "evaluate.max_rows=8", "evaluate.general_max_rows=8"]
    rates = choose_rates(names, [*common, *quick], options)
    whole = [f"evaluate.max_rows={options.rows}", "evaluate.max_new_tokens=100", "evaluate.batch_size=64"]
    points = [
        [*common, *whole, *METHODS[name].overrides, f"train.learning_rate={rates[name]:g}", f"train.seed={seed}"]
        for name in names
        for seed in range(options.seeds)
    ]
    folders = run_points("scored", points, options)
    trainings = {
        name: [*points[i * options.seeds], f"train.max_steps={options.steps // 2}"] for i, name in enumerate(names)
    }
    inputs = {name: folders[i * options.seeds] for i, name in enumerate(names)}
    with ThreadPoolExecutor(options.workers) as pool:
        memory = dict(
            zip(names, pool.map(lambda n: peak_memory(n, trainings[n], inputs[n], options.out), names), strict=True)
        )
    write_results(folders[0].parent, names, rates, memory, options)
    return 0


def peak_memory(name: str, overrides: list[str], inputs: Path, out: Path) -> int:
    """Bytes above those taken before the base is loaded, of a training in a process of its own."""
    from pipeline.files import read_json

    own = [f"runtime.inputs_dir={inputs.resolve()}", f"runtime.output_dir={out.resolve() / 'memory' / name}"]
    own += ["runtime.num_threads=1", "runtime.progress=false"]
    command = [sys.executable, "-m", "stages.train", *overrides, *own]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
    metrics = read_json(out / "memory" / name / "metrics/train.json")
    return int(metrics["peak_memory_bytes"]) - int(metrics["baseline_memory_bytes"])


def settings(real: Path, num_steps: int) -> list[str]:
    """What all methods share."""
    return [
        "data=local", f"data.path={real / 'e2e'}", "data.files.train=train.jsonl", "data.files.validation=valid.jsonl",
        "data.files.test=test.jsonl", "data.max_length=384", "model=local", f"model.path={real / 'models/stories260K'}",
        "model.dtype=float32", "model.chat_template=conf/chat_templates/plain_bos_ends.jinja",
        f"train.max_steps={num_steps}", "train.micro_batch_size=8", "train.warmup_ratio=0", "train.eval_steps=100",
        "train.eval_max_rows=500", "evaluate.general_max_rows=100", "runtime.system_metrics=false",
    ]  # fmt: skip


def choose_rates(names: list[str], common: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Each method's learning rate with the lowest validation loss of seed 0."""
    from pipeline.files import read_json
    from pipeline.points import Point, State

    tried: dict[str, dict[float, float]] = {name: {} for name in names}
    wanted = {name: list(METHODS[name].rates) for name in names}
    for _ in range(MAX_WIDER + 1):
        todo = [(name, rate) for name in names for rate in wanted[name]]
        if not todo:
            break
        points = [[*common, *METHODS[n].overrides, f"train.learning_rate={r:g}", "train.seed=0"] for n, r in todo]
        for (name, rate), folder in zip(todo, run_points("rates", points, options), strict=True):
            point = Point.load(folder)
            finished = point.state is State.finished
            loss = read_json(folder / "metrics/train.json")["validation_loss"] if finished else math.inf
            tried[name][rate] = loss
            print(
                f"{name:12} {rate:8g} {loss:.4f}" + ("" if finished else f"  {point.state}: {point.reason}"), flush=True
            )
        wanted = {name: wider(tried[name]) for name in names}
    (options.out / "rates.json").write_text(json.dumps(tried, indent=2) + "\n")
    if failed := [name for name in names if not any(map(math.isfinite, tried[name].values()))]:
        raise SystemExit(f"{', '.join(failed)}: no learning rate gave a loss; see {options.out}/multirun/rates")
    return {name: min(tried[name], key=lambda rate: tried[name][rate]) for name in names}


def wider(losses: dict[float, float]) -> list[float]:
    """The next learning rate beyond the end on which the best lies, if it lies on one."""
    rates, best = sorted(losses), min(losses, key=lambda rate: losses[rate])
    if not math.isfinite(losses[best]):
        return []
    if best == rates[-1]:
        return [2 * best]
    return [best / 2] if best == rates[0] else []


def run_points(name: str, points: list[list[str]], options: argparse.Namespace) -> list[Path]:
    from pipeline.local_backend import LocalBackend
    from pipeline.sweeps import SweepRun

    folder, command = options.out / "multirun" / name, shlex.join(["python", "-m", "benchmarks.methods", *sys.argv[1:]])
    backend = LocalBackend(options.workers, 1, True)
    try:
        return SweepRun(folder, command, "local", backend, runtime=["runtime.num_threads=1"]).launch(points, 0)
    finally:
        backend.close()


def write_results(
    folder: Path, names: list[str], rates: dict[str, float], memory: dict[str, int], options: argparse.Namespace
) -> None:
    """methods.json and methods.md: a row a method, beside plain LoRA on the same base, and beside the best."""
    from pipeline.compare_points import read_groups
    from pipeline.points import Sweep

    groups, left_out = read_groups(Sweep.load(folder))
    for point in left_out:
        print(f"left out: {point.point} {names[int(point.point) // options.seeds]}: {point.reason}")
    (group,) = groups
    of_setting = [names[int(setting.any_point.name) // options.seeds] for setting in group.settings]
    compared = {score: group.compare(score) for score in ALL_SCORES if score in group.scores}
    tried = json.loads((options.out / "rates.json").read_text())
    best = min(range(len(of_setting)), key=lambda i: group.settings[i].mean("validation_loss"))
    references = [METHODS[name].reference for name in of_setting]
    versus = {n: compared["loss"].versus(of_setting.index(n)) for n in set(references) if n in of_setting}
    versus_best = compared["loss"].versus(best)
    rows: list[dict[str, Any]] = []
    for i, setting in enumerate(group.settings):
        rows.append({
            "method": of_setting[i],
            "learning_rate": rates[of_setting[i]],
            "trainable_parameters": int(setting.mean("trainable_parameters")),
            "validation_loss": setting.mean("validation_loss"),
            "scores": {name: _estimate(found.estimate(i)) for name, found in compared.items()},
            "is_on_edge": rates[of_setting[i]] in (min(edges := [*map(float, tried[of_setting[i]])]), max(edges)),
            "reference": references[i],
            "minus_reference": _versus(versus[references[i]][i]) if references[i] in versus else None,
            "minus_best": _versus(versus_best[i]),
            "training_seconds": setting.mean("training_seconds"),
            "memory_bytes": memory[of_setting[i]],
        })  # fmt: skip
    rows.sort(key=lambda row: row["scores"]["loss"]["value"])
    found = {"best": of_setting[best], "seeds": options.seeds, "steps": options.steps, "rows": rows}
    (options.out / "methods.json").write_text(json.dumps(found, indent=2) + "\n")
    text = table(rows)
    (options.out / "methods.md").write_text(text)
    print(text)


def _estimate(estimate: Any) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.interval.low, "high": estimate.interval.high}


def _versus(versus: Any) -> dict[str, Any]:
    interval = versus.interval
    return {
        "value": versus.difference, "low": interval.low, "high": interval.high, "p": versus.p_value,
        "standing": str(versus.standing),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    scores = list(rows[0]["scores"])
    heads = ["method", "learning rate", "parameters", *scores, "loss - LoRA", "seconds", "memory, MB"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in rows:
        estimates = [_text(row["scores"][name], 1 if name == "bleu" else 3) for name in scores]
        is_same = row["minus_best"]["standing"] in ("same", "best")
        edge = " (edge)" if row["is_on_edge"] else ""
        versus = row["minus_reference"]
        cells = [
            f"**{row['method']}**" if is_same else row["method"], f"{row['learning_rate']:g}{edge}",
            f"{row['trainable_parameters']:,}", *estimates, _text(versus, 3, "+") if versus else "-",
            f"{row['training_seconds']:.0f}", f"{row['memory_bytes'] / 1e6:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _text(found: dict[str, float], decimals: int, sign: str = "") -> str:
    value, low, high = (f"{found[key]:{sign}.{decimals}f}" for key in ("value", "low", "high"))
    return f"{value} [{low} {high}]"


if __name__ == "__main__":
    sys.exit(main())
