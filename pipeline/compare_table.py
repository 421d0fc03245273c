"""Tables of settings: for a terminal, cut at its width, and for Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.statistics import Estimate

WIDTH = 120
MAX_KEYS = 64  # of the columns that name a setting; wider, a number stands for them
GAP = "  "


@dataclass(frozen=True)
class Column:
    """Attributes: cells: one a row. is_text: aligned left."""

    title: str
    cells: list[str]
    is_text: bool = False

    @property
    def width(self) -> int:
        return max(map(len, [self.title, *self.cells]))

    def padded(self) -> list[str]:
        lines = [self.title, *self.cells]
        return [f"{line:<{self.width}}" if self.is_text else f"{line:>{self.width}}" for line in lines]


def number(value: float, decimals: int) -> str:
    """A fixed number of decimals; as a power of ten from a million on; a dash for what is not known."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.{decimals}f}" if abs(value) < 1e6 else f"{value:.2e}"


def estimate_text(estimate: Estimate, decimals: int) -> str:
    low, high = (number(end, decimals) for end in (estimate.interval.low, estimate.interval.high))
    return f"{number(estimate.value, decimals)} [{low} {high}]"


def text_tables(mark: Column, keys: Sequence[Column], columns: Sequence[Column]) -> str:
    """As many tables, one below the other, as `WIDTH` takes; each names its rows by `mark` and `keys`.

    Where the keys alone are too wide, a number stands for them.
    """
    names, tables = [mark, *keys], []
    if _width(names) > MAX_KEYS:
        names = [mark, Column("#", [str(i + 1) for i in range(len(mark.cells))])]
        tables += _packed(names, keys)
    return "\n\n".join(map(_text, [*tables, *_packed(names, columns)]))


def markdown_table(columns: Sequence[Column]) -> str:
    rows = [[column.title for column in columns], ["---" if column.is_text else "---:" for column in columns]]
    rows += [list(row) for row in zip(*(column.cells for column in columns), strict=True)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _packed(names: Sequence[Column], columns: Sequence[Column]) -> list[list[Column]]:
    tables: list[list[Column]] = []
    for column in columns:
        if not tables or _width([*tables[-1], column]) > WIDTH:
            tables.append(list(names))
        tables[-1].append(column)
    return tables


def _width(columns: Sequence[Column]) -> int:
    return sum(column.width + len(GAP) for column in columns) - len(GAP)


def _text(columns: Sequence[Column]) -> str:
    return "\n".join(GAP.join(cells).rstrip() for cells in zip(*(column.padded() for column in columns), strict=True))
