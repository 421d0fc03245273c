"""What the tests share: tiny models and splits made on the spot, and clones of the project to run for real."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.dataset import Example, Split, load_split, write_split

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the Hub is a mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # tiny tensors, and two test processes at once


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """What a test's own `quiet_logs` writes to is closed after it: the next test must not log there."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.setLevel(level)
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A random Llama of 2 layers, vocabulary 96, widths that bitsandbytes takes; its logits are far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def make_split(tmp_path: Path):
    """make_split([(prompt_length, completion_length), ...], seed=0) -> Split of random tokens."""

    def make(lengths: list[tuple[int, int]], seed: int = 0, name: str = "train") -> Split:
        generator = torch.Generator().manual_seed(seed)
        examples = [
            Example(
                row_id=f"made:{i + 1}",
                input_ids=torch.randint(3, 96, (prompt + completion,), generator=generator).tolist(),
                completion_mask=[0] * prompt + [1] * completion,
                num_prompt_tokens=prompt,
                prompt="",
                references=[],
            )
            for i, (prompt, completion) in enumerate(lengths)
        ]
        write_split(tmp_path / f"{name}.arrow", examples)
        return load_split(tmp_path, name)

    return make


class Project:
    """A copy of the project in a git repository of its own, to run commands in."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
        binaries = Path(sys.executable).parent
        self.env |= {
            "PATH": f"{binaries}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1",
            "GIT_AUTHOR_NAME": "test", "GIT_AUTHOR_EMAIL": "test@example.org",
            "GIT_COMMITTER_NAME": "test", "GIT_COMMITTER_EMAIL": "test@example.org",
        }  # fmt: skip

    def run(self, command: str, ok: bool = True, timeout: float = 280) -> str:
        """The command's output, stdout and stderr together; checked to succeed (or, with ok=False, to fail)."""
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.env, text=True, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert (done.returncode == 0) is ok, f"{command}: exit {done.returncode}\n{done.stdout}"
        return done.stdout

    def commit(self, message: str = "change") -> None:
        self.run(f"git add -A && git commit -qm '{message}'")

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{file} does not hold {old!r}"
        path.write_text(text.replace(old, new), encoding="utf-8")


def copy_project(target: Path) -> Project:
    """The files that git tracks or would track, committed to a fresh repository."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listing.stdout.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    project = Project(target)
    project.run("git init -q -b main")
    project.commit("copy of the project")
    return project
