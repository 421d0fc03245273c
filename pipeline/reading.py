"""The usable rows of every split: read, checked, split, freed of repetitions and leaks, in the order of the files."""

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from pipeline.conversations import Document, Row, Unusable, check_columns, digest, parse_row
from pipeline.dataset import SPLITS
from pipeline.errors import ConfigError, DataError
from pipeline.quarantine import Quarantine
from pipeline.rows import BadRow, RawRow, read_hub_rows, read_rows
from pipeline.schema import Columns, DataConfig, Shape
from pipeline.splits import bad_row, remove_duplicates, remove_leaks, split_rows, split_text, take_rows
from pipeline.templates import ChatTemplate


def read_splits(
    data: DataConfig, template: ChatTemplate, quarantine: Quarantine, progress: bool = False
) -> dict[str, list[Row]]:
    """The usable rows of each split, in the order of the files.

    Raises:
        ConfigError: columns or paths that do not fit.
        DataError: a file that is missing, empty or damaged.
    """
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for name in ("train", "validation", "test"):
        file = getattr(data.files, name)
        if file is None:
            continue
        rows = _read_file(data, file, template, quarantine, progress)
        if name == "train":
            one_text = rows[0] if rows and _is_text(file) else None
            cut = split_text(one_text, data) if isinstance(one_text, Document) else split_rows(rows, data)
            for part, taken in cut.items():
                splits[part] += taken
        else:
            splits[name] += rows
    for name in ("train", "validation", "test"):
        if not _is_text(getattr(data.files, name) or data.files.train or ""):
            splits[name] = remove_duplicates(splits[name], quarantine)
        if name != "train":
            splits[name] = remove_leaks(splits[name], splits["train"], quarantine)
    if _is_text(data.files.train or "") and data.max_rows is not None:
        raise ConfigError("data.max_rows: a .txt file has no rows to choose from; set null and give a shorter file.")
    splits["train"] = take_rows(splits["train"], data.max_rows)
    splits["general"] = _read_general(data, template, quarantine, progress)
    return splits


def _read_general(data: DataConfig, template: ChatTemplate, quarantine: Quarantine, progress: bool) -> list[Row]:
    path = Path(data.general_path)
    settings = DataConfig(path=data.general_path, hub_id=None, shape=Shape.text, columns=Columns(text="text"))
    rows = _read_file(settings, path.name, template, quarantine, progress, f"general/{path.name}")
    # no end token: a general text may stop anywhere, and forgetting is measured on its words
    return [Document(row.file, row.line, row.text, ends=False) for row in rows if isinstance(row, Document)]


def _read_file(
    data: DataConfig,
    file: str,
    template: ChatTemplate,
    quarantine: Quarantine,
    progress: bool,
    name: str | None = None,
) -> list[Row]:
    """The usable rows of one file, what cannot be used going to the quarantine; a `.txt` is one document."""
    if data.hub_id is not None:
        name, raw = f"{data.hub_id}/{file}", read_hub_rows(data, file)
    else:
        name = name or file
        raw = read_rows(_path(data, file), name)
        if _is_text(file) and data.shape is not Shape.text:
            raise ConfigError(f"data.shape: {data.shape}, but {file} is plain text; set data.shape=text.")
    rows: list[Row] = []
    parsed: list[RawRow] = []
    for item in tqdm(raw, desc=f"read {file}", disable=not progress, unit=" rows", leave=False):
        quarantine.num_rows[name] += 1
        if isinstance(item, BadRow):
            quarantine.add(item)
        else:
            parsed.append(item)
    if not quarantine.num_rows[name]:
        raise DataError(f"{name}: has no rows. Give a file with data, or set it to null in data.files.")
    if _is_text(file) and data.hub_id is None:
        return _read_document(parsed, template, quarantine)
    if parsed:
        check_columns({key for item in parsed for key in item.fields}, data, name)
    for item in parsed:
        row = parse_row(item, data)
        try:
            if isinstance(row, BadRow):
                quarantine.add(row)
            else:
                template.check_text(row)
                rows.append(row)
        except Unusable as error:
            assert not isinstance(row, BadRow)
            quarantine.add(bad_row(row, error.reason, error.detail))
    return rows


def _read_document(lines: Iterable[RawRow], template: ChatTemplate, quarantine: Quarantine) -> list[Row]:
    kept = []
    for item in lines:
        line = Document(item.file, item.line, item.fields["text"], ends=False)
        try:
            template.check_text(line)
            kept.append(line)
        except Unusable as error:
            quarantine.add(bad_row(line, error.reason, error.detail))
    text = "".join(line.text for line in kept)
    key = digest(text)
    return [Document(kept[0].file, kept[0].line, text, ends=False, prompt_key=key, row_key=key)] if text.strip() else []


def _path(data: DataConfig, file: str) -> Path:
    path = Path(data.path)
    if path.is_dir():
        return path / file
    if path.name == file or not path.exists():
        return path if path.name == file else path / file
    raise ConfigError(
        f"data.files: '{file}' is not the file that data.path names ({path.name}). Set data.files.train to it "
        "and the others to null, or data.path to the folder that holds all of them."
    )


def _is_text(file: str) -> bool:
    return file.removesuffix(".gz").endswith(".txt")
