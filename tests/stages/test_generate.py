"""`python -m pipeline.generate`: one prompt, a file, a pipe, the terminal; mistakes end in one message."""

import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import generate
from pipeline.config import compose, compose_config, dump
from pipeline.files import write_json
from pipeline.generate import load_settings
from pipeline.generation import TextStreamer
from pipeline.provenance import write_provenance
from pipeline.schema import RunConfig
from pipeline.side_by_side import CUT_OFF
from pipeline.workspace import ADAPTER, MERGED
from tests.conftest import ROOT
from tests.small_project import make_adapter, make_project, overrides, watch_loads
from tests.standins import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@functools.cache
def settings_of(overrides: tuple[str, ...]) -> RunConfig:
    return load_settings(overrides)


@pytest.fixture
def ask(folder, capsys, monkeypatch):
    """ask(*arguments) -> stdout of the command in this process; with code=1, stderr of one that fails."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(generate, "load_settings", lambda items: settings_of(tuple(items)))  # composing takes a second

    def run(*arguments: str, code: int = 0, settings: list[str] | None = None) -> str:
        pairs = [part for item in settings or overrides(folder) for part in ("-S", item)]
        try:
            generate.main([*arguments, *pairs])
            exited = 0
        except SystemExit as error:
            exited = error.code
        written = capsys.readouterr()
        assert exited == code, written.err
        assert "Traceback" not in written.err
        return written.out if code == 0 else written.err

    return run


@pytest.fixture
def loads(monkeypatch) -> list[Path]:
    return watch_loads(monkeypatch)


def test_adapters_are_swapped_on_a_base_that_is_loaded_once(folder, ask, loads):
    out = ask("Hello", "--adapter", str(folder / ADAPTER), "--adapter", str(folder / "runs/other"))
    assert [line for line in out.splitlines() if line.startswith("---")] == [
        "--- base ---", "--- adapter ---", "--- other ---", "--- merged ---",
    ]  # fmt: skip
    assert loads == [folder / "base", folder / MERGED]
    answers = [part.partition("---\n")[2] for part in out.split("\n\n---")]
    assert len(set(answers)) == 4


def test_a_file_in_batches_is_what_prompts_one_by_one_are(folder, ask, tmp_path):
    asked = ["Hello", "What is a lease?", "And then?"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(asked) + "\n")
    ask("--file", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "answers.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["row_id"].rpartition(":")[2] for row in rows] == ["1", "3", "5"]
    assert all(question in row["prompt"] for question, row in zip(asked, rows, strict=True))
    (alone,) = map(json.loads, ask(asked[1], "--json").splitlines())
    assert alone["answers"] == rows[1]["answers"]
    parts = [
        f"--- {name} ---\n{answer['text']}{'' if answer['ended'] else CUT_OFF}"
        for name, answer in rows[1]["answers"].items()
    ]
    assert ask(asked[1]).strip() == "\n\n".join(parts).strip()
    assert len({json.dumps(row["answers"]) for row in rows}) == 3
    text = ask("--file", str(tmp_path / "prompts.txt"))
    assert all(answer["text"] in text for row in rows for answer in row["answers"].values())


def test_rows_that_name_their_adapter(folder, ask, tmp_path, loads):
    rows = [{"prompt": "Hello", "adapter": name} for name in ("other", "adapter", "base")] + [{"prompt": "Hello"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapters = ["--adapter", str(folder / ADAPTER), "--adapter", str(folder / "runs/other"), "--model", "adapter"]
    out = [
        json.loads(line)["answers"]
        for line in ask("--file", str(tmp_path / "rows.jsonl"), "--json", *adapters).splitlines()
    ]
    assert [list(answers) for answers in out] == [["other"], ["adapter"], ["base"], ["adapter", "other"]]
    assert out[3] == out[1] | out[0]
    assert len({json.dumps(answers) for row in out[:3] for answers in row.values()}) == 3
    assert loads == [folder / "base"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hello", "adapter": "othr"}\n')
    error = ask("--file", str(tmp_path / "rows.jsonl"), *adapters, code=1)
    assert "rows.jsonl:1: names the adapter 'othr'; there are adapter, other, base" in error


def test_sampling_follows_the_seed(ask):
    def sample(*more: str) -> str:
        return ask("Hello", "--model", "base", "--max-new-tokens", "20", *more)

    assert sample("--temperature", "2", "--seed", "1") == sample("--temperature", "2", "--seed", "1")
    assert len({sample(), sample("--temperature", "2"), sample("--temperature", "2", "--seed", "1")}) == 3


def test_at_the_terminal(folder, ask, monkeypatch, loads):
    """Two prompts with a Ctrl-C in the first one's answer; models are loaded once and kept."""
    lines = iter(["Hello", "/help", "Hello", "<unk>", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    pass_on, calls = TextStreamer._pass_on, []

    def interrupted(self, text):
        calls.append(text)
        if len(calls) == 3:
            raise KeyboardInterrupt
        pass_on(self, text)

    monkeypatch.setattr(TextStreamer, "_pass_on", interrupted)
    out = ask()
    monkeypatch.undo()
    stopped, _, rest = out.partition("[stopped]")
    assert stopped.startswith("--- base ---")
    assert "--- adapter ---" not in stopped
    assert next(lines, None) is None  # a prompt that cannot be asked ends nothing
    assert loads == [folder / "base", folder / MERGED]
    assert rest.strip() == ask("Hello").strip()


def test_a_pipe_is_a_file_of_prompts(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Hello\n\nZürich\n".encode())))
    out = ask("--json", "--model", "base")
    assert [json.loads(line)["row_id"] for line in out.splitlines()] == ["stdin:1", "stdin:3"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert "holds no prompt" in ask(code=1)


def test_what_is_not_made_yet(folder, ask, tmp_path, capsys, caplog):
    (tmp_path / "base").symlink_to(folder / "base")
    bare = overrides(tmp_path)
    os.chdir(tmp_path)
    generate.main(["Hello", *(part for item in bare for part in ("-S", item))])
    assert capsys.readouterr().out.count("---\n") == 1
    left_out = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in left_out] == ["left out", "left out"]
    assert [line.split()[2] for line in left_out] == [f"{ADAPTER}:", f"{MERGED}:"]
    assert "models/adapter: not found" in ask("Hello", "--model", "adapter", code=1, settings=bare)


def test_a_reader_that_stops_reading(folder, ask, monkeypatch):
    """`| head`: no traceback, and nothing at the interpreter's end either; with a reader everything arrives."""
    for is_read in (True, False):
        reader, writer = os.pipe()
        if not is_read:
            os.close(reader)
        with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", pipe)
            assert ask("Hello", "--model", "base", code=0 if is_read else 141) == ""
            print("more, buffered", file=pipe)
        if is_read:
            with os.fdopen(reader) as text:
                assert text.read().startswith("--- base ---")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "no.txt"], "no.txt: no such file"),
        (["--file", "bad.jsonl"], "bad.jsonl:2: Expecting"),
        (["--file", "empty.txt"], "empty.txt: holds no prompt"),
        (["--file", "typo.jsonl"], "typo.jsonl:1: no 'instruction'"),
        (["x" * 200], "the model's context is 128"),
        (["a </s> b"], "holds the control token </s>"),
        ([" "], "content is empty"),
        (["Hello", "--adapter", "nothing"], "nothing: no such folder"),
        (["Hello", "--adapter", "base"], "base: holds no adapter"),
        (["Hello", "--adapter", "deep"], "deep: the adapter does not fit this base"),
        (["Hello", "--adapter", "ia3"], "its adapter is IA3"),
        (["Hello", "--adapter", "qlora"], "made with train.method 'qlora', now"),
        (["Hello", "--adapter", "models/adapter", "--adapter", "models/adapter"], "given twice"),
        (["Hello", "--model", "quantized"], "quantization.method is none, so this is the base"),
        (["Hello", "-S", "model.pth=x"], "model.pth: no such setting"),
    ],
)  # fmt: skip
def test_mistakes_get_one_clean_message(folder, ask, tmp_path, arguments, message):
    for name in ("base", "models"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "typo.jsonl").write_text('{"promt": "a"}\n')
    if "deep" in arguments:
        make_model(tmp_path / "large", num_hidden_layers=3)
        config = compose_config([*overrides(folder), f"model.path={tmp_path / 'large'}"])
        make_adapter(tmp_path / "deep", config, 1)
        (tmp_path / "deep/provenance.json").unlink()
    if "ia3" in arguments:
        (tmp_path / "ia3").mkdir()
        write_json(tmp_path / "ia3/adapter_config.json", {"peft_type": "IA3"})
    if "qlora" in arguments:
        config = compose_config([*overrides(folder), "train=qlora", "quantization=nf4"])
        (tmp_path / "qlora").mkdir()
        write_json(tmp_path / "qlora/adapter_config.json", {"peft_type": "LORA"})
        write_provenance(tmp_path / "qlora", "train", config.train, config.model)
    os.chdir(tmp_path)
    assert message in ask(*arguments, code=1)


@pytest.mark.parametrize(
    "arguments",
    [["Hello", "--file", "x.txt"], ["--model", "bse"], ["--temperature", "-1"], ["--max-new-tokens", "0"],
     ["Hello", "--model", "base", "--adapter", "x"], ["--file", "a.jsonl", "--output", "a.jsonl"]],
)  # fmt: skip
def test_options_that_do_not_go_together(ask, arguments):
    assert "usage:" in ask(*arguments, code=2)


def test_settings_are_those_of_params_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(dump(compose([])).replace("max_new_tokens: 96", "max_new_tokens: 7"))
    assert load_settings([]).evaluate.max_new_tokens == 7
    config = load_settings(["runtime.device=cpu", "evaluate.batch_size=3"])
    assert (config.evaluate.max_new_tokens, config.evaluate.batch_size, config.runtime.device) == (7, 3, "cpu")
    assert load_settings(["train=short"]).evaluate.max_new_tokens == 96  # a choice is conf/'s


def test_help_comes_before_anything_heavy():
    blocked = ["torch", "transformers", "peft", "hydra", "mlflow", "datasets", "numpy", "pyarrow"]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    code += "from pipeline.generate import main\nmain(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--max-new-tokens" in done.stdout
