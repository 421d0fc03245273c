"""Test rows in the training data: against a direct count of n-grams, and the edges."""

import random

import pytest

from pipeline.contamination import Overlap, contaminated, overlaps
from pipeline.dataset import Example, Split, load_split, write_split
from pipeline.errors import ConfigError


@pytest.fixture
def split(tmp_path):
    """split(name, [(prompt tokens, answer tokens), ...]) -> Split; rows are called name:0, name:1, ..."""

    def make(name: str, rows) -> Split:
        examples = [
            Example(f"{name}:{i}", [*prompt, *answer], [0] * len(prompt) + [1] * len(answer), len(prompt), "", [])
            for i, (prompt, answer) in enumerate(rows)
        ]
        write_split(tmp_path / f"{name}.arrow", examples)
        return load_split(tmp_path, name)

    return make


def ngrams(tokens, n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def direct(test, train, n: int) -> list[Overlap]:
    """By sets of tuples, a pair of rows at a time."""
    held = [set(ngrams([*prompt, *answer], n)) for prompt, answer in train]
    result = []
    for i, row in enumerate(test):
        shares, counts = [], [0] * len(train)
        for part, tokens in enumerate(row):
            grams = ngrams(tokens, n) if len(tokens) >= n else [tuple(tokens)] if tokens else []
            found = 0
            for gram in grams:
                holders = [
                    k for k in range(len(train))
                    if (gram in held[k] if len(gram) == n else gram == tuple(train[k][part]))
                ]  # fmt: skip
                found += bool(holders)
                for k in holders:
                    counts[k] += 1
            shares.append(found / len(grams) if grams else None)
        best = f"train:{counts.index(max(counts))}" if max(counts, default=0) else None
        is_exact = any(list(map(list, row)) == list(map(list, other)) for other in train)
        result.append(Overlap(f"test:{i}", *shares, best, is_exact))
    return result


def made_rows(num: int, seed: int, words: int = 3, template=()) -> list[tuple[list[int], list[int]]]:
    """Rows of few words, so that n-grams recur; parts from 0 tokens."""
    generator = random.Random(seed)
    lengths = [(generator.randint(0, 9), generator.randint(0, 6)) for _ in range(num)]
    return [
        tuple([*template, *(generator.randint(5, 4 + words) for _ in range(size))] for size in pair) for pair in lengths
    ]


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("template", [(), (100, 101, 102, 103, 104)])  # in all rows: more holders than not
@pytest.mark.parametrize(("chunk", "filter_bits"), [(7, 1), (2**20, 24)])
def test_overlaps_are_those_of_a_direct_count(split, monkeypatch, n, template, chunk, filter_bits):
    monkeypatch.setattr("pipeline.contamination.CHUNK", chunk)
    monkeypatch.setattr("pipeline.contamination.FILTER_BITS", filter_bits)  # of 1: all pass it
    train = made_rows(60, 0, template=template)
    test = [*made_rows(30, 1, template=template), *made_rows(10, 2, words=60), *train[20:23], ([], [])]
    found = overlaps(split("test", test), split("train", train), n)
    assert found == direct(test, train, n)
    assert any(overlap.is_exact for overlap in found)
    assert not all(overlap.is_exact for overlap in found)
    assert n == 1 or len({overlap.train_row_id for overlap in found}) > 5  # of 3 tokens, most rows have all


def test_what_counts_as_shared(split):
    train = split("train", [([1, 2, 3, 4, 5, 6], [7, 8]), ([1, 2, 3, 4, 50, 60], [7, 8]), ([9], [10, 11, 12, 13])])
    test = [
        ([1, 2, 3, 4, 5, 6], [7, 8]),  # exactly there
        ([1, 2, 3, 4, 50, 99], [7, 8]),
        ([4, 3, 2, 1, 0, 5], [8, 7]),  # the same tokens in another order
        ([99, 98, 97], [10, 11, 12, 14]),
        ([9], [7]),  # short parts: whole parts alone
        ([5, 6, 7, 8], []),  # of prompt and answer together
    ]
    assert overlaps(split("test", test), train, 3) == [
        Overlap("test:0", 1.0, 1.0, "train:0", True),
        Overlap("test:1", 0.75, 1.0, "train:1", False),
        Overlap("test:2", 0.0, 0.0, None, False),
        Overlap("test:3", 0.0, 0.5, "train:2", False),
        Overlap("test:4", 1.0, 0.0, "train:2", False),
        Overlap("test:5", 1.0, None, "train:0", False),
    ]


def test_prompt_and_answer_of_two_rows_are_not_one(split):
    """The parts stand in train, but not together; the same tokens parted elsewhere are not it either."""
    train = split("train", [([1, 2], [3, 4]), ([5, 6], [7, 8])])
    found = overlaps(split("test", [([1, 2], [7, 8]), ([1, 2, 3], [4]), ([5, 6], [7, 8])]), train, 2)
    assert [overlap.is_exact for overlap in found] == [False, False, True]
    assert (found[0].prompt, found[0].answer) == (1.0, 1.0)


def test_empty_splits(split):
    rows = split("rows", [([1, 2, 3], [4])])
    empty = split("empty", [])
    assert overlaps(empty, rows, 2) == []
    assert overlaps(rows, empty, 2) == [Overlap("rows:0", 0.0, 0.0, None, False)]
    with pytest.raises(ConfigError, match="n must be 1 or more"):
        overlaps(rows, rows, 0)


@pytest.mark.parametrize(
    ("prompt", "answer", "is_exact", "expected"),
    [
        (0.9, 0.8, False, True),
        (0.9, 0.7, False, False),  # a prompt from a template is no leak by itself
        (0.1, 1.0, False, False),
        (None, 0.9, False, True),
        (None, 0.1, False, False),
        (None, None, False, False),
        (None, 0.1, True, True),
    ],
)
def test_contaminated_is_every_part_or_exact(prompt, answer, is_exact, expected):
    assert contaminated(Overlap("t", prompt, answer, "r", is_exact), 0.8) is expected
