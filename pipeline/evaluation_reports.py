"""What an evaluation leaves for people: every answer, a table of scores, pictures."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.files import write_jsonl, write_text
from pipeline.plots import new_figure, save_figure

Scores = Mapping[str, float]
Row = Mapping[str, Any]
ANSWER_KEYS = ("prediction", "ended", "exact_match", "rouge_l")
# title and right end of the axis (None: as the values need)
PANELS: dict[str, tuple[str, float | None]] = {
    "loss": ("loss (nats per token), lower is better", None),
    "exact_match": ("exact match, higher is better", 1.0),
    "rouge_l": ("ROUGE-L, higher is better", 1.0),
    "bleu": ("BLEU, higher is better", 100.0),
    "general_loss": ("loss on general text, lower is better", None),
}


def write_reports(folder: Path, scores: Mapping[str, Scores], rows: Mapping[str, Sequence[Row]]) -> None:
    """Writes `predictions.jsonl`, `scores.csv`, `scores.png` and, where answers were generated, `improvement.png`.

    Args:
        scores: by model name.
        rows: by model name; as `evaluate_model` gives them.
    """
    write_jsonl(folder / "predictions.jsonl", join_rows(rows))
    write_text(folder / "scores.csv", scores_csv(scores))
    plot_scores(scores, folder / "scores.png")
    if rows["base"]:
        plot_improvement(rows["base"], rows["adapter"], folder / "improvement.png")


def join_rows(rows_by_model: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """One object a test row: what all models share, then each model's answer under its name."""
    return [
        {key: value for key, value in answers[0].items() if key not in ANSWER_KEYS}
        | {name: {key: row[key] for key in ANSWER_KEYS} for name, row in zip(rows_by_model, answers, strict=True)}
        for answers in zip(*rows_by_model.values(), strict=True)
    ]


def scores_csv(scores_by_model: Mapping[str, Scores]) -> str:
    """A line a model, a column a score, as CSV for `dvc plots`."""
    keys = list(next(iter(scores_by_model.values())))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", *keys])
    writer.writerows([name, *(scores[key] for key in keys)] for name, scores in scores_by_model.items())
    return text.getvalue()


def plot_scores(scores_by_model: Mapping[str, Scores], path: Path) -> None:
    """PNG with a panel a score and a bar a model; scores that no model has are left out."""
    names = list(scores_by_model)
    keys = [key for key in PANELS if key in scores_by_model[names[0]]]
    figure = new_figure(8, len(keys) * (0.6 + 0.3 * len(names)))
    for axes, key in zip(figure.subplots(len(keys), 1, squeeze=False)[:, 0], keys, strict=True):
        title, right = PANELS[key]
        values = [scores_by_model[name][key] for name in names]
        bars = axes.barh(names, values, color=[f"C{i}" for i in range(len(names))])
        axes.bar_label(bars, fmt="%.4g", padding=3)
        axes.set_xlim(0, (right or max(*values, 1e-9)) * 1.12)  # room for the numbers
        axes.invert_yaxis()  # the first model on top
        axes.set_title(title, fontsize=10, loc="left")
    save_figure(figure, path)


def plot_improvement(before: Sequence[Row], after: Sequence[Row], path: Path) -> None:
    """PNG of ROUGE-L after minus before, a bar a row, sorted: how many got better or worse, and how much."""
    changes = sorted((new["rouge_l"] - old["rouge_l"] for old, new in zip(before, after, strict=True)), reverse=True)
    better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    figure = new_figure(8, 3.5)
    axes = figure.subplots()
    axes.bar(range(len(changes)), changes, width=1.0, color=["C2" if change >= 0 else "C3" for change in changes])
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xlabel("test rows, most improved first")
    axes.set_ylabel("ROUGE-L, adapter - base")
    axes.set_title(f"{better} of {len(changes)} rows better, {worse} worse, {len(changes) - better - worse} as before")
    save_figure(figure, path)
