"""What lm-evaluation-harness found, as figures with intervals and as a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Z = 1.96  # 95 % of a normal distribution


@dataclass(frozen=True)
class Score:
    """One figure of one task.

    Attributes:
        metric: the harness's name; with `.filter` where the task extracts its answers by a named filter.
        stderr: as the harness estimates it; None where it has no estimate for the metric.
        num_rows: that it was measured on.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    num_rows: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """value +- 1.96 stderr: 95 % by the normal approximation; of width 0 where all rows score the same."""
        return None if self.stderr is None else (self.value - Z * self.stderr, self.value + Z * self.stderr)


def read_scores(task: str, result: Mapping[str, Any]) -> list[Score]:
    """The figures in one of the harness's results: `metric,filter` beside `metric_stderr,filter`."""
    scores = []
    for key, value in result.items():
        metric, comma, extraction = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = result.get(f"{metric}_stderr,{extraction}")
        stderr = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
        name = metric if extraction == "none" else f"{metric}.{extraction}"
        scores.append(Score(task, name, float(value), stderr, int(result.get("sample_len", 0))))
    return scores


def as_metrics(scores: Mapping[str, Sequence[Score]]) -> dict[str, dict[str, dict[str, float]]]:
    """Numbers by model, task and metric; standard errors as `METRIC_stderr`."""
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for model, found in scores.items():
        for score in found:
            values = metrics.setdefault(model, {}).setdefault(score.task, {})
            values[score.metric] = score.value
            if score.stderr is not None:
                values[f"{score.metric}_stderr"] = score.stderr
    return metrics


def as_rows(scores: Mapping[str, Sequence[Score]]) -> list[dict[str, Any]]:
    """All that is known of each figure: `model`, a `Score`'s fields, `low` and `high` (None: no estimate)."""
    rows = []
    for model, found in scores.items():
        for score in found:
            low, high = score.interval or (None, None)
            rows.append({"model": model, **asdict(score), "low": low, "high": high})
    return rows


def table(scores: Mapping[str, Sequence[Score]]) -> str:
    """One line a task, metric and model."""
    rows = [("task", "metric", "model", "value", "95 % interval", "rows")]
    keys = dict.fromkeys((score.task, score.metric) for found in scores.values() for score in found)
    for key in keys:
        for model, found in scores.items():
            for score in found:
                if (score.task, score.metric) == key:
                    interval = "-" if score.interval is None else "{:.4f} to {:.4f}".format(*score.interval)
                    rows.append((*key, model, f"{score.value:.4f}", interval, str(score.num_rows)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", "intervals: value +- 1.96 standard errors of the harness; -: it gives none"])
