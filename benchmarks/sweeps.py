"""A sweep of eight points, from the command to the comparison, beside eight trainings with TRL.

    python -m benchmarks.sweeps                     # every way, three rounds
    python -m benchmarks.sweeps trl fused2 --rounds 1 --json sweep.json

E2E with stories260K (--real), 200 steps of 8 rows, LoRA on all linear layers of an NF4 base: ranks 2, 4, 8, 16 by two
learning rates. TRL's SFTTrainer gets the same rows, tokenised, trains r 8 and measures nothing; ours trains, measures
each adapter's loss on the 630 test rows, and compares. Prepared data and the quantized base are there on both sides.
On two cores there are two ways to use them: one process with two threads, or two with one each (`2` in the name).

    trl, trl2          eight processes, one after another or two at a time
    local, local2      points one after another in one or two workers
    fused, fused2      points together on one base: eight in one worker, or four in each of two
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.works import WORKS, machine, prepare
from pipeline.files import read_json

ROOT = Path(__file__).resolve().parent.parent
NUM_POINTS = 8
WORK = "e2e_nf4"
AXES = ["lora.r=2,4,8,16", "train.learning_rate=2e-3,5e-3"]
WAYS = ("trl", "trl2", "local", "local2", "fused", "fused2")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweeps", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("ways", nargs="*", help=f"of {', '.join(WAYS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--real", type=Path, default=Path("../shared/real"), help="folder of stories260K and E2E")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    ways = options.ways or list(WAYS)
    if unknown := set(ways) - set(WAYS):
        parser.error(f"{', '.join(sorted(unknown))}: no such way; there are {', '.join(WAYS)}")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(WORKS[WORK], folder / "trl", options.real)
        shared = prime(folder / "primed", options.real.resolve())
        for number in range(options.rounds):
            for way in ways:  # by turns: a slow minute of the machine is everybody's
                started = time.perf_counter()
                if way.startswith("trl"):
                    run_trl(folder / "trl", at_once=2 if way.endswith("2") else 1)
                else:
                    run_ours(way, folder / f"{way}{number}", shared, options.real.resolve())
                seconds[way].append(time.perf_counter() - started)
                print(f"round {number + 1}: {way}: {seconds[way][-1]:.1f} s", flush=True)
    print_table(seconds)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "seconds": seconds}, indent=2) + "\n")
    return 0


def print_table(seconds: dict[str, list[float]]) -> None:
    peers = [way for way in seconds if way.startswith("trl")]
    best = min(peers, key=lambda way: statistics.median(seconds[way])) if peers else None
    print(f"\n{'':8}{'seconds (best)':>16}" + (f"  share of {best} (median of rounds, range)" if best else ""))
    for way, found in seconds.items():
        line = f"{way:8}{min(found):16.1f}"
        if best:
            ratios = [mine / peer for mine, peer in zip(found, seconds[best], strict=True)]
            line += f"  {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line)


def settings(real: Path) -> list[str]:
    return [
        "data=local", f"data.path={real / 'e2e'}", "data.files.train=train.jsonl", "data.files.validation=valid.jsonl",
        "data.files.test=test.jsonl", "data.max_length=384", "model=local", f"model.path={real / 'models/stories260K'}",
        "model.dtype=float32", "model.chat_template=conf/chat_templates/plain_bos_ends.jinja", "train.max_steps=200",
        "train.micro_batch_size=8", "train.eval_steps=200", "train.eval_max_rows=500", "evaluate=loss_only",
        "evaluate.general_max_rows=200", "runtime.system_metrics=false",
    ]  # fmt: skip


def prime(store: Path, real: Path) -> list[Path]:
    """The shared inputs, made in a store of their own."""
    store.mkdir()
    sweep(store, "prime", [*settings(real), "train.max_steps=5", "train.keep=last", "evaluate.max_rows=8"], [])
    kinds = {"prepare", "quantize"}
    folders = [path.parent for path in store.glob(".training/shared/*/result.json") if read_json(path)["kind"] in kinds]
    assert len(folders) == len(kinds), folders
    return folders


def run_ours(way: str, store: Path, shared: list[Path], real: Path) -> None:
    for folder in shared:
        shutil.copytree(folder, store / ".training/shared" / folder.name)
    number = 2 if way.endswith("2") else 1
    workers = [f"hydra.launcher.num_workers={number}", f"hydra.launcher.num_threads={max(1, os.cpu_count() // number)}"]
    sweep(store, way, [*settings(real), *AXES], [f"hydra/launcher={way.removesuffix('2')}", *workers])


def sweep(store: Path, name: str, overrides: list[str], launcher: list[str]) -> None:
    command = [sys.executable, "-m", "stages.train", "-m", *overrides, *launcher]
    command.append(f"hydra.sweep.dir={store}/multirun/{name}")
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"DVC_ROOT": str(store)}, text=True, capture_output=True, timeout=1800
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def run_trl(folder: Path, at_once: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // at_once))}
    command = [sys.executable, "-m", "benchmarks.training", WORK, "--side", "trl", "--folder"]

    def one(number: int) -> None:
        own = folder.with_name(f"trl{number}")
        shutil.copytree(folder, own, dirs_exist_ok=True)
        subprocess.run([*command, str(own)], cwd=ROOT, env=environment, check=True, capture_output=True, timeout=1800)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, range(NUM_POINTS)))


if __name__ == "__main__":
    sys.exit(main())
