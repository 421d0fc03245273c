"""Pictures of an evaluation: scores with intervals, and what training did to each answer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.labels import MODELS
from pipeline.plots import new_figure, save_figure
from pipeline.statistics import Estimate

TITLES = {
    "loss": "loss, nats a token (lower is better)",
    "exact_match": "exact match (higher is better)",
    "rouge_l": "ROUGE-L (higher is better)",
    "bleu": "BLEU (higher is better)",
    "general_loss": "loss on general text, nats a token (lower is better)",
}


def plot_scores(estimates: Mapping[str, Mapping[str, Estimate]], path: Path) -> None:
    """PNG with a panel a score and a point with its 95 % interval a model.

    Args:
        estimates: by model and score; every model has the same scores.
    """
    names = list(estimates)
    keys = [key for key in TITLES if key in estimates[names[0]]]
    figure = new_figure(8, len(keys) * (0.7 + 0.22 * len(names)))
    for axes, key in zip(figure.subplots(len(keys), 1, squeeze=False)[:, 0], keys, strict=True):
        for place, name in enumerate(names):
            estimate = estimates[name][key]
            low, high = estimate.interval.low, estimate.interval.high
            axes.plot([low, high], [place, place], color=f"C{place}", linewidth=2.5, solid_capstyle="butt")
            axes.plot(estimate.value, place, "o", color=f"C{place}", markersize=5)
            axes.annotate(
                f"{estimate.value:.4g}", (estimate.value, place), (0, 5), textcoords="offset points", fontsize=8,
                ha="center",
            )  # fmt: skip
        axes.set_yticks(range(len(names)), [MODELS[name] for name in names])
        axes.set_ylim(len(names) - 0.5, -0.8)  # the first model on top
        axes.margins(x=0.06)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(TITLES[key], fontsize=10, loc="left")
    save_figure(figure, path)


def plot_improvement(changes: Sequence[float], path: Path) -> None:
    """PNG of each row's ROUGE-L of the adapter minus the base's, sorted: how many got better or worse, and how much."""
    changes = sorted(changes, reverse=True)
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


def rouge_changes(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    """ROUGE-L of the adapter's answer minus the base's, a row."""
    return [row["adapter"]["rouge_l"] - row["base"]["rouge_l"] for row in answers]
