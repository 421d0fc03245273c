"""Ask base, adapter and merged model the same question, and read the answers one after the other.

    python -m pipeline.generate "What is a lease?"       # one prompt: text appears as it is generated
    python -m pipeline.generate --file prompts.txt       # a prompt a line; or rows (.jsonl, .json, .csv, .parquet)
    python -m pipeline.generate                          # asks at the terminal; from a pipe, reads a prompt a line

Base, quantisation, tokenizer and chat template are those of the training. docs/generate.md says more.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DataError
from pipeline.files import write_jsonl
from pipeline.project_models import MODELS, ProjectModels
from pipeline.rows import BadRow, RawRow, read_rows
from pipeline.schema import RunConfig
from pipeline.workspace import Workspace

# What is heavy is imported inside functions, when the arguments have been parsed: --help takes no second.
HELP = "A line is a prompt, on its own (nothing is remembered). Ctrl-C stops an answer; an empty line or Ctrl-D ends."


def read_prompts(path: Path) -> list[RawRow]:
    """The rows of a file of prompts; of plain text, each line that is not empty.

    Raises:
        ConfigError, DataError: see `read_rows`; rows that cannot be read, all in one message; no prompt.
    """
    rows = list(read_rows(path, str(path)))
    bad = [f"{row.file}:{row.line}: {row.detail}" for row in rows if isinstance(row, BadRow)]
    if bad:
        raise DataError("\n".join([*bad[:10], f"{len(bad)} of {len(rows)} rows cannot be read. Mend or remove them."]))
    read = [row for row in rows if isinstance(row, RawRow)]
    if path.name.removesuffix(".gz").endswith(".txt"):
        read = _lines(str(path), [row.fields["text"] for row in read])
    if not read:
        raise DataError(f"{path}: holds no prompt. Write one a line.")
    return read


def _lines(name: str, lines: Sequence[str]) -> list[RawRow]:
    numbered = enumerate((line.rstrip("\r\n") for line in lines), start=1)
    return [RawRow(name, number, {"prompt": line}) for number, line in numbered if line.strip()]


def _read_stdin() -> list[RawRow]:
    try:
        rows = _lines("stdin", sys.stdin.buffer.read().decode("utf-8").split("\n"))
    except UnicodeDecodeError as error:
        raise DataError(f"stdin: byte {error.start + 1} is not UTF-8. Write the prompts as UTF-8.") from None
    if not rows:
        raise DataError('stdin: holds no prompt. Give one: `python -m pipeline.generate "What is ..."`.')
    return rows


def load_settings(overrides: Sequence[str]) -> RunConfig:
    """params.yaml with the overrides, as DVC's stages get it; with a choice among them (`model=local`), conf/ composed.

    Raises:
        ConfigError: everything that is wrong with them.
    """
    from pipeline.config import PARAMS, compose, parse_overrides, to_settings

    chooses = any("." not in override.key_or_group for override in parse_overrides(overrides))
    if not chooses and not PARAMS.is_file():
        raise ConfigError(f"{PARAMS}: no such file. Run this in the project's folder; `make params` writes it.")
    return to_settings(compose(overrides, "run" if chooses else "locked"))


def interact(ask: Callable[[str], object]) -> None:
    """Asks for prompts at the terminal, until an empty line or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input()
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if not line:
            return
        if line == "/help":
            print(HELP, file=sys.stderr)
            continue
        try:
            ask(line)
        except KeyboardInterrupt:
            print("\n[stopped]\n")
        except DataError as error:  # of this prompt: the next may be better
            print(error, file=sys.stderr)


def run(options: argparse.Namespace) -> None:
    """Answers what the options ask. Raises: PipelineError: a file, setting, model or prompt that cannot be used."""
    interactive = options.prompt is None and options.file is None and sys.stdin.isatty()
    rows: list[RawRow] = []
    if options.prompt is not None:
        rows = [RawRow("prompt", 1, {"prompt": options.prompt})]
    elif not interactive:
        rows = read_prompts(options.file) if options.file else _read_stdin()
    config = load_settings(options.set)

    from pipeline.modeling import max_context
    from pipeline.prompts import PromptEncoder
    from pipeline.runtime import select_device
    from pipeline.side_by_side import Models, Sampling, Session
    from pipeline.tokenizer import load_tokenizer

    workspace = Workspace(Path(config.runtime.inputs_dir), Path(config.runtime.output_dir))
    project = ProjectModels(config, workspace, select_device(config.runtime))
    models = Models(project, options.model, options.adapter)
    tokenizer, context = load_tokenizer(config.model), max_context(config.model)
    encoder = PromptEncoder(config.data, tokenizer, context, options.no_template, options.system)
    evaluate = config.evaluate
    sampling = Sampling(
        options.max_new_tokens or evaluate.max_new_tokens,
        options.batch_size or evaluate.batch_size,
        options.temperature,
        options.seed,
    )
    session = Session(models, tokenizer, context, sampling, config.runtime.progress and len(rows) > 1)
    if interactive:
        for column in models.columns:
            models.load(column.source)
        interact(lambda line: session.stream(encoder.encode(RawRow("prompt", 1, {"prompt": line})), _write, keep=True))
        return
    prompts = [encoder.encode(row) for row in rows]
    if options.prompt is not None and not (options.json or options.output):
        session.stream(prompts[0], _write)
        return
    records = [
        {
            "row_id": prompt.row_id,
            "prompt": prompt.text,
            "answers": {name: {"text": session.text(a), "ended": a.ended} for name, a in answers.items()},
        }
        for prompt, answers in zip(prompts, session.answer(prompts), strict=True)
    ]
    _report(records, options)


def _report(records: list[dict[str, Any]], options: argparse.Namespace) -> None:
    from pipeline.side_by_side import CUT_OFF

    if options.output is not None:
        try:
            write_jsonl(options.output, records)
        except OSError as error:
            raise DataError(f"--output {options.output}: cannot be written ({error.strerror}).") from None
        print(f"wrote {len(records):,} rows of answers to {options.output}", file=sys.stderr)
        return
    for record in records:
        if options.json:
            _write(json.dumps(record, ensure_ascii=False) + "\n")
            continue
        _write(f"=== {record['row_id']} ===\n{record['prompt']}\n\n")
        for name, answer in record["answers"].items():
            _write(f"--- {name} ---\n{answer['text']}{'' if answer['ended'] else CUT_OFF}\n\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="what to ask")
    add("--file", type=Path, help="prompts: a line each (.txt), or rows with `prompt` or `messages` (.jsonl, ...)")
    add("--output", type=Path, help="write a JSON line a prompt to this file")
    add("--json", action="store_true", help="print a JSON line a prompt")
    add("--model", action="append", choices=MODELS, help="who answers; again for more (default: base adapter merged)")
    add("--adapter", action="append", type=Path, default=[], metavar="FOLDER", help="again for more on the same base")
    add("--system", metavar="TEXT", help="system prompt, in the place of data.system_prompt")
    add("--no-template", action="store_true", help="continue the prompt as plain text, without the chat template")
    add("--max-new-tokens", type=_positive, metavar="N", help="default: evaluate.max_new_tokens")
    add("--temperature", type=_temperature, default=0.0, metavar="T", help="0, the default: greedy")
    add("--seed", type=int, default=0, metavar="N", help="of sampling, at a temperature over 0")
    add("--batch-size", type=_positive, metavar="N", help="prompts at once, of a file; default: evaluate.batch_size")
    add("-S", "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, such as runtime.device=cpu")
    options = parser.parse_args(arguments)
    if options.prompt is not None and options.file is not None:
        parser.error("give a prompt or --file, not both")
    if options.adapter and options.model and "adapter" not in options.model:
        parser.error("--adapter needs --model adapter (or no --model)")
    if options.no_template and options.system:
        parser.error("--system needs the chat template: leave out --no-template")
    if options.output and options.file and options.output.resolve() == options.file.resolve():
        parser.error("--output is the file of prompts, which it would replace")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, 0 or more")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)

    from pipeline.config import clean_errors, quiet_logs

    quiet_logs(logging.WARNING, force=False)
    with clean_errors("generate"):
        try:
            run(options)
        except KeyboardInterrupt:
            print("\n[stopped]", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:  # `| head` has read enough; what is still buffered goes nowhere, in silence
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None


if __name__ == "__main__":
    main()
