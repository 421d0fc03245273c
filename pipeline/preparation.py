"""From raw files to tokenised splits: read, sort out, split, tokenise, count."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pipeline.conversations import Row
from pipeline.dataset import SPLITS, Example, write_split
from pipeline.encoding import Encoded, Encoder
from pipeline.errors import ConfigError, DataError
from pipeline.files import write_text
from pipeline.quarantine import Quarantine
from pipeline.reading import read_splits
from pipeline.rows import Reason
from pipeline.schema import DataConfig, TooLong
from pipeline.templates import check_system_prompt

ROWS_A_CHUNK = 1000
HISTOGRAM_BINS = 32


@dataclass(frozen=True)
class Outputs:
    """Where `prepare` writes: a folder of splits, the quarantined rows, the length histogram."""

    processed: Path
    quarantine: Path
    lengths: Path


def prepare(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_context: int | None,
    outputs: Outputs,
    num_workers: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes the splits and reports, and returns the metrics.

    Args:
        max_context: the model's, in tokens; None where it sets no limit.
        num_workers: processes that tokenise; their number changes no byte.

    Raises:
        ConfigError: settings that do not fit the data, the template or the model.
        DataError: no usable data, too many bad rows, or rows too long where `data.too_long` is `error`. The quarantine
            file is written before.
    """
    encoder = _make_encoder(data, tokenizer, max_context)
    quarantine = Quarantine()
    try:
        splits = read_splits(data, encoder.template, quarantine, progress)
        quarantine.check(data.max_bad_share, outputs.quarantine)
        metrics: dict[str, Any] = {}
        examples = {}
        for name in SPLITS:
            encoded = _encode(encoder, splits[name], num_workers, name if progress else None)
            for bad in encoded.bad:
                quarantine.add(bad)
            examples[name] = encoded.examples
            metrics[name] = _split_metrics(encoded)
        quarantine.check(data.max_bad_share, outputs.quarantine)
        _check_lengths(data, quarantine, outputs.quarantine)
    finally:
        quarantine.write(outputs.quarantine)
    _check_not_empty(data, examples, outputs.quarantine)
    outputs.processed.mkdir(parents=True, exist_ok=True)
    for name, rows in examples.items():
        write_split(outputs.processed / f"{name}.arrow", rows)
    write_text(outputs.lengths, length_histogram(examples, data.max_length))
    return {**metrics, **_raw_metrics(quarantine), "chat_template_sha256": encoder.template.sha256}


def _make_encoder(data: DataConfig, tokenizer: PreTrainedTokenizerBase, max_context: int | None) -> Encoder:
    """The encoder, after checking settings against model and template. Raises: ConfigError: they do not fit."""
    if max_context is not None and data.max_length > max_context:
        raise ConfigError(
            f"data.max_length: {data.max_length} is over the model's context of {max_context} tokens; set that or less."
        )
    encoder = Encoder(tokenizer, data.max_length, data.too_long, data.text_overlap)
    problem = check_system_prompt(encoder.template, data.system_prompt)
    if problem:
        raise ConfigError(f"data.system_prompt: {problem}. Set null, or a model.chat_template that takes one.")
    return encoder


_worker_encoder: list[Encoder] = []  # of a worker process, set once when it starts


def _start_worker(encoder: Encoder) -> None:
    _worker_encoder[:] = [encoder]


def _encode_in_worker(rows: Sequence[Row]) -> Encoded:
    return _worker_encoder[0].encode(rows)


def _encode(encoder: Encoder, rows: Sequence[Row], num_workers: int, bar: str | None) -> Encoded:
    chunks = [rows[start : start + ROWS_A_CHUNK] for start in range(0, len(rows), ROWS_A_CHUNK)]
    total = Encoded()
    with tqdm(total=len(rows), desc=f"tokenise {bar}", disable=bar is None, unit=" rows", leave=False) as progress:
        for chunk, encoded in zip(chunks, _encode_chunks(encoder, chunks, num_workers), strict=True):
            total.examples += encoded.examples
            total.bad += encoded.bad
            total.num_truncated += encoded.num_truncated
            total.num_unrolled += encoded.num_unrolled
            progress.update(len(chunk))
    return total


def _encode_chunks(encoder: Encoder, chunks: Sequence[Sequence[Row]], num_workers: int) -> Iterator[Encoded]:
    if num_workers <= 1 or len(chunks) <= 1:
        yield from map(encoder.encode, chunks)
        return
    with ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (encoder,)) as pool:
        yield from pool.map(_encode_in_worker, chunks)


def _check_lengths(data: DataConfig, quarantine: Quarantine, path: Path) -> None:
    long = [row for row in quarantine.rows if row.reason is Reason.too_long]
    if long and data.too_long is TooLong.error:
        firsts = "\n".join(f"  {row.file}:{row.line}: {row.detail}" for row in long[:5])
        raise DataError(
            f"{len(long):,} rows have more than data.max_length={data.max_length} tokens, and data.too_long is error:\n"
            f"{firsts}\nAll stand in {path}. Raise data.max_length, or set data.too_long to drop or truncate_prompt."
        )


def _check_not_empty(data: DataConfig, examples: dict[str, list[Example]], path: Path) -> None:
    for name, rows in examples.items():
        if rows:
            continue
        file = getattr(data.files, name, data.general_path)
        where = f"of {file}" if file else f"split off {data.files.train} by data.{name}_share"
        raise DataError(f"{name}: no row {where} is left. Give more rows; {path} has those that were sorted out.")


def _split_metrics(encoded: Encoded) -> dict[str, Any]:
    """Counts of one split; lengths in tokens."""
    lengths = np.array([len(example.input_ids) for example in encoded.examples], dtype=np.int64)
    supervised = sum(int(np.sum(example.completion_mask[1:])) for example in encoded.examples)
    num_tokens = int(lengths.sum())
    return {
        "num_rows": len(lengths),
        "num_tokens": num_tokens,
        "num_supervised_tokens": supervised,
        "supervised_share": round(supervised / num_tokens, 6) if num_tokens else 0.0,
        "length_p50": _percentile(lengths, 0.50),
        "length_p95": _percentile(lengths, 0.95),
        "length_max": int(lengths.max(initial=0)),
        "num_too_long_dropped": sum(row.reason is Reason.too_long for row in encoded.bad),
        "num_too_long_truncated": encoded.num_truncated,
        "num_unrolled": encoded.num_unrolled,
    }


def _percentile(lengths: np.ndarray, share: float) -> int:
    """The smallest length that at least this share of the rows does not exceed."""
    return int(np.sort(lengths)[math.ceil(share * len(lengths)) - 1]) if len(lengths) else 0


def _raw_metrics(quarantine: Quarantine) -> dict[str, Any]:
    num_rows = sum(quarantine.num_rows.values())
    bad = {reason: n for reason, n in quarantine.counts().items() if reason != Reason.too_long}
    counted = {str(reason): bad.get(str(reason), 0) for reason in Reason if reason is not Reason.too_long}
    return {
        "num_raw_rows": num_rows,
        "quarantined": counted,
        "num_quarantined": sum(bad.values()),
        "quarantined_share": round(sum(bad.values()) / num_rows, 6),
    }


def length_histogram(examples: dict[str, list[Example]], max_length: int) -> str:
    """CSV for `dvc plots`: rows of each split by length in tokens, `length` the bin's lower end."""
    width = max(1, 2 ** math.ceil(math.log2(max(1, max_length / HISTOGRAM_BINS))))
    lines = ["length,count,split"]
    for name, rows in examples.items():
        bins = [len(example.input_ids) // width for example in rows]
        lines += [f"{i * width},{bins.count(i)},{name}" for i in range(max_length // width + 1)]
    return "\n".join(lines) + "\n"
