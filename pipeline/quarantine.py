"""The rows that are not used: kept with their reasons, counted, and too many of them refused."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline.errors import DataError
from pipeline.files import write_jsonl
from pipeline.rows import BadRow, Reason


@dataclass
class Quarantine:
    """Every row that is not used, and how many rows each file has."""

    rows: list[BadRow] = field(default_factory=list)
    num_rows: Counter[str] = field(default_factory=Counter)

    def add(self, row: BadRow) -> None:
        self.rows.append(row)

    def counts(self, file: str | None = None) -> dict[str, int]:
        """Rows by reason, most frequent first."""
        found = Counter(str(row.reason) for row in self.rows if file in (None, row.file))
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def write(self, path: Path) -> None:
        order = {file: i for i, file in enumerate(self.num_rows)}
        rows = sorted(self.rows, key=lambda row: (order[row.file], row.line))
        write_jsonl(path, (asdict(row) for row in rows))

    def check(self, max_bad_share: float, path: Path) -> None:
        """Raises: DataError: a file has a larger share of bad rows (too long not counted); counts and examples."""
        complaints = []
        for file, num_rows in self.num_rows.items():
            bad = [row for row in self.rows if row.file == file and row.reason is not Reason.too_long]
            if len(bad) > max_bad_share * num_rows:
                reasons = {reason: n for reason, n in self.counts(file).items() if reason != Reason.too_long}
                counted = ", ".join(f"{reason} {n:,}" for reason, n in reasons.items())
                share = f"{len(bad):,} of {num_rows:,} rows cannot be used ({100 * len(bad) / num_rows:.1f} %)"
                complaints.append(f"{file}: {share}: {counted}")
                firsts = [next(row for row in bad if row.reason == reason) for reason in reasons]
                complaints += [f"  {row.file}:{row.line}: {row.reason}: {row.detail}" for row in firsts[:5]]
        if complaints:
            raise DataError(
                f"more bad rows than data.max_bad_share={max_bad_share:g} allows:\n"
                + "\n".join(complaints)
                + f"\nEach one stands in {path} with its file, line and reason. Mend the data, or raise "
                "data.max_bad_share to go on without these rows."
            )
