"""Raw rows from files and from the Hub, each with its file and line, or the reason why it cannot be read.

Formats by suffix: .jsonl, .json (an array of objects, or JSON lines), .csv, .parquet, each also .gz; .txt holds plain
text.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DataError
from pipeline.schema import DataConfig

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
EXCERPT_CHARACTERS = 200


class Reason(StrEnum):
    """Why a row is not used."""

    bad_json = "bad_json"
    bad_csv = "bad_csv"
    bad_encoding = "bad_encoding"
    missing_field = "missing_field"
    empty_field = "empty_field"
    wrong_type = "wrong_type"
    nothing_to_supervise = "nothing_to_supervise"
    duplicate = "duplicate"
    prompt_in_train = "prompt_in_train"
    control_token = "control_token"
    refused_by_template = "refused_by_template"
    prompt_not_prefix = "prompt_not_prefix"
    too_long = "too_long"  # by the policy `data.too_long`; never counted as bad


@dataclass(frozen=True)
class RawRow:
    """One object of a raw file; `line` counts from 1 (in Parquet and on the Hub, the row's number)."""

    file: str
    line: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that is not used, why, and how it begins."""

    file: str
    line: int
    reason: Reason
    detail: str
    excerpt: str = ""


def read_rows(path: Path, name: str) -> Iterator[RawRow | BadRow]:
    """The rows of one file, in its order; `.txt` gives one row a line, `{"text": line}` with its newline.

    Args:
        name: what rows and messages call the file.

    Raises:
        ConfigError: a suffix that names no known format.
        DataError: no such file, or one that is damaged as a whole.
    """
    suffix = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    readers = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "txt": _read_text}
    if suffix not in readers:
        raise ConfigError(f"{name}: unknown format; the name must end in {', '.join(SUFFIXES)} (and .gz).")
    if not path.is_file():
        raise DataError(f"{path}: no such file.{_neighbours(path)}")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from readers[suffix](file, name)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}). Fetch or compress it again.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from None


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    names = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))
    near = get_close_matches(path.name, names, n=1)
    return f" Did you mean {near[0]}?" if near else f" {path.parent} holds {', '.join(names[:10]) or 'nothing'}."


def excerpt(value: Any) -> str:
    """How a raw row begins, for people."""
    if isinstance(value, bytes):
        value = value[: 4 * EXCERPT_CHARACTERS].decode("utf-8", errors="backslashreplace")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text[:EXCERPT_CHARACTERS].encode("utf-8", errors="backslashreplace").decode().rstrip("\r\n")


def has_bad_encoding(value: Any) -> bool:
    """Whether a text inside the value has surrogates: bytes that were no UTF-8, or half of an escaped pair."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return True
        return False
    if isinstance(value, dict):
        return any(has_bad_encoding(item) for pair in value.items() for item in pair)
    return isinstance(value, list) and any(has_bad_encoding(item) for item in value)


def _checked(file: str, line: int, value: Any) -> RawRow | BadRow:
    if not isinstance(value, dict):
        return BadRow(file, line, Reason.wrong_type, f"a row must be an object, this is {_kind(value)}", excerpt(value))
    if has_bad_encoding(value):
        return BadRow(file, line, Reason.bad_encoding, "not valid UTF-8, or half of a surrogate pair", excerpt(value))
    return RawRow(file, line, value)


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}
    return kinds.get(type(value), "null")


def _read_jsonl(file: Any, name: str) -> Iterator[RawRow | BadRow]:
    for line, content in enumerate(file, start=1):
        content = content.removeprefix(b"\xef\xbb\xbf") if line == 1 else content
        if not content.strip():
            continue
        try:
            yield _checked(name, line, json.loads(content.decode("utf-8")))
        except UnicodeDecodeError as error:
            detail = f"byte {error.start + 1} of the line is not UTF-8"
            yield BadRow(name, line, Reason.bad_encoding, detail, excerpt(content))
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            message = _why_no_json(error)
            column = getattr(error, "colno", 1)
            yield BadRow(name, line, Reason.bad_json, f"{message} at column {column}", excerpt(content))


def _why_no_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def _read_json(file: Any, name: str) -> Iterator[RawRow | BadRow]:
    content = file.read().removeprefix(b"\xef\xbb\xbf")
    text = content.decode("utf-8", errors="surrogateescape")
    if text.lstrip()[:1] == "{":
        yield from _read_jsonl(io.BytesIO(content), name)
        return
    if text.lstrip()[:1] not in ("[", ""):
        raise DataError(f"{name}: not JSON: it must be an array of objects, or one object a line.")
    decoder, line, counted = json.JSONDecoder(), 1, 0
    position = text.find("[") + 1
    while position:
        position = _skip(text, position)
        if text[position : position + 1] == "]":
            return
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
            position = _skip(text, position)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("expecting ',' or ']'", text, position)
        except (ValueError, RecursionError) as error:
            where = getattr(error, "lineno", line)
            raise DataError(
                f"{name}:{where}: not valid JSON ({_why_no_json(error)}). After such an error "
                "the rest of an array cannot be read: mend it, or write JSON lines (.jsonl), where one costs one row."
            ) from None
        yield _checked(name, line, value)
        position += text[position] == ","


def _skip(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


def _read_csv(file: Any, name: str) -> Iterator[RawRow | BadRow]:
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{name}:1: the line of column names cannot be read ({error}). Mend it.") from None
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(f"{name}:1: names a column twice ({', '.join(twice)}); only one of them could be read.")
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(f"{name}:{line}: a quote that opens here is never closed. Close it.") from None
            yield BadRow(name, line, Reason.bad_csv, str(error))
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            detail = f"{len(cells)} cells in a file of {len(header)} columns"
            yield BadRow(name, line, Reason.bad_csv, detail, excerpt(",".join(cells)))
        else:
            yield _checked(name, line, dict(zip(header, cells, strict=True)))


def _read_parquet(file: Any, name: str) -> Iterator[RawRow | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file)
        start = 1
        for batch in table.iter_batches():
            for line, fields in enumerate(batch.to_pylist(), start=start):
                yield _checked(name, line, fields)
            start += batch.num_rows
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: a text in it is not UTF-8 ({error}). Write the file again.") from None
    except pa.ArrowException as error:
        raise DataError(f"{name}: damaged Parquet file ({error}). Fetch or write it again.") from None


def _read_text(file: Any, name: str) -> Iterator[RawRow | BadRow]:
    for line, content in enumerate(file, start=1):
        try:
            content = content.removeprefix(b"\xef\xbb\xbf") if line == 1 else content
            yield RawRow(name, line, {"text": content.decode("utf-8")})
        except UnicodeDecodeError as error:
            detail = f"byte {error.start + 1} of the line is not UTF-8"
            yield BadRow(name, line, Reason.bad_encoding, detail, excerpt(content))


def read_hub_rows(data: DataConfig, split: str) -> Iterator[RawRow | BadRow]:
    """The rows of one split of the data set `data.hub_id` at `data.revision`.

    Raises:
        ConfigError: a local folder of that name would be read in the data set's place.
        DataError: the Hub cannot be reached, or has no such data set, commit or split.
    """
    import datasets

    hub_id = str(data.hub_id)
    if Path(hub_id).exists():
        raise ConfigError(
            f"data.hub_id: '{hub_id}' is a folder here, which would be read in the Hub's place. Set data.path to it."
        )
    table: Iterable[Any]
    try:
        table = datasets.load_dataset(hub_id, name=data.hub_config, revision=data.revision, split=split)
    except Exception as error:  # the Hub's clients raise errors of many libraries
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise DataError(
            f"data.hub_id: {hub_id} at {data.revision}, split '{split}', cannot be loaded ({type(error).__name__}: "
            f"{reason}). Check the id, data.revision, data.hub_config, data.files (names of splits), the network, "
            "and HF_TOKEN for gated data."
        ) from None
    for line, fields in enumerate(table, start=1):
        yield _checked(f"{hub_id}/{split}", line, fields)
