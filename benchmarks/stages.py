"""Seconds, start-up and memory of every stage but check, for a given configuration.

    python -m benchmarks.stages                       # the embedded data and base
    python -m benchmarks.stages train.max_steps=20    # any overrides of the stages

Runs each stage by hand, one after another, in a temporary folder, and prints for each: seconds in all, in imports,
in the stage's own overhead (what is neither imports nor work), and in its work; peak memory; tokens a second.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("prepare", "quantize", "train", "evaluate", "merge", "report", "gate")
TIMES = re.compile(r"imports ([\d.]+) s, settings [\d.]+ s, work ([\d.]+) s, peak memory ([\d.]+) GB")


def measure(stage: str, overrides: list[str], folder: str, timeout: float) -> dict[str, float]:
    """Runs one stage; seconds by kind and peak gigabytes. Exits with the stage's output when it fails."""
    command = [sys.executable, "-m", f"stages.{stage}", f"runtime.output_dir={folder}", f"runtime.inputs_dir={folder}"]
    command += ["runtime.progress=false", *overrides]
    # DVC_ROOT: a store of training results of its own, or a training done before would be taken from the project's
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "DVC_ROOT": folder}
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    total = time.perf_counter() - started
    found = TIMES.search(done.stdout + done.stderr)
    if done.returncode or not found:
        sys.exit(f"{stage} failed:\n{done.stdout}{done.stderr}")
    imports, work, memory = map(float, found.groups())
    return {
        "total": total,
        "imports": imports,
        "overhead": total - imports - work,
        "work": work,
        "peak_memory_gb": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stages", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("overrides", nargs="*", help="such as train.max_steps=20")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a stage may take")
    args = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'stage':<10}{'total s':>10}{'imports s':>11}{'overhead s':>12}{'work s':>9}{'peak GB':>9}")
        for stage in STAGES:
            row = rows[stage] = measure(stage, args.overrides, folder, args.timeout)
            print(
                f"{stage:<10}{row['total']:>10.1f}{row['imports']:>11.1f}{row['overhead']:>12.1f}{row['work']:>9.1f}{row['peak_memory_gb']:>9.2f}",
                flush=True,
            )
        train = json.loads(Path(folder, "metrics/train.json").read_text(encoding="utf-8"))
    print(f"train: {train['tokens_per_second']:,.0f} tokens/s (padding not counted), {train['num_steps']} steps")
    if args.json:
        args.json.write_text(
            json.dumps({"stages": rows, "tokens_per_second": train["tokens_per_second"]}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
