"""Writes the embedded data sets, or checks that they are what this script writes.

    python assets/make_data.py           # rewrite assets/contracts and assets/general
    python assets/make_data.py --check   # exit 1 unless the files are as generated
    python assets/make_data.py --stats   # print sizes and what is held out

Pure Python, seeded, and the same byte for byte on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from contract_grammar import ClauseMaker
from contract_words import HELD_OUT_NAME_STARTS, NAME_STARTS
from general_grammar import make_text
from grammar_tools import Rng

ASSETS = Path(__file__).resolve().parent
# Split: file name, rows, seed, first halves of names, rate of held-out wordings (0: no held-out shapes either).
SPLITS = (
    ("train", 4000, 11, NAME_STARTS, 0.0),
    ("validation", 300, 12, NAME_STARTS, 0.0),
    ("test", 300, 13, HELD_OUT_NAME_STARTS, 0.04),
)
GENERAL_ROWS, GENERAL_SEED = 300, 21


def to_jsonl(rows: list[dict[str, str]]) -> str:
    """Returns rows as JSON Lines with a closing newline."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def contract_splits() -> tuple[dict[str, list[dict[str, str]]], dict[str, ClauseMaker]]:
    """Generates the contract splits, no clause occurring twice in or across them.

    Returns:
        The rows by split, and the maker of each, which counted what is held out.
    """
    seen: set[str] = set()
    splits: dict[str, list[dict[str, str]]] = {}
    makers: dict[str, ClauseMaker] = {}
    for name, count, seed, name_starts, rate in SPLITS:
        maker = ClauseMaker(Rng(seed), name_starts, rate)
        rows: list[dict[str, str]] = []
        while len(rows) < count:
            row = maker.make()
            if row["input"] not in seen:
                seen.add(row["input"])
                rows.append(row)
        splits[name], makers[name] = rows, maker
    return splits, makers


def general_rows() -> list[dict[str, str]]:
    """Generates general texts; `make_base.py` leaves these out of pretraining."""
    rng = Rng(GENERAL_SEED)
    return [{"text": make_text(rng)} for _ in range(GENERAL_ROWS)]


def main() -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description="Write or check the embedded data sets.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare instead of writing")
    mode.add_argument("--stats", action="store_true", help="print figures instead of writing")
    args = parser.parse_args()

    splits, makers = contract_splits()
    if args.stats:
        for name, rows in splits.items():
            letters = sum(len(row["input"]) for row in rows) / len(rows)
            wordings, shapes = makers[name].held_out_wordings / len(rows), makers[name].held_out_shapes / len(rows)
            print(
                f"{name}: {len(rows)} rows, {letters:.0f} letters a clause, "
                f"{wordings:.0%} with a held-out wording, {shapes:.0%} of a held-out shape"
            )
        return 0

    files = {f"contracts/{name}.jsonl": to_jsonl(rows) for name, rows in splits.items()}
    files["general/general.jsonl"] = to_jsonl(general_rows())
    wrong = []
    for name, text in files.items():
        path = ASSETS / name
        if args.check:
            if not path.is_file() or path.read_bytes() != text.encode():
                wrong.append(name)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())
            print(f"wrote {name}: {len(text.encode()) / 1e6:.2f} MB")
    for name in wrong:
        print(f"{name} differs from what make_data.py generates", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
