"""Training speed and memory beside what a user would pick instead: TRL, a plain peft loop, one adapter after another.

    python -m benchmarks.training                             # every work that this machine can do, three rounds
    python -m benchmarks.training e2e_fp32 --rounds 1         # one of them
    python -m benchmarks.training llama8b_qlora --json speed.json   # on a GPU

Both sides get the same base, tokens, order of rows, LoRA settings, start and precision, each in a process of its own,
by turns; the table shows the best round of each side, the line below it the median of the rounds' own ratios and their
range (the two sides of a round see about the same machine). TRL is optional: `pip install --no-deps trl==1.16.0`.

Works on a CPU:
    e2e_fp32      stories260K on E2E (--real), LoRA r 8 on all linear layers, batch 8, 200 steps, fp32; beside TRL
    e2e_nf4       the same on an NF4 base with double quantisation
    llama27m      27M parameters (hidden 512, 8 layers), 4 x 256 tokens, bf16; beside a plain peft loop
    llama27m_nf4  ours from an NF4 base, beside the plain peft loop in bf16
    vocabulary    a vocabulary of 128,000, 2,048 tokens, all supervised, fp32: memory of the steps; beside TRL
On a GPU (Llama 3.2 1B and Llama 3 8B shapes, random weights, r 16, 8 rows of 512 tokens a micro-batch), beside TRL:
    llama1b_lora, llama8b_lora      bf16
    llama1b_qlora, llama8b_qlora    NF4 kept in 4 bits
    llama1b_once, llama8b_once      NF4 dequantised once (TRL keeps it in 4 bits)
Eight adapters (four ranks by two learning rates) trained together on one NF4 base, beside the same one after another on
the same base in memory; tokens are those of all adapters:
    eight_e2e                       stories260K on E2E, dequantised once, batch 8, fp32; on a CPU
    eight_27m                       27M parameters, kept in 4 bits, micro-batches of 512 tokens, bf16; on a CPU
    eight_1b_512, eight_8b_512      Llama shapes, kept in 4 bits, bf16, micro-batches of 512 tokens; also _1024, _2048
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.sides import SIDES
from benchmarks.works import WORKS, machine, possible, prepare


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--real", type=Path, default=Path("../shared/real"), help="folder of stories260K and E2E")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted(set(options.works) - set(WORKS)):
        parser.error(f"unknown work {', '.join(unknown)}; there are {', '.join(WORKS)}")
    if options.side:
        logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
        print(json.dumps(SIDES[options.side](WORKS[options.works[0]], options.folder, time.perf_counter())))
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.works or possible():
            prepare(WORKS[name], Path(folder) / name, options.real)
            results[name] = compare(name, Path(folder) / name, options.rounds)
            print_result(name, results[name])
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "works": results}, indent=2) + "\n")
    return 0


def compare(name: str, folder: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every round of both sides, by turns."""
    sides = (WORKS[name].ours, WORKS[name].peer)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            command = [sys.executable, "-m", "benchmarks.training", name, "--side", side, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
            if done.returncode:
                sys.exit(f"{name}, {side}: failed\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
            warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
            print(*(f"{name}, {side}: {line}" for line in warnings), sep="\n", end="\n" * bool(warnings))
            found[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
    return found


def print_result(name: str, found: dict[str, list[dict[str, Any]]]) -> None:
    ours, peer = found
    best = {side: max(found[side], key=lambda run: run["tokens_per_second"]) for side in found}
    print(f"\n{name}")
    print(f"{'':10}{'tokens/s':>10}{'a CPU s':>10}{'set-up s':>10}{'loss':>10}{'steps MB':>10}{'peak MB':>10}")
    for side, run in best.items():
        print(
            f"{side:10}{run['tokens_per_second']:>10,.0f}{run['tokens_per_cpu_second']:>10,.0f}{run['setup_seconds']:>10.1f}{run['loss']:>10.4f}"
            f"{run['step_bytes'] / 2**20:>10,.0f}{run['peak_bytes'] / 2**20:>10,.0f}"
            + (f"  {100 * run['utilisation']:.0f} % of peak FLOPs" if run["utilisation"] else "")
            + (f"  {run['adapters_a_forward']} adapters a forward" if "adapters_a_forward" in run else "")
            + ("  grouped" if run.get("grouped") else "")
        )
    pairs = zip(found[ours], found[peer], strict=True)
    ratios = sorted(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)
    speed = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    memory = min(r["step_bytes"] for r in found[ours]) / min(r["step_bytes"] for r in found[peer])
    differences = [abs(a / b - 1) for a, b in zip(best[ours]["windows"], best[peer]["windows"], strict=True)]
    print(
        f"{ours} / {peer}: speed {speed}, memory of the steps {memory:.2f}, "
        f"loss curve within {100 * max(differences, default=0):.2f} %",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
