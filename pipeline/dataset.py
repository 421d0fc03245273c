"""Processed splits on disk: one Arrow stream a split, read by memory mapping.

Columns:
    row_id: string, `file:line` of the raw row (and `#n` for the n-th window of a text).
    input_ids: list<int32>, prompt and completion, special tokens included.
    completion_mask: list<uint8>, as long as input_ids; 1 = the token counts in the loss.
    num_prompt_tokens: int32; `input_ids[:num_prompt_tokens]` is what generation starts from (0 for text).
    prompt: string, the same prefix as text, for people.
    references: list<string>, the right answers (empty for text).

`datasets.Dataset.from_file` reads these files too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError

SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("completion_mask", pa.list_(pa.uint8())),
        ("num_prompt_tokens", pa.int32()),
        ("prompt", pa.string()),
        ("references", pa.list_(pa.string())),
    ]
)
SPLITS = ("train", "validation", "test", "general")


@dataclass(frozen=True)
class Example:
    """One tokenised row; see the module's columns."""

    row_id: str
    input_ids: Sequence[int] | np.ndarray
    completion_mask: Sequence[int] | np.ndarray
    num_prompt_tokens: int
    prompt: str
    references: Sequence[str]


class Split:
    """A processed split; token arrays are views into the file's memory map.

    Attributes:
        lengths: int64 [num_rows], tokens a row.
        num_supervised: int64 [num_rows], supervised tokens that have a predecessor, a row.
    """

    def __init__(self, table: pa.Table, name: str = "split"):
        self.name = name
        table = table.combine_chunks()
        self._table = table
        self._ids, self._offsets = _flat(table, "input_ids")
        self._mask, _ = _flat(table, "completion_mask")
        self.lengths = np.diff(self._offsets)
        counted = self._mask.astype(np.int64)
        starts = self._offsets[:-1][self.lengths > 0]
        counted[starts] = 0  # the first token of a row is never predicted
        sums = np.concatenate([[0], np.cumsum(counted)])
        self.num_supervised = sums[self._offsets[1:]] - sums[self._offsets[:-1]]

    def __len__(self) -> int:
        return len(self.lengths)

    def input_ids(self, index: int) -> np.ndarray:
        """int32 [length], a read-only view."""
        return self._ids[self._offsets[index] : self._offsets[index + 1]]

    def completion_mask(self, index: int) -> np.ndarray:
        """uint8 [length], a read-only view."""
        return self._mask[self._offsets[index] : self._offsets[index + 1]]

    def num_prompt_tokens(self, index: int) -> int:
        return self._table["num_prompt_tokens"][index].as_py()

    def prompt_ids(self, index: int) -> np.ndarray:
        """int32 [num_prompt_tokens]: what generation starts from."""
        return self.input_ids(index)[: self.num_prompt_tokens(index)]

    def row_id(self, index: int) -> str:
        return self._table["row_id"][index].as_py()

    def prompt(self, index: int) -> str:
        return self._table["prompt"][index].as_py()

    def references(self, index: int) -> list[str]:
        return self._table["references"][index].as_py()

    def head(self, num_rows: int | None) -> "Split":
        """The first `num_rows` rows; the split itself for None."""
        if num_rows is None or num_rows >= len(self):
            return self
        return Split(self._table.slice(0, num_rows), self.name)


def _flat(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    array = table[column]
    chunk = array.chunk(0) if array.num_chunks else pa.array([], type=SCHEMA.field(column).type)
    offsets = chunk.offsets.to_numpy().astype(np.int64)
    values = chunk.values.to_numpy()
    return values, offsets


def write_split(path: Path, examples: Iterable[Example], rows_a_batch: int = 1000) -> int:
    """Writes one split and returns its number of rows; equal examples give equal bytes."""
    count = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        batch: list[Example] = []
        for example in examples:
            batch.append(example)
            count += 1
            if len(batch) == rows_a_batch:
                writer.write_batch(_record_batch(batch))
                batch = []
        if batch:
            writer.write_batch(_record_batch(batch))
    return count


def _record_batch(examples: list[Example]) -> pa.RecordBatch:
    columns = [pa.array([getattr(e, f.name) for e in examples], type=f.type) for f in SCHEMA]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def load_split(folder: Path, name: str) -> Split:
    """Opens `folder/name.arrow`.

    Raises:
        DataError: the file is missing or is not such a split.
    """
    return Split(_read_table(folder, name), name)


def count_rows(folder: Path, name: str) -> int:
    """The rows of `folder/name.arrow`. Raises: DataError: as `load_split`."""
    return int(_read_table(folder, name).num_rows)


def _read_table(folder: Path, name: str) -> pa.Table:
    path = folder / f"{name}.arrow"
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Make it with `dvc repro prepare`.") from None
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path}: not an Arrow stream ({error}). Make it again with `dvc repro --force prepare`."
        ) from None
    if table.schema.names != SCHEMA.names:
        raise DataError(
            f"{path}: has columns {table.schema.names}, expected {SCHEMA.names}. Run `dvc repro --force prepare`."
        )
    return table
