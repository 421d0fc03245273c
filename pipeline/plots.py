"""Pictures and tables of a training: loss, learning rate and gradient norm by step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Event = Mapping[str, float]


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches that needs no display and no global state (matplotlib is imported here)."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a PNG; equal figures give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def series(history: Sequence[Event], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the events that have the key."""
    points = [(int(event["step"]), event[key]) for event in history if key in event]
    return [step for step, _ in points], [value for _, value in points]


def plot_training_curves(history: Sequence[Event], path: Path) -> None:
    """PNG of training and validation loss, learning rate and gradient norm by optimizer step.

    Args:
        history: one object a logged event: `step`, and some of `train.loss`, `train.learning_rate`, `train.grad_norm`,
            `validation.loss`.
    """
    figure = new_figure(8, 7)
    loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    loss.plot(*series(history, "train.loss"), color="0.6", linewidth=1, label="train")
    loss.plot(*series(history, "validation.loss"), color="C0", marker="o", markersize=4, label="validation")
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    rate.plot(*series(history, "train.learning_rate"), color="C1")
    rate.set_ylabel("learning rate")
    norm.plot(*series(history, "train.grad_norm"), color="C2", linewidth=1)
    norm.set_ylabel("gradient norm")
    norm.set_xlabel("optimizer step")
    for axes in (loss, rate, norm):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def write_training_tables(history: Sequence[Event], folder: Path) -> None:
    """`train.csv` (step, loss, learning_rate, grad_norm) and `validation.csv` (step, loss), for `dvc plots`."""
    for name, columns in {"train": ("loss", "learning_rate", "grad_norm"), "validation": ("loss",)}.items():
        events = [event for event in history if f"{name}.loss" in event]
        lines = [",".join(["step", *columns])]
        lines += [",".join([str(int(e["step"])), *(repr(e[f"{name}.{column}"]) for column in columns)]) for e in events]
        write_text(folder / f"{name}.csv", "\n".join(lines) + "\n")
