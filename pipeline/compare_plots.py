"""Pictures of a sweep's settings: score by rank, loss curves, rank by learning rate, parallel coordinates.

Any swept key can stand where rank, learning rate and target modules stand by default; a picture whose axes were not
swept is left out, and a note says so.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.compare_axes import (
    axis_title,
    axis_values,
    best_along,
    choose_axis,
    colour_scale,
    heights,
    is_far,
    is_logarithmic,
    label_of,
    limit_scores,
    numeric_axes,
    scale_across,
    score_limits,
    score_title,
    strongest_axis,
    text_at,
    ticks,
    write_head,
)
from pipeline.compare_judged import Judged
from pipeline.compare_points import text_of
from pipeline.compare_text import LABELS
from pipeline.plots import new_figure, save_figure, series

RANK, RATE, TARGETS = "lora.r", "train.learning_rate", "lora.target_modules"
MAX_PANELS, MAX_CELLS = 4, 16
BEST, SMALLEST = "C3", "black"
COLOURS = ("C0", "C1", "C2", "C4", "C5", "C8", "C9", "C7")  # red is the best's


def draw(judged: Judged, folder: Path, suffix: str = "") -> tuple[list[Path], list[str]]:
    """Writes the pictures that the swept axes allow: their paths, and a note for each that is left out."""
    paths, notes = [], []
    pictures: dict[str, Callable[[Judged, Path], str | None]] = {
        "score": plot_score,
        "loss_curves": plot_curves,
        "heat_map": plot_heat_map,
        "parallel_coordinates": plot_parallel,
    }
    for name, plot in pictures.items():
        path = folder / f"{name}{suffix}.png"
        problem = plot(judged, path)
        if problem is None:
            paths.append(path)
        else:
            notes.append(f"no picture {path.name}: {problem}")
    return paths, notes


def plot_score(judged: Judged, path: Path) -> str | None:
    """PNG of the score with 95 % intervals against rank (else the first axis of numbers): a line a target set, a panel
    a learning rate, or other axes of few values.

    Returns:
        Why there is no picture, if there is none.
    """
    numeric = numeric_axes(judged)
    if not numeric:
        return "no axis of numbers was swept."
    across = RANK if RANK in numeric else numeric[0]
    line = choose_axis(judged, TARGETS, [across], len(COLOURS))
    panel = choose_axis(judged, RATE, [across, line], MAX_PANELS)
    panels, lines = axis_values(judged, panel), axis_values(judged, line)
    xs = sorted({float(setting.swept[across]) for setting in judged.settings})
    figure = new_figure(max(5.5, 4.2 * len(panels)), 4.2)
    all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, panel_value in zip(all_axes, panels, strict=True):
        for place, line_value in enumerate(lines):
            cells = sorted(best_along(judged, across, {panel: panel_value, line: line_value}).items())
            cells = [(x, i) for x, i in cells if not is_far(judged, i)]
            estimates = [judged.estimates[judged.score][i] for _, i in cells]
            values = np.array([estimate.value for estimate in estimates])
            ends = np.array([[e.interval.low for e in estimates], [e.interval.high for e in estimates]])
            aside = 1 + 0.04 * (place - (len(lines) - 1) / 2) if is_logarithmic(xs) else 1.0  # bars beside each other
            axes.errorbar(
                [x * aside for x, _ in cells], values, np.abs(ends - values), marker="o", markersize=4, capsize=2,
                linewidth=1.2, linestyle="-" if len(xs) <= MAX_CELLS else "none", color=COLOURS[place],
                label=label_of(judged, line, line_value),
            )  # fmt: skip
            for x, i in cells:
                if i == judged.best:
                    axes.plot(
                        x * aside,
                        judged.values(judged.score)[i],
                        "*",
                        color=BEST,
                        markersize=13,
                        zorder=3,
                        label="best",
                    )
        scale_across(axes, xs)
        axes.set_xlabel(axis_title(judged, across))
        axes.set_title(label_of(judged, panel, panel_value) or "", fontsize=10)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel(score_title(judged))
    handles = {
        label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    all_axes[-1].legend(list(handles.values()), list(handles), fontsize=8)
    over = "test rows and seeds" if judged.has_seeds else "test rows"
    limit_scores(all_axes[0], judged)
    num_far = sum(is_far(judged, i) for i in range(len(judged.settings)))
    text = f"bars: 95 % intervals over {over}{f'; {num_far} settings, far worse, are left out' if num_far else ''}"
    write_head(judged, figure, text, [key for key in judged.group.axes if key not in (across, line, panel)])
    save_figure(figure, path)
    return None


def plot_curves(judged: Judged, path: Path) -> str | None:
    """PNG of every point's validation loss over its steps, coloured by the axis that the score depends on most.

    Returns:
        Why there is no picture, if there is none.
    """
    curves = []
    for i, setting in enumerate(judged.settings):
        for point in setting.points.values():
            steps, losses = series([event for event in point.history if event["step"] > 0], "validation.loss")
            curves.append((i, steps, losses))
    if not any(len(steps) > 1 for _, steps, _ in curves):
        return "no point was validated twice while it trained (train.eval_steps)."
    key = strongest_axis(judged, len(COLOURS))
    values = axis_values(judged, key)
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for i, steps, losses in curves:
        is_best = i == judged.best
        colour = BEST if is_best else COLOURS[values.index(text_at(judged, i, key))]
        width, alpha = (2.0, 1.0) if is_best else (0.9, 0.6)
        axes.plot(steps, losses, color=colour, linewidth=width, alpha=alpha, zorder=3 if is_best else 2)
    handles = [
        axes.plot([], [], color=COLOURS[n], label=label_of(judged, key, value))[0]
        for n, value in enumerate(values)
        if key
    ]
    handles += axes.plot([], [], color=BEST, linewidth=2.0, label=f"best: {judged.describe(judged.best)}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: text_of(float(value)))
    axes.yaxis.set_minor_formatter(lambda value, _: text_of(float(value)))
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss, nats a token (logarithmic)")
    axes.legend(handles=handles, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    axes.grid(alpha=0.3, which="both")
    write_head(judged, figure, f"{len(curves)} points, a line each (not shown: the loss before the first step)", [])
    save_figure(figure, path)
    return None


def plot_heat_map(judged: Judged, path: Path) -> str | None:
    """PNG of the score by rank and learning rate (else the first two axes of numbers), a panel a target set.

    Returns:
        Why there is no picture, if there is none.
    """
    numeric = [key for key in numeric_axes(judged) if len(axis_values(judged, key)) <= MAX_CELLS]
    if len(numeric) < 2:
        return f"it takes two swept axes of numbers, of {MAX_CELLS} values at most."
    preferred = [key for key in (RANK, RATE) if key in numeric]
    across, up = [*preferred, *(key for key in numeric if key not in preferred)][:2]
    panel = choose_axis(judged, TARGETS, [across, up], MAX_PANELS)
    xs, ys, panels = axis_values(judged, across), axis_values(judged, up), axis_values(judged, panel)
    figure = new_figure(max(5.0, (0.62 * len(xs) + 0.3) * len(panels) + 1.5), 2.0 + 0.5 * len(ys))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    scores, (colours, norm) = judged.values(judged.score), colour_scale(judged)
    decimals = min(3, LABELS[judged.score][1])
    for axes, panel_value in zip(all_axes, panels, strict=True):
        grid = np.full((len(ys), len(xs)), math.nan)
        for y, up_value in enumerate(ys):
            for value, i in best_along(judged, across, {panel: panel_value, up: up_value}).items():
                x, mark = xs.index(text_of(value)), "*" if i == judged.best else "=" if i in judged.equals else ""
                grid[y, x] = scores[i]
                is_dark = (norm(scores[i]) < 0.6) != judged.higher_is_better
                axes.text(
                    x, y, f"{scores[i]:.{decimals}f}{mark}", ha="center", va="center", fontsize=8,
                    color="white" if is_dark else "black", fontweight="bold" if mark else "normal",
                )  # fmt: skip
        image = axes.imshow(grid, norm=norm, cmap=colours, aspect="auto", origin="lower")
        axes.set_xticks(range(len(xs)), xs)
        axes.set_yticks(range(len(ys)), ys)
        axes.set_xlabel(axis_title(judged, across))
        axes.set_title(label_of(judged, panel, panel_value) or "", fontsize=10)
    all_axes[0].set_ylabel(axis_title(judged, up))
    figure.colorbar(image, ax=list(all_axes), pad=0.01, fraction=0.03).set_label(score_title(judged), fontsize=8)
    best_of = [key for key in judged.group.axes if key not in (across, up, panel)]
    write_head(judged, figure, "* the best, = not shown to be worse; dark is good", best_of)
    save_figure(figure, path)
    return None


def plot_parallel(judged: Judged, path: Path) -> str | None:
    """PNG of a line a setting over the swept axes, the trainable parameters and the score, coloured by the score.

    Returns:
        Why there is no picture, if there is none.
    """
    if len(judged.settings) < 2:
        return "one setting has nothing beside it."
    import matplotlib

    places, numeric = range(len(judged.settings)), numeric_axes(judged)
    low, high = sorted(score_limits(judged))
    scores = [min(max(score, low), high) for score in judged.values(judged.score)]
    num_far = sum(is_far(judged, i) for i in places)
    columns: list[tuple[str, Sequence[Any], np.ndarray]] = []
    for key in judged.group.axes:
        on_axis = [
            setting.swept[key] if key in numeric else text_at(judged, i, key)
            for i, setting in enumerate(judged.settings)
        ]
        columns.append((axis_title(judged, key), on_axis, heights(on_axis, key in numeric)))
    parameters = [judged.parameters(i) for i in places]
    columns.append(("trainable\nparameters", parameters, heights(parameters, True)))
    of_scores = heights(scores, True)
    columns.append((f"test {LABELS[judged.score][0]}", scores, of_scores if judged.higher_is_better else 1 - of_scores))
    lines = np.array([column[2] for column in columns])
    figure = new_figure(max(6, 1.9 * len(columns)), 4.8)
    axes = figure.subplots()
    name, norm = colour_scale(judged)
    for i in reversed(places):  # the best last, above the others
        axes.plot(lines[:, i], color=matplotlib.colormaps[name](norm(scores[i])), linewidth=1.1, alpha=0.7)
    axes.plot(lines[:, judged.best], color=BEST, linewidth=2.6, label="best")
    if judged.smallest != judged.best:
        label = "smallest that is not shown to be worse"
        axes.plot(lines[:, judged.smallest], color=SMALLEST, linestyle="--", linewidth=2, label=label)
    for x, (_, values, of_values) in enumerate(columns):
        axes.axvline(x, color="0.4", linewidth=0.8, zorder=0)
        for text, height in ticks(values, of_values):
            axes.annotate(
                text, (x, height), (4, 0), textcoords="offset points", fontsize=8, va="center",
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    axes.set_xticks(range(len(columns)), [title for title, _, _ in columns])
    axes.set_xlim(-0.1, len(columns) - 0.6)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    far = f"; {num_far} far worse are drawn at the lower end" if num_far else ""
    write_head(judged, figure, f"a line a setting, dark is good, the best score on top{far}", [])
    save_figure(figure, path)
    return None
