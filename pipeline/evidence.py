"""What models did on each row of the test split and of the general text, and what may be concluded from it.

A row of the file `items.jsonl`: `split` (test or general), `row_id`, `cluster` (rows of one prompt belong together),
`models`: by model and score, the row's share of the score's sums (`pipeline.scoring`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.files import read_jsonl, write_jsonl
from pipeline.scoring import METRICS
from pipeline.statistics import NUM_RESAMPLES, Comparison, Estimate, ScoreTable, adjust

Item = dict[str, Any]
FILE = "items.jsonl"
SPLITS = ("test", "general")
ANSWER_KEYS = ("prediction", "ended", "exact_match", "rouge_l")  # a model's own; the rest is the row's
SAME_SUMS = {"perplexity": "loss"}  # not stored


@dataclass(frozen=True)
class ModelItems:
    """What one model did.

    Attributes:
        test: an object a test row: `row_id`, `cluster`, `sums` by score.
        general: the same of the general text.
        answers: an object a test row that has a reference, for people (`pipeline.evaluation`).
    """

    test: list[Item]
    general: list[Item]
    answers: list[dict[str, Any]]


def join_items(models: Mapping[str, ModelItems]) -> list[Item]:
    """Rows of `items.jsonl`, of models measured on the same rows."""
    joined = []
    for split in SPLITS:
        for rows in zip(*(getattr(items, split) for items in models.values()), strict=True):
            sums = {model: row["sums"] for model, row in zip(models, rows, strict=True)}
            joined.append({"split": split, "row_id": rows[0]["row_id"], "cluster": rows[0]["cluster"], "models": sums})
    return joined


def join_answers(answers_by_model: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One object a test row: what all models share, then each model's answer under its name."""
    return [
        {key: value for key, value in answers[0].items() if key not in ANSWER_KEYS}
        | {name: {key: row[key] for key in ANSWER_KEYS} for name, row in zip(answers_by_model, answers, strict=True)}
        for answers in zip(*answers_by_model.values(), strict=True)
    ]


class Evidence:
    """Scores of models, their intervals and comparisons.

    Attributes:
        models: their names.
        scores: those that there are, in the order of `pipeline.scoring.METRICS`.
    """

    def __init__(self, items: Sequence[Item], num_resamples: int = NUM_RESAMPLES):
        self.models: list[str] = list(items[0]["models"])
        self._tables: dict[str, ScoreTable] = {}  # by score
        for seed, split in enumerate(SPLITS):  # resampled each on its own
            rows = [item for item in items if item["split"] == split]
            stored = set(rows[0]["models"][self.models[0]]) if rows else set()
            scores = [score for score in METRICS if SAME_SUMS.get(score, score) in stored]
            sums = {
                (model, score): np.array(
                    [row["models"][model][SAME_SUMS.get(score, score)] for row in rows], dtype=np.float64
                )
                for model in self.models
                for score in scores
            }
            table = ScoreTable(sums, METRICS, [row["cluster"] for row in rows], num_resamples, seed)
            self._tables |= dict.fromkeys(scores, table)
        self.scores = [score for score in METRICS if score in self._tables]

    def values(self, model: str) -> dict[str, float]:
        """Every score of the model; `num_tokens` and `general_num_tokens` that its losses are on."""
        found = {score: self._tables[score].value(model, score) for score in self.scores}
        for score, key in (("loss", "num_tokens"), ("general_loss", "general_num_tokens")):
            if score in self._tables:
                found[key] = int(self._tables[score].items[model, score][:, 1].sum())
        return found

    def estimate(self, model: str, score: str) -> Estimate:
        return self._tables[score].estimate(model, score)

    def samples(self, model: str, score: str) -> np.ndarray:
        """The score on resamples of its rows, float64 [resamples]; scores on the same rows share the resamples."""
        return self._tables[score].samples(model, score)

    def num_clusters(self, score: str) -> int:
        """Independent rows, or groups of rows, that the score is on."""
        return self._tables[score].num_clusters(score)

    def compare(self, first: str, second: str, score: str) -> Comparison:
        """`first` minus `second`."""
        return self._tables[score].compare(first, second, score)

    def compare_all(self, pairs: Sequence[tuple[str, str]], scores: Sequence[str]) -> list[Comparison]:
        """Every pair in every score, adjusted for their number."""
        found = [self.compare(first, second, score) for score in scores for first, second in pairs]
        return adjust(found, METRICS)

    def forgetting(self, model: str) -> Comparison:
        """How much the model's loss on general text is above the base's, in nats a token."""
        return self.compare(model, "base", "general_loss")


def write_items(path: Path, models: Mapping[str, ModelItems]) -> None:
    write_jsonl(path, join_items(models))


def read_evidence(*paths: Path, num_resamples: int = NUM_RESAMPLES) -> Evidence:
    """The evidence of one or more files on the same rows.

    Raises:
        DataError: a file is missing or no JSON, has no rows or not those of the first, or lacks what a row must hold.
    """
    again = "Run `dvc repro` so that they are made anew."
    joined = read_jsonl(paths[0])
    names = ", ".join(map(str, paths))
    try:
        for path in paths[1:]:
            rows = read_jsonl(path)
            if list(map(_key, rows)) != list(map(_key, joined)):
                raise DataError(f"{path}: is not on the rows of {paths[0]}. {again}")
            for item, row in zip(joined, rows, strict=True):
                item["models"] |= row["models"]
        return Evidence(joined, num_resamples)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{names}: no row, or rows that differ in what they hold ({error!r}). {again}") from None


def _key(item: Item) -> tuple[str, str, str]:
    return item["split"], item["row_id"], item["cluster"]
