"""Print what the last `make repro` made: `python -m pipeline.summary`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.labels import MODELS, SCORES

MARKS = {"better": "+", "worse": "-", "no difference shown": "="}


def summary(folder: Path) -> str:
    """The table of models and scores of `folder/metrics`, and where to look next.

    Raises:
        DataError: `metrics/evaluate.json` or `metrics/merge.json` is missing or no JSON.
    """
    evaluate, merge = (read_json(folder / "metrics" / f"{name}.json") for name in ("evaluate", "merge"))
    models = {name: scores for name in MODELS if (scores := evaluate.get(name) or merge.get(name))}
    keys = [key for key in SCORES if key in models["base"]]
    lines = [_line("", [SCORES[key][0] for key in keys])]
    lines += [_line(MODELS[name], [_number(scores, key) for key in keys]) for name, scores in models.items()]
    tokens = f"{models['base']['num_tokens']:,} supervised tokens of the test split"
    lines += ["", f"{tokens}; forgetting (adapter - base on general text): {evaluate['forgetting']:+.4f} nats a token"]
    gate = folder / "metrics/gate.json"
    if gate.exists():
        verdict = read_json(gate)
        met = verdict["num_conditions"] - verdict["num_failed"] - verdict["num_inconclusive"]
        passed = "passed" if verdict["passed"] else "NOT passed"
        unsure = f", {verdict['num_inconclusive']} inconclusive" if verdict["num_inconclusive"] else ""
        lines.append(f"gate: {passed}, {met} of {verdict['num_conditions']} conditions met{unsure}")
    scores = folder / "reports/evaluate/scores.json"
    if scores.exists():
        lines += ["", *_steps(read_json(scores)["comparisons"], keys)]
    return "\n".join([*lines, "", NEXT])


NEXT = """where to look next
  reports/evaluate/index.html                the report: intervals, comparisons, examples, gates
  models/merged                              the model: a plain Hugging Face folder
  reports/evaluate/predictions.jsonl         every answer beside its prompt and references
  make ui                                    every run and its curves, in MLflow
  dvc plots show                             curves and scores in the browser
  dvc exp run -S train.learning_rate=1e-3    try another setting; then dvc exp show"""


def _steps(comparisons: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """A line a step, a column a score: the difference, and whether it is shown."""
    found = {(c["step"], c["metric"]): c for c in comparisons}
    lines = []
    for step in dict.fromkeys(c["step"] for c in comparisons):
        cells = [_difference(found[step, key], SCORES[key][1]) if (step, key) in found else "" for key in keys]
        lines.append(_line(step, cells))
    return ["what each step did: + better, - worse, = no difference shown (the report has the intervals)", *lines]


def _difference(comparison: Mapping[str, Any], decimals: int) -> str:
    return f"{comparison['difference']:+.{decimals}f} {MARKS[comparison['outcome']]}"


def _line(name: str, cells: list[str]) -> str:
    return f"{name:<36}" + "".join(f"{cell:>14}" for cell in cells)


def _number(scores: Mapping[str, Any], key: str) -> str:
    return f"{scores[key]:.{SCORES[key][1]}f}" if key in scores else "-"


def main() -> None:
    try:
        print(summary(Path()))
    except PipelineError as error:
        print(f"summary: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
