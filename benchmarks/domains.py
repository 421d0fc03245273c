"""Three real domains one after another, in every way of conf/domains: what is forgotten, and what it costs.

    python -m benchmarks.domains                                   # every way, 120 steps a domain, 3 seeds
    python -m benchmarks.domains sequential replay --steps 20 --seeds 1 --folder /tmp/domains

E2E, tinyshakespeare and alpaca_en_demo (--real) with stories260K, in this order; LoRA r 8 on all linear layers of the
float32 base, batches of 8 rows, the same learning rate (5e-3; OSF, which trains whole layers, 2e-3), measured on 150
rows each. Two ways run at a time, a thread each: about 12 minutes on 2 cores. What is trained is kept in --folder: a
killed run goes on, and only what is new is computed.

Prints the table of docs/domains.md, and writes it and all figures to --folder (domains.md, domains.json).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.works import machine
from pipeline.domain_matrix import compare, text_of
from pipeline.files import read_json, write_json, write_text
from pipeline.schema import DomainMethod

ROOT = Path(__file__).resolve().parent.parent
WAYS = [str(method) for method in DomainMethod]
DOMAINS = {
    "e2e": "path: {real}/e2e\nfiles: {{train: train.jsonl, validation: valid.jsonl, test: test.jsonl}}\n",
    "shakespeare": "path: {real}/tinyshakespeare\nfiles: {{train: input.txt}}\nshape: text\n",
    "alpaca": "path: {real}/alpaca\nfiles: {{train: alpaca_en_demo.json}}\n",
}
MAX_LENGTH = {"e2e": 384, "shakespeare": 128, "alpaca": 384}
OSF_RATE = 2e-3
REFERENCE = str(DomainMethod.sequential)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.domains", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("ways", nargs="*", help=f"of {', '.join(WAYS)}; default: all")
    parser.add_argument("--steps", type=int, default=120, help="a domain")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2, help="ways that run at a time, a thread each")
    parser.add_argument("--real", type=Path, default=Path("../shared/real"), help="folder of stories260K and the data")
    parser.add_argument("--folder", type=Path, help="keeps results; default: a temporary one")
    options = parser.parse_args()
    ways = options.ways or WAYS
    if unknown := set(ways) - set(WAYS):
        parser.error(f"{', '.join(sorted(unknown))}: no such way; there are {', '.join(WAYS)}")
    folder = (options.folder or Path(tempfile.mkdtemp())).resolve()
    real = options.real.resolve()
    for name, text in DOMAINS.items():
        settings = f"# {name}\ndefaults: [base]\n{text.format(real=real)}max_length: {MAX_LENGTH[name]}\n"
        write_text(folder / f"conf/data/{name}.yaml", settings)

    def one(way: str) -> dict[str, Any]:
        started = time.perf_counter()
        run(way, folder, real, options.steps, list(range(options.seeds)))
        seconds = time.perf_counter() - started
        print(f"{way}: {seconds:.0f} s", file=sys.stderr, flush=True)
        return {**read_json(folder / way / "metrics/domains.json"), "seconds": seconds}

    with ThreadPoolExecutor(options.at_once) as pool:
        # what takes longest, and shares no training with others, first
        began = {way: pool.submit(one, way) for way in reversed(ways)}
        found = {way: began[way].result() for way in ways}
    if REFERENCE in found:
        rows = {way: read_json(folder / way / "reports/domains/rows.json") for way in found}
        for way in found:
            found[way]["versus_sequential"] = compare(rows[way], rows[REFERENCE])
    table = table_of(found)
    write_json(folder / "domains.json", {"machine": machine(), "steps": options.steps, "ways": found})
    write_text(folder / "domains.md", table)
    print(f"{table}\nall of it is in {folder}")
    return 0


def run(way: str, folder: Path, real: Path, steps: int, seeds: list[int]) -> None:
    """One way, in a process of its own with the folder's store. Exits with its output when it fails."""
    overrides = [
        f"hydra.searchpath=[file://{folder}/conf]", f"data.domains=[{','.join(DOMAINS)}]", f"domains={way}",
        f"domains.seeds={json.dumps(seeds)}", "model=local", f"model.path={real}/models/stories260K",
        "model.dtype=float32", "model.chat_template=conf/chat_templates/plain_bos_ends.jinja", "quantization=none",
        "train=lora", f"train.learning_rate={OSF_RATE if way == DomainMethod.osf else 5e-3}",
        f"train.max_steps={steps}", "train.micro_batch_size=8", f"train.eval_steps={max(1, steps // 2)}",
        "train.eval_max_rows=100", "evaluate.max_rows=150", "evaluate.general_max_rows=100", "runtime.device=cpu",
        "runtime.num_threads=1", "runtime.progress=false", "runtime.tracking=false",
        f"runtime.output_dir={folder}/{way}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "stages.domains", *overrides]
    environment = os.environ | {"DVC_ROOT": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=7200, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def table_of(found: dict[str, dict[str, Any]]) -> str:
    """A row a way: change of each domain's loss since its own training, its loss then, general text, cost.

    `minus sequential` is of the mean change, in points of percent, paired by row and seed (`domain_matrix.compare`).
    """
    names: Sequence[str] = next(iter(found.values()))["domains"]
    heads = ["way", *(f"{name}: change" for name in names[:-1]), "mean change", "minus sequential"]
    heads += [*(f"{name}: after its own" for name in names), "general text, since the base", "trained parameters"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for way, each in found.items():
        last = each["figures"][names[-1]]
        cells = [way, *(text_of(each["change"][name][names[-1]], True) for name in names[:-1])]
        cells.append(text_of(each["mean_change"], True))
        versus = each.get("versus_sequential")
        cells.append(text_of(versus["mean_change"], True) if versus and way != REFERENCE else "")
        cells += [text_of(each["loss"][name][name]) for name in names]
        cells += [text_of(each["general_change"], True), f"{last['trainable_parameters']:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
