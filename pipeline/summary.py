"""Print what the last `make repro` made: `python -m pipeline.summary`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.files import read_json

NAMES = {"base": "base", "quantized": "quantized base", "adapter": "adapter", "merged": "merged"}
COLUMNS = {  # key: title, decimals
    "loss": ("loss", 4),
    "perplexity": ("perplexity", 3),
    "exact_match": ("exact match", 3),
    "rouge_l": ("ROUGE-L", 3),
    "bleu": ("BLEU", 1),
    "general_loss": ("general loss", 4),
}


def summary(folder: Path) -> str:
    """The table of models and scores of `folder/metrics`, and where to look next.

    Raises:
        DataError: `metrics/evaluate.json` or `metrics/merge.json` is missing or no JSON.
    """
    evaluate, merge = (read_json(folder / "metrics" / f"{name}.json") for name in ("evaluate", "merge"))
    models = {name: evaluate[name] for name in ("base", "quantized", "adapter")} | {"merged": merge["merged"]}
    keys = [key for key in COLUMNS if key in models["base"]]
    lines = [_line("", [COLUMNS[key][0] for key in keys])]
    lines += [_line(NAMES[name], [_number(scores, key) for key in keys]) for name, scores in models.items()]
    tokens = f"{models['base']['num_tokens']:,} supervised tokens of the test split"
    lines += ["", f"{tokens}; forgetting (adapter - base on general text): {evaluate['forgetting']:+.4f} nats a token"]
    gate = folder / "metrics/gate.json"
    if gate.exists():
        verdict = read_json(gate)
        met = verdict["num_conditions"] - verdict["num_missed"]
        passed = "passed" if verdict["passed"] else "NOT passed"
        lines.append(f"gate: {passed}, {met} of {verdict['num_conditions']} conditions met")
    return "\n".join([*lines, "", NEXT])


NEXT = """where to look next
  models/merged                              the model: a plain Hugging Face folder
  reports/evaluate/predictions.jsonl         every answer beside its prompt and references
  make ui                                    every run and its curves, in MLflow
  dvc plots show                             curves and scores in the browser
  dvc exp run -S train.learning_rate=1e-3    try another setting; then dvc exp show"""


def _line(name: str, cells: list[str]) -> str:
    return f"{name:<16}" + "".join(f"{cell:>14}" for cell in cells)


def _number(scores: Mapping[str, Any], key: str) -> str:
    return f"{scores[key]:.{COLUMNS[key][1]}f}" if key in scores else "-"


def main() -> None:
    try:
        print(summary(Path()))
    except PipelineError as error:
        print(f"summary: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
