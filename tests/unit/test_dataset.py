"""Processed splits: what is written is read back, also by `datasets`, and equal rows give equal bytes."""

import datasets
import numpy as np
import pytest

from pipeline.dataset import SCHEMA, Example, count_rows, load_split, write_split
from pipeline.errors import DataError

EXAMPLES = [
    Example("a:1", [1, 5, 6, 2], [0, 0, 1, 1], 2, "prompt", ["x", "y é"]),
    Example("a:2#1", [7, 8, 9], [1, 1, 1], 0, "", []),
    Example("a:3", np.array([1, 2], dtype=np.int32), np.array([0, 1], dtype=np.uint8), 1, "p", ["z"]),
]


def test_rows_come_back_as_they_were(tmp_path):
    assert write_split(tmp_path / "train.arrow", EXAMPLES, rows_a_batch=2) == 3
    split = load_split(tmp_path, "train")
    assert len(split) == count_rows(tmp_path, "train") == 3
    assert split.input_ids(0).tolist() == [1, 5, 6, 2]
    assert split.prompt_ids(0).tolist() == [1, 5]
    assert split.completion_mask(1).tolist() == [1, 1, 1]
    assert (split.row_id(1), split.prompt(0), split.references(0)) == ("a:2#1", "prompt", ["x", "y é"])
    assert split.lengths.tolist() == [4, 3, 2]
    assert split.num_supervised.tolist() == [2, 2, 1]  # the first token of a row has no predecessor
    assert len(split.head(2)) == 2
    assert split.head(2).input_ids(1).tolist() == [7, 8, 9]
    assert not split.input_ids(0).flags.writeable


def test_datasets_reads_it_too(tmp_path):
    write_split(tmp_path / "train.arrow", EXAMPLES)
    table = datasets.Dataset.from_file(str(tmp_path / "train.arrow"))
    assert table.column_names == SCHEMA.names
    assert table[0]["input_ids"] == [1, 5, 6, 2]
    assert table[0]["references"] == ["x", "y é"]
    assert table[1]["completion_mask"] == [1, 1, 1]


def test_equal_rows_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_split(tmp_path / name, iter(EXAMPLES))
    write_split(tmp_path / "c", EXAMPLES[:2])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_an_empty_split_can_be_read(tmp_path):
    write_split(tmp_path / "test.arrow", [])
    assert len(load_split(tmp_path, "test")) == 0


def test_what_is_no_split_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no such file"):
        load_split(tmp_path, "train")
    with pytest.raises(DataError, match=r"no such file"):
        count_rows(tmp_path, "train")
    (tmp_path / "train.arrow").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"not an Arrow stream"):
        load_split(tmp_path, "train")
    write_split(tmp_path / "train.arrow", EXAMPLES)
    whole = (tmp_path / "train.arrow").read_bytes()
    (tmp_path / "train.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train.arrow"):
        load_split(tmp_path, "train")
