"""Compare the settings of a sweep: which is best, which cannot be told from it, and the smallest of these.

    python -m pipeline.compare multirun/NAME                    # judged by the test loss
    python -m pipeline.compare multirun/NAME --score rouge_l    # by another score

Consumes: the folders of the finished points. Produces, in multirun/NAME/comparison: index.md (for people),
settings.json (everything, at full precision), points.csv (a row a point) and pictures. What may be concluded from a
sweep, and how: `pipeline.sweep_statistics`.
"""

import argparse
import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from pipeline.compare_edges import find_edges
from pipeline.compare_judged import VALIDATION, Judged
from pipeline.compare_points import FORGETTING, SEED, LeftOut, read_groups, text_of
from pipeline.compare_table import WIDTH, markdown_table, text_tables
from pipeline.compare_text import MARKS, columns, conclusion, heading, left_out_lines, legend, subject
from pipeline.errors import ConfigError, PipelineError
from pipeline.files import write_json, write_text
from pipeline.points import Sweep

FOLDER = "comparison"
FIGURES = ("trainable_parameters", VALIDATION, "training_seconds", "peak_memory_bytes")  # of metrics/train.json


@dataclass(frozen=True)
class Comparison:
    """What `compare` found and wrote.

    Attributes:
        text: for a terminal of 120 characters.
        metrics: numbers for the sweep's own run, such as `best.loss`, `smallest.trainable_parameters`, `num_settings`.
        files: all that stand in `comparison/`.
    """

    text: str
    metrics: dict[str, float]
    files: list[Path]


def compare(folder: Path, score: str = "loss") -> Comparison:
    """Compares the finished points of the sweep in `folder` and writes `folder/comparison`.

    Points on other test rows than the most are compared among themselves.

    Args:
        score: what decides: loss, another score of the test rows, or forgetting.

    Raises:
        DataError: no sweep is there, or none of its points has finished.
        ConfigError: its points do not have the score.
    """
    from pipeline.compare_plots import draw  # imports matplotlib

    sweep = Sweep.load(folder)
    groups, left_out = read_groups(sweep)
    if score not in groups[0].scores:
        raise ConfigError(
            f"--score: '{score}' was not measured on the points of {folder}. Give one of {', '.join(groups[0].scores)}."
        )
    for group in groups:
        if score not in group.scores:
            left_out += [LeftOut(name, "without the score", f"{score} was not measured on it") for name in group.points]
    judged = [Judged(group, score) for group in groups if score in group.scores]
    output = folder / FOLDER
    for old in output.glob("*.png"):
        old.unlink()
    pictures: list[Path] = []
    notes: list[str] = []
    for place, found in enumerate(judged, start=1):
        drawn, skipped = draw(found, output, f"_{place}" if len(judged) > 1 else "")
        pictures, notes = [*pictures, *drawn], [*notes, *skipped]
    write_json(output / "settings.json", _json(_settings(sweep, judged, left_out)))
    write_text(output / "points.csv", _points_csv(sweep, judged, left_out))
    write_text(output / "index.md", _markdown(sweep, judged, left_out, pictures, notes))
    files = [output / "index.md", output / "settings.json", output / "points.csv", *pictures]
    text = "\n\n".join([*_sections(sweep, judged, left_out), "\n".join([*notes, f"pictures and tables: {output}"])])
    return Comparison(text, _metrics(judged[0], len(sweep.points)), files)


def _sections(sweep: Sweep, judged: Sequence[Judged], left_out: Sequence[LeftOut], markdown: bool = False) -> list[str]:
    """Paragraphs, for a terminal or for Markdown."""

    def paragraph(lines: Sequence[str]) -> str:
        if not markdown:
            return "\n".join(fill(line, WIDTH, subsequent_indent="   ") for line in lines)
        marked = [f"`{line[0]}`{line[1:]}" if line[0] in MARKS.values() else line for line in lines]  # else a bullet
        return "  \n".join(marked)

    found = [heading(sweep, sum(len(group.group.points) for group in judged), left_out)]
    if len(judged) > 1:
        found.append(f"The points were measured on {len(judged)} different sets of rows; each is compared by itself.")
    for group in judged:
        mark, keys, figures = columns(group)
        table = markdown_table([mark, *keys, *figures]) if markdown else text_tables(mark, keys, figures)
        found += [paragraph(subject(group)), table, paragraph(legend(group)), paragraph(conclusion(group, sweep))]
        for edge in find_edges(group, sweep):  # the command whole, to be copied
            found.append(f"{edge}  \n`{edge.command}`" if markdown else f"{paragraph([str(edge)])}\n{edge.command}")
    if left_out:
        found.append(paragraph(["not compared:", *left_out_lines(left_out)]))
    return found


def _markdown(
    sweep: Sweep, judged: Sequence[Judged], left_out: Sequence[LeftOut], pictures: Sequence[Path], notes: Sequence[str]
) -> str:
    first, *rest = _sections(sweep, judged, left_out, markdown=True)
    images = [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in pictures]
    return "\n\n".join([f"# {first}", f"`{sweep.command}`", *rest, *images, *notes]) + "\n"


def _settings(sweep: Sweep, judged: Sequence[Judged], left_out: Sequence[LeftOut]) -> dict[str, Any]:
    groups = [_group(found, sweep) for found in judged]
    return {
        "sweep": sweep.name,
        "score": judged[0].score,
        "best": groups[0]["settings"][judged[0].best],
        "smallest": groups[0]["settings"][judged[0].smallest],
        "groups": groups,
        "not_compared": [vars(entry) for entry in left_out],
    }


def _group(judged: Judged, sweep: Sweep) -> dict[str, Any]:
    settings = []
    for i, setting in enumerate(judged.settings):
        estimates = {score: judged.estimates[score][i] for score in judged.scores}
        versus = judged.versus[i]
        settings.append(
            {
                "swept": setting.swept,
                "point": setting.adoptable.name,  # of its seeds the one with the lowest validation loss
                "points": {str(seed): point.name for seed, point in sorted(setting.points.items())},
                **{key: setting.mean(key) for key in FIGURES},
                "trainable_parameters": judged.parameters(i),
                "peak_memory_bytes": judged.peak_memory(i),
                "scores": {score: {"value": e.value, **vars(e.interval)} for score, e in estimates.items()},
                "harness": {key: values[i] for key, values in judged.harness.items()},
                "versus_best": {**vars(versus), "interval": vars(versus.interval)},
            }
        )
    return {
        "num_rows": judged.group.num_rows,
        "same": judged.group.same,
        "chosen_by": judged.chosen_by,
        "best": judged.best,
        "smallest": judged.smallest,
        "not_shown_worse": judged.equals,
        "edges": [vars(edge) for edge in find_edges(judged, sweep)],
        "settings": settings,
    }


def _points_csv(sweep: Sweep, judged: Sequence[Judged], left_out: Sequence[LeftOut]) -> str:
    axes = list(dict.fromkeys(key for found in judged for setting in found.settings for key in setting.swept))
    scores = judged[0].scores
    rows: dict[str, dict[str, Any]] = {
        entry.point: {"state": entry.kind, "reason": " ".join(entry.reason.split())} for entry in left_out
    }
    for place, found in enumerate(judged, start=1):
        for i, setting in enumerate(found.settings):
            for seed, point in setting.points.items():
                values = found.group.values(point.name)
                rows[point.name] = {
                    "state": "finished", SEED: seed, "group": place, "standing": found.versus[i].standing,
                    **{key: text_of(value) for key, value in setting.swept.items()},
                    **{key: point.train[key] for key in FIGURES}, **{score: values.get(score) for score in scores},
                }  # fmt: skip
    titles = ["point", "state", "group", *axes, SEED, *FIGURES, *scores, "standing", "reason"]
    text = io.StringIO()
    writer = csv.DictWriter(text, titles, lineterminator="\n")
    writer.writeheader()
    writer.writerows({"point": name, **rows[name]} for name in sweep.points)
    return text.getvalue()


def _metrics(judged: Judged, num_points: int) -> dict[str, float]:
    """Finite numbers alone: MLflow's stores differ in what else they take."""
    found: dict[str, float] = {
        "num_points": num_points,
        "num_compared": len(judged.group.points),
        "num_settings": len(judged.settings),
        "num_not_shown_worse": len(judged.equals),
    }
    for name, i in (("best", judged.best), ("smallest", judged.smallest)):
        setting = judged.settings[i]
        found |= {f"{name}.{key}": setting.mean(key) for key in FIGURES}
        for score in judged.scores:
            estimate = judged.estimates[score][i]
            found[f"{name}.{score}"] = estimate.value
            found |= {f"{name}.{score}_{end}": value for end, value in vars(estimate.interval).items()}
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}


def _json(value: Any) -> Any:
    """The same with None for what is not finite, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m pipeline.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("sweep", type=Path, help="its folder, such as multirun/NAME")
    parser.add_argument(
        "--score", default="loss", help=f"what decides: loss, rouge_l, ... {FORGETTING} (default: loss)"
    )
    given = parser.parse_args(arguments)
    try:
        print(compare(given.sweep, given.score).text)
    except PipelineError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
