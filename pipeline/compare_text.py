"""What a comparison says in words, and the columns of its table."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipeline.compare_judged import VALIDATION, Judged
from pipeline.compare_points import FORGETTING, LeftOut, text_of
from pipeline.compare_table import Column, estimate_text, number
from pipeline.labels import SCORES
from pipeline.points import Sweep
from pipeline.statistics import CONFIDENCE
from pipeline.sweep_statistics import Standing

LABELS = {**SCORES, FORGETTING: ("forgetting", 4)}
MARKS = {Standing.reference: "*", Standing.same: "=", Standing.worse: "", Standing.unsteady: "~", Standing.better: "+"}
SHOWN_LEFT_OUT = 20
CONFIDENT = f"{CONFIDENCE:.0%}".replace("%", " %")


def heading(sweep: Sweep, num_compared: int, left_out: Sequence[LeftOut]) -> str:
    counts = Counter(entry.kind for entry in left_out)
    others = "".join(f", {num} {state}" for state, num in counts.items())
    return f"sweep {sweep.name}, {_count(len(sweep.points), 'point')}: {num_compared} compared{others}"


def subject(judged: Judged) -> list[str]:
    """What is the same in all points of the group, and what there was before any training."""
    group, point = judged.group, judged.settings[0].any_point
    settings, num_seeds = point.settings, [len(setting.points) for setting in judged.settings]
    seeds = f"{num_seeds[0]}" if len(set(num_seeds)) == 1 else f"{min(num_seeds)} to {max(num_seeds)}"
    model = settings["model"]["hub_id"] or Path(settings["model"]["path"]).name
    data = settings["data"]["hub_id"] or Path(settings["data"]["path"]).name
    shared = [f"{key}={text_of(value)}" for key, value in group.same.items()]
    first = [f"{settings['train']['method']} of {model} on {data}", *shared]
    rows = f"{group.num_rows['test']:,} test rows"
    if "general" in group.num_rows:
        rows += f", {group.num_rows['general']:,} rows of general text"
    before = [f"{name} {point.evaluate[name]['loss']:.4f}" for name in ("base", "quantized") if name in point.evaluate]
    return [
        f"all: {', '.join(first)}",
        f"{_count(len(judged.settings), 'setting')}, {seeds} seed{'' if seeds == '1' else 's'} each; {rows}",
        f"test loss before training: {', '.join(before)}",
    ]


def columns(judged: Judged) -> tuple[Column, list[Column], list[Column]]:
    """The mark, what names a setting, and its figures."""
    places = range(len(judged.settings))
    mark = Column("", [MARKS[found.standing] for found in judged.versus], is_text=True)
    keys = []
    for key, title in zip(judged.group.axes, judged.group.titles, strict=True):
        values = [setting.swept.get(key) for setting in judged.settings]
        is_text = not all(isinstance(value, int | float) for value in values)
        keys.append(Column(title, [text_of(value) for value in values], is_text))
    figures = [
        Column("parameters", [f"{judged.parameters(i):,}" for i in places]),
        Column("validation", [number(judged.settings[i].mean(VALIDATION), 4) for i in places]),
        _score(judged, judged.score, "test "),
    ]
    if judged.group.num_seeds > 1:
        figures.insert(0, Column("seeds", [str(len(setting.points)) for setting in judged.settings]))
    if len(places) > 1:
        figures += [Column("- best", [_difference(judged, i) for i in places])]
        figures += [Column("p", [_p_value(judged, i) for i in places])]
    figures += [
        Column("s", [number(setting.mean("training_seconds"), 1) for setting in judged.settings]),
        Column("MB", [number(judged.peak_memory(i) / 1e6, 0) for i in places]),
    ]
    figures += [_score(judged, score) for score in judged.scores[1:] if score != "perplexity"]
    figures += [Column(name, [number(value, 3) for value in values]) for name, values in judged.harness.items()]
    return mark, keys, figures


def legend(judged: Judged) -> list[str]:
    """How to read the table."""
    title, over = LABELS[judged.score][0], "test rows and seeds" if judged.has_seeds else "test rows"
    lines = [f"[ ]: {CONFIDENT} interval over {over}; s: seconds of training, mean over seeds; MB: peak memory."]
    if len(judged.settings) > 1:
        num = _count(len(judged.settings) - 1, "comparison")
        lines.append(
            f"p: that it is no worse than the best, one-sided, times {num}; under {1 - CONFIDENCE:.2f} it is worse."
        )
    if not judged.has_seeds:
        lines.append(
            "Every setting has one seed: how far another seed would move it is in no interval and no verdict here."
        )
    if any(point.fused_with for point in judged.group.points.values()):
        lines.append("Points trained together in one process: s is their share of its time, MB is the whole process's.")
    if len(judged.settings) > 1:
        choice = (
            "chosen by validation loss, so that the test rows, by which the table is sorted, had no part in the choice."
            if judged.chosen_by == VALIDATION
            else f"chosen by the test rows' own {title}, which flatters its figure a little, but no verdict."
        )
        lines.append(f"*  the best, {choice}")
        lines.append(
            f"=  not shown to be worse; the truly best one is among all marked ones with {CONFIDENT} confidence."
        )
    if any(found.standing is Standing.unsteady for found in judged.versus):
        lines.append("~  its seeds differ far more than those of others: too much to judge it, or to recommend it.")
    if any(found.standing is Standing.better for found in judged.versus):
        lines.append(
            f"+  shown to be better than the best in {title} on the test rows: validation loss chose another one."
        )
    return lines


def conclusion(judged: Judged, sweep: Sweep) -> list[str]:
    """What may be said, and what may not."""
    num, num_equal, best = len(judged.settings), len(judged.equals), judged.best
    if num == 1:
        return ["One setting: there is nothing to compare it with.", _adopt("it", judged, 0, sweep)]
    lines = [f"best: {_named(judged, best)}"]
    standings = Counter(found.standing for found in judged.versus)
    if num_equal == num:
        lines.append(
            f"No setting is shown to be worse than the best: this sweep cannot tell its {num} settings apart. More "
            "seeds or more test rows could."
        )
    else:
        unsteady = standings[Standing.unsteady]
        lines.append(
            f"Of the other {num - 1}, {standings[Standing.worse]} are shown to be worse; {num_equal - 1} cannot be "
            f"told from it{f'; {unsteady} cannot be judged' if unsteady else ''}."
        )
    if num_equal > 1:
        sizes = {judged.parameters(i) for i in judged.equals}
        name = "it is the smallest of them itself" if judged.smallest == best else _named(judged, judged.smallest)
        lines.append(
            f"smallest of these {num_equal}: {name}" if len(sizes) > 1 else f"These {num_equal} are of one size."
        )
    if judged.is_unsteady:
        lines.append(
            "The best setting's own seeds differ far more than those of others: more seeds would say if it is."
        )
    lines.append(_adopt("the best", judged, best, sweep))
    return [*lines, _adopt("the smallest", judged, judged.smallest, sweep)] if judged.smallest != best else lines


def left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    lines = [f"{entry.point} {entry.kind}: {' '.join(entry.reason.split())}" for entry in left_out[:SHOWN_LEFT_OUT]]
    rest = len(left_out) - SHOWN_LEFT_OUT
    return [*lines, f"... and {rest} more (points.csv has all)"] if rest > 0 else lines


def _score(judged: Judged, score: str, prefix: str = "") -> Column:
    title, decimals = LABELS[score]
    decimals = min(decimals, 3) if score == FORGETTING and not prefix else decimals
    return Column(prefix + title, [estimate_text(estimate, decimals) for estimate in judged.estimates[score]])


def _difference(judged: Judged, i: int) -> str:
    return "" if i == judged.best else f"{judged.versus[i].difference:+.{LABELS[judged.score][1]}f}"


def _p_value(judged: Judged, i: int) -> str:
    p_value = judged.versus[i].p_value
    return (
        ""
        if i == judged.best
        else "<0.001"
        if p_value < 0.001
        else f"{p_value:.3f}"
        if p_value < 0.1
        else f"{p_value:.2f}"
    )


def _named(judged: Judged, i: int) -> str:
    title, decimals = LABELS[judged.score]
    estimate = estimate_text(judged.estimates[judged.score][i], decimals)
    return f"{judged.describe(i)}, {judged.parameters(i):,} parameters, test {title} {estimate}"


def _adopt(what: str, judged: Judged, i: int, sweep: Sweep) -> str:
    return f"adopt {what}: python -m pipeline.adopt {sweep.folder} {judged.settings[i].adoptable.name}"


def _count(num: int, what: str) -> str:
    return f"{num} {what}{'' if num == 1 else 's'}"
