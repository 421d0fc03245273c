"""What `benchmarks.training` compares: bases, rows and settings, the same for both sides."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Shape:
    """Of a Llama with random weights."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True


@dataclass(frozen=True)
class Work:
    """One comparison.

    Attributes:
        peer: the other side (`benchmarks.sides.SIDES`).
        rows_a_step: in one micro-batch; of several adapters, each one's.
        keeps: ours keeps an NF4 base in 4 bits; else it is dequantised once.
        shape: None: stories260K on E2E.
        row_tokens: of a made-up row, all supervised.
        ranks: of several adapters on the one base, each at two learning rates. Empty: one adapter of rank r.
        recompute: ours recomputes activations in the backward pass.
    """

    peer: str
    num_steps: int
    rows_a_step: int
    nf4: bool = False
    keeps: bool = False
    dtype: str = "float32"
    shape: Shape | None = None
    row_tokens: int = 256
    r: int = 8
    ranks: tuple[int, ...] = ()
    device: str = "cpu"
    recompute: bool = False

    @property
    def ours(self) -> str:
        return "together" if self.ranks else "ours"

    @property
    def adapters(self) -> list[tuple[int, float]]:
        """Rank and learning rate of each."""
        if not self.ranks:
            return [(self.r, LEARNING_RATE)]
        return [(r, rate) for r in self.ranks for rate in (LEARNING_RATE, LEARNING_RATE / 2)]


LEARNING_RATE = 5e-3
LLAMA_27M = Shape(512, 1376, 8, 8, 8, 4096)
LLAMA_1B = Shape(2048, 8192, 16, 32, 8, 128_256)
LLAMA_8B = Shape(4096, 14_336, 32, 32, 8, 128_256, tied=False)
GPU: dict[str, Any] = {"dtype": "bfloat16", "row_tokens": 512, "r": 16, "device": "cuda", "recompute": True}
EIGHT: dict[str, Any] = {"nf4": True, "keeps": True, "ranks": (8, 16, 32, 64), **GPU}
WORKS = {
    "e2e_fp32": Work("trl", 200, 8),
    "e2e_nf4": Work("trl", 200, 8, nf4=True),
    "llama27m": Work("peft", 40, 4, dtype="bfloat16", shape=LLAMA_27M),
    "llama27m_nf4": Work("peft", 40, 4, nf4=True, dtype="bfloat16", shape=LLAMA_27M),
    "vocabulary": Work("trl", 2, 8, shape=Shape(256, 704, 2, 4, 4, 128_000)),
    "llama1b_lora": Work("trl", 20, 8, shape=LLAMA_1B, **GPU),
    "llama1b_qlora": Work("trl", 20, 8, shape=LLAMA_1B, nf4=True, keeps=True, **GPU),
    "llama1b_once": Work("trl", 20, 8, shape=LLAMA_1B, nf4=True, **GPU),
    "llama8b_lora": Work("trl", 20, 8, shape=LLAMA_8B, **GPU),
    "llama8b_qlora": Work("trl", 20, 8, shape=LLAMA_8B, nf4=True, keeps=True, **GPU),
    "llama8b_once": Work("trl", 20, 8, shape=LLAMA_8B, nf4=True, **GPU),
    "eight_e2e": Work("in_turn", 40, 8, nf4=True, ranks=(2, 4, 8, 16)),
    "eight_27m": Work("in_turn", 10, 2, nf4=True, keeps=True, dtype="bfloat16", shape=LLAMA_27M, ranks=(2, 4, 8, 16)),
    **{
        f"eight_{size}_{512 * rows}": Work("in_turn", 20, rows, shape=shape, **EIGHT)
        for size, shape in (("1b", LLAMA_1B), ("8b", LLAMA_8B))
        for rows in (1, 2, 4)
    },
}
PEAK_FLOPS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}  # dense bf16, a second
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def possible() -> list[str]:
    """The works for the devices that there are."""
    import torch

    return [name for name, work in WORKS.items() if work.device == "cpu" or torch.cuda.is_available()]


def machine() -> dict[str, Any]:
    versions = {}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "trl"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "cpus": os.cpu_count(), "processor": platform.processor() or platform.machine(), **versions}


def prepare(work: Work, folder: Path, real: Path) -> None:
    """Writes what both sides read: the rows in the order of the steps, and where the base is."""
    folder.mkdir(parents=True)
    rows = e2e_rows(folder, real, work) if work.shape is None else made_rows(work, work.shape)
    np.savez(folder / "rows.npz", **{f"{kind}{i}": array for i, row in enumerate(rows) for kind, array in row.items()})
    setting = {"model": str((real / "models/stories260K").resolve()), "num_rows": len(rows)}
    (folder / "setting.json").write_text(json.dumps(setting))


def e2e_rows(folder: Path, real: Path, work: Work) -> list[dict[str, np.ndarray]]:
    from pipeline.dataset import load_split
    from pipeline.training import rows_of_step

    overrides = {
        "data": "local", "data.path": (real / "e2e").resolve(), "data.files.train": "train.jsonl",
        "data.files.validation": "valid.jsonl", "data.files.test": "test.jsonl", "data.max_rows": 4000,
        "model": "local", "model.path": (real / "models/stories260K").resolve(), "runtime.output_dir": folder,
        "runtime.tracking": "false", "model.chat_template": "conf/chat_templates/plain.jinja",
    }  # fmt: skip
    command = [sys.executable, "-m", "stages.prepare", *(f"{key}={value}" for key, value in overrides.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        sys.exit(f"E2E cannot be prepared:\n{done.stdout}{done.stderr}")
    split = load_split(folder / "data/processed", "train")
    order = [row for step in range(work.num_steps) for row in rows_of_step(len(split), work.rows_a_step, 0, step)]
    return [{"ids": split.input_ids(row).copy(), "mask": split.completion_mask(row).copy()} for row in order]


def made_rows(work: Work, shape: Shape) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    rows = rng.integers(3, shape.vocabulary, (work.num_steps * work.rows_a_step, work.row_tokens)).astype(np.int32)
    return [{"ids": row, "mask": np.ones(work.row_tokens, dtype=np.uint8)} for row in rows]


def load_base(work: Work, path: str, keeps: bool) -> Any:
    """The frozen base: stories260K, or random weights of the shape, the same in every process."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    dtype, device = getattr(torch, work.dtype), torch.device(work.device)
    if work.shape is None:
        base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    else:
        shape = work.shape
        config = LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            max_position_embeddings=4096, tie_word_embeddings=shape.tied, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        with device:
            base = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    if work.nf4:
        from pipeline.quantized_layers import dequantize, quantize_model
        from pipeline.schema import Dtype, QuantizationConfig, QuantizationMethod

        quantize_model(base, QuantizationConfig(QuantizationMethod.nf4, True, 64, Dtype(work.dtype), []), device)
        if not keeps:
            dequantize(base, dtype)
    return base.requires_grad_(False)


def read_rows(folder: Path) -> tuple[str, list[np.ndarray], list[np.ndarray]]:
    setting = json.loads((folder / "setting.json").read_text())
    arrays = np.load(folder / "rows.npz")
    numbers = range(setting["num_rows"])
    return setting["model"], [arrays[f"ids{i}"] for i in numbers], [arrays[f"mask{i}"] for i in numbers]


def flops_a_token(work: Work) -> float:
    """Model FLOPs of LoRA training: 4 N (forward, backward to the inputs) and causal attention; none recomputed."""
    shape = work.shape
    assert shape is not None
    kv = shape.hidden * shape.kv_heads // shape.heads
    layer = 2 * shape.hidden**2 + 2 * shape.hidden * kv + 3 * shape.hidden * shape.mlp
    attention = 6 * shape.hidden * work.row_tokens  # 2 products, half of each; backward twice that
    return 4 * (shape.layers * layer + shape.hidden * shape.vocabulary) + shape.layers * attention


def peak_flops() -> float:
    import torch

    name = torch.cuda.get_device_name()
    return next((flops for known, flops in PEAK_FLOPS.items() if name.startswith(known)), float("nan"))
