"""Which row goes to which split: by files, else by hash of the prompt; duplicates and leaked prompts are sorted out."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from pipeline.conversations import Document, Row, digest
from pipeline.quarantine import Quarantine
from pipeline.rows import BadRow, Reason, excerpt
from pipeline.schema import DataConfig


def hash_share(key: str) -> float:
    """A number from 0 to under 1 that depends on the key alone."""
    return int(digest(f"split:{key}")[:15], 16) / 16**15


def split_rows(rows: Sequence[Row], data: DataConfig) -> dict[str, list[Row]]:
    """Splits off validation and test rows where the settings name no files for them.

    By hash of the prompt: adding rows moves no old row, and equal prompts stay together. Shares are of prompts, so
    of rows only about.
    """
    test = 0.0 if data.files.test is not None else data.test_share
    validation = test if data.files.validation is not None else test + data.validation_share
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        share = hash_share(row.prompt_key)
        splits["test" if share < test else "validation" if share < validation else "train"].append(row)
    return splits


def split_text(document: Document, data: DataConfig) -> dict[str, list[Row]]:
    """Cuts one continuous text: its end is the test split, what stands before that the validation split.

    A text file has no rows to hash, and its lines belong together. Cuts fall on line ends.
    """
    test = 0.0 if data.files.test is not None else data.test_share
    validation = 0.0 if data.files.validation is not None else data.validation_share
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    text, start = document.text, 0
    for name, end_share in (("train", 1 - test - validation), ("validation", 1 - test), ("test", 1.0)):
        end = len(text) if end_share == 1.0 else text.find("\n", round(end_share * len(text))) + 1 or len(text)
        if end > start:
            line = document.line + text.count("\n", 0, start)
            key = digest(text[start:end])
            splits[name].append(replace(document, line=line, text=text[start:end], prompt_key=key, row_key=key))
        start = max(start, end)
    return splits


def remove_duplicates(rows: Iterable[Row], quarantine: Quarantine) -> list[Row]:
    """The rows without those that repeat an earlier one exactly."""
    first: dict[str, Row] = {}
    kept = []
    for row in rows:
        if row.row_key in first:
            quarantine.add(bad_row(row, Reason.duplicate, f"the same as {first[row.row_key].row_id}"))
        else:
            first[row.row_key] = row
            kept.append(row)
    return kept


def remove_leaks(rows: Iterable[Row], train: Iterable[Row], quarantine: Quarantine) -> list[Row]:
    """The rows of validation or test whose prompt does not stand in train."""
    known: dict[str, str] = {}
    for row in train:
        known.setdefault(row.prompt_key, row.row_id)
    kept = []
    for row in rows:
        if row.prompt_key in known:
            quarantine.add(bad_row(row, Reason.prompt_in_train, f"its prompt is that of {known[row.prompt_key]}"))
        else:
            kept.append(row)
    return kept


def take_rows(rows: list[Row], max_rows: int | None) -> list[Row]:
    """At most `max_rows` of the rows, in their order: those with the lowest hash, so that a larger number only adds."""
    if max_rows is None or max_rows >= len(rows):
        return rows
    taken = set(sorted(digest(f"rows:{row.row_key}") for row in rows)[:max_rows])
    return [row for row in rows if digest(f"rows:{row.row_key}") in taken]


def bad_row(row: Row, reason: Reason, detail: str) -> BadRow:
    text = row.text if isinstance(row, Document) else list(row.messages)
    return BadRow(row.file, row.line, reason, detail, excerpt(text))
