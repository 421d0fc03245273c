"""Training speed and memory beside what a user would pick instead: TRL's SFTTrainer, or a plain peft loop.

    python -m benchmarks.training                             # every work, three rounds
    python -m benchmarks.training e2e_fp32 --rounds 1         # one of them
    python -m benchmarks.training --real ../shared/real --json speed.json

Both sides get the same base, tokens, order of rows, LoRA settings, start and precision, each in a process of its own,
by turns; the table shows the best round of each side. TRL is optional: `pip install --no-deps trl==1.16.0`.

Works:
    e2e_fp32    stories260K on E2E, LoRA r 8 on all linear layers, batch 8, 200 steps, fp32; beside TRL
    e2e_nf4     the same on an NF4 base with double quantisation
    llama27m    27M parameters (hidden 512, 8 layers), 4 x 256 tokens, bf16; beside a plain peft loop
    llama27m_nf4  ours from an NF4 base, beside the plain peft loop in bf16
    vocabulary  a vocabulary of 128,000, 2,048 tokens, all supervised, fp32: peak memory of the steps; beside TRL
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Work:
    """One comparison; a model of `shape` (hidden, MLP, layers, heads, vocabulary) has random weights."""

    peer: str
    num_steps: int
    rows_a_step: int
    nf4: bool = False
    dtype: str = "float32"
    shape: tuple[int, int, int, int, int] | None = None
    row_tokens: int = 0  # all supervised


WORKS = {
    "e2e_fp32": Work("trl", 200, 8),
    "e2e_nf4": Work("trl", 200, 8, nf4=True),
    "llama27m": Work(
        "peft", 16, 4, dtype="bfloat16", shape=(512, 1376, 8, 8, 4096), row_tokens=256, supervised_tokens=256
    ),
    "llama27m_nf4": Work(
        "peft", 16, 4, nf4=True, dtype="bfloat16", shape=(512, 1376, 8, 8, 4096), row_tokens=256, supervised_tokens=256
    ),
    "vocabulary": Work("trl", 2, 8, shape=(256, 704, 2, 4, 128_000), row_tokens=256, supervised_tokens=256),
}
LORA = {"r": 8, "alpha": 16}
LEARNING_RATE = 5e-3
WARMUP_STEPS = 3  # left out of the speed: allocations, first kernels
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--real", type=Path, default=Path("../shared/real"), help="folder of stories260K and E2E")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted(set(options.works) - set(WORKS)):
        parser.error(f"unknown work {', '.join(unknown)}; there are {', '.join(WORKS)}")
    if options.side:
        print(json.dumps(SIDES[options.side](WORKS[options.works[0]], options.folder, time.perf_counter())))
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.works or WORKS:
            prepare(WORKS[name], Path(folder) / name, options.real)
            results[name] = compare(name, Path(folder) / name, options.rounds)
            print_result(name, results[name])
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "works": results}, indent=2) + "\n")
    return 0


def machine() -> dict[str, Any]:
    versions = {}
    for package in ("torch", "transformers", "peft", "bitsandbytes", "trl"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine(), **versions}


def compare(name: str, folder: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every round of both sides, by turns."""
    sides = ("ours", WORKS[name].peer)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            command = [sys.executable, "-m", "benchmarks.training", name, "--side", side, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
            if done.returncode:
                sys.exit(f"{name}, {side}: failed\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
            found[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
    return found


def print_result(name: str, found: dict[str, list[dict[str, Any]]]) -> None:
    ours, peer = found
    best = {side: max(found[side], key=lambda run: run["tokens_per_second"]) for side in found}
    print(f"\n{name}")
    print(f"{'':8}{'tokens/s':>12}{'a CPU s':>10}{'set-up s':>10}{'loss':>10}{'steps MB':>10}{'peak MB':>10}")
    for side, run in best.items():
        print(
            f"{side:8}{run['tokens_per_second']:>12,.0f}{run['tokens_per_cpu_second']:>10,.0f}{run['setup_seconds']:>10.1f}{run['loss']:>10.4f}"
            f"{run['step_bytes'] / 2**20:>10,.0f}{run['peak_bytes'] / 2**20:>10,.0f}"
        )
    speed = best[ours]["tokens_per_second"] / best[peer]["tokens_per_second"]
    memory = min(r["step_bytes"] for r in found[ours]) / min(r["step_bytes"] for r in found[peer])
    differences = [abs(a / b - 1) for a, b in zip(best[ours]["windows"], best[peer]["windows"], strict=True)]
    print(
        f"ours / {peer}: speed {speed:.2f}, memory of the steps {memory:.2f}, "
        f"loss curve within {100 * max(differences, default=0):.2f} %",
        flush=True,
    )


# -- the same start for both sides -------------------------------------------------------------------------------------


def prepare(work: Work, folder: Path, real: Path) -> None:
    """Writes what both sides read: the base, and the rows in the order of the steps."""
    folder.mkdir(parents=True)
    if work.shape is None:
        model, rows = real / "models/stories260K", e2e_rows(folder, real, work)
    else:
        model, rows = folder / "base", made_rows(work)
        make_base(work, model)
    np.savez(folder / "rows.npz", **{f"{kind}{i}": array for i, row in enumerate(rows) for kind, array in row.items()})
    (folder / "setting.json").write_text(json.dumps({"model": str(model.resolve()), "num_rows": len(rows)}))


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


def made_rows(work: Work) -> list[dict[str, np.ndarray]]:
    assert work.shape is not None
    rng = np.random.default_rng(0)
    prompt = work.row_tokens - work.supervised_tokens
    mask = np.array([0] * prompt + [1] * work.supervised_tokens, dtype=np.uint8)
    num_rows = work.num_steps * work.rows_a_step
    return [
        {"ids": rng.integers(3, work.shape[-1], work.row_tokens).astype(np.int32), "mask": mask}
        for _ in range(num_rows)
    ]


def make_base(work: Work, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    assert work.shape is not None
    hidden, mlp, layers, heads, vocabulary = work.shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, work.dtype)).save_pretrained(folder)


def read_rows(folder: Path) -> tuple[str, list[np.ndarray], list[np.ndarray]]:
    setting = json.loads((folder / "setting.json").read_text())
    arrays = np.load(folder / "rows.npz")
    numbers = range(setting["num_rows"])
    return setting["model"], [arrays[f"ids{i}"] for i in numbers], [arrays[f"mask{i}"] for i in numbers]


class Clock:
    """Seconds and memory of the steps after the first few."""

    def __init__(self, lengths: list[int], rows_a_step: int, started: float):
        self.tokens = [sum(lengths[i : i + rows_a_step]) for i in range(0, len(lengths), rows_a_step)]
        self.setup = time.perf_counter() - started
        self.step = 0
        self.before = self.resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: of loading, not of training

    def tick(self) -> None:
        """After every step."""
        self.step += 1
        if self.step == min(WARMUP_STEPS, len(self.tokens) - 1):
            self.started, self.cpu_started, self.first = time.perf_counter(), time.process_time(), self.step
        self.ended, self.cpu_ended = time.perf_counter(), time.process_time()

    def result(self, losses: list[float]) -> dict[str, Any]:
        """Losses: one a step, or one a window of ten steps."""
        peak = self.resident("VmHWM")
        windows = losses if len(losses) < len(self.tokens) else [
            sum(losses[i : i + 10]) / len(losses[i : i + 10]) for i in range(0, len(losses), 10)
        ]  # fmt: skip
        return {
            "tokens_per_second": sum(self.tokens[self.first :]) / (self.ended - self.started),
            "tokens_per_cpu_second": sum(self.tokens[self.first :]) / (self.cpu_ended - self.cpu_started),
            "setup_seconds": self.setup,
            "loss": sum(windows[-5:]) / len(windows[-5:]),
            "windows": windows,
            "step_bytes": peak - self.before,
            "peak_bytes": peak,
        }

    @staticmethod
    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# -- sides -------------------------------------------------------------------------------------------------------------


def ours(work: Work, folder: Path, started: float) -> dict[str, Any]:
    import pipeline.bnb  # isort: skip  # before peft
    import torch

    from pipeline.config import compose_config
    from pipeline.dataset import Example, load_split, write_split
    from pipeline.lora import attach_lora
    from pipeline.modeling import load_model_folder
    from pipeline.quantized_layers import dequantize, quantize_model
    from pipeline.training import Trainer

    path, ids, masks = read_rows(folder)
    overrides = [
        f"lora.r={LORA['r']}", f"lora.lora_alpha={LORA['alpha']}", "lora.lora_dropout=0",
        f"train.max_steps={work.num_steps}",
        f"train.micro_batch_size={work.rows_a_step}", f"train.learning_rate={LEARNING_RATE}", "train.warmup_ratio=0",
        "train.eval_steps=1000000", "train.eval_max_rows=1", "train.keep=last",
        f"quantization.compute_dtype={work.dtype}",
        f"train.mixed_precision={'bfloat16' if work.dtype == 'bfloat16' else 'null'}",
    ]  # fmt: skip
    config = compose_config(overrides)
    dtype = getattr(torch, work.dtype)
    base = load_model_folder(Path(path), torch.device("cpu"), dtype, "sdpa").requires_grad_(False)
    if work.nf4:
        quantize_model(base, config.quantization, torch.device("cpu"))
        dequantize(base, dtype)
    torch.manual_seed(0)
    model = attach_lora(base, config.lora)
    write_split(folder / "ours.arrow", [Example("", i, m, 0, "", []) for i, m in zip(ids, masks, strict=True)])
    split = load_split(folder, "ours")
    lengths = [len(row) for row in ids]
    clock: list[Clock] = []

    def on_event(step: int, event: dict[str, float]) -> None:
        if "train.loss" in event:
            clock[0].tick()
        elif step == 0:  # the validation before the first step
            clock.append(Clock(lengths, work.rows_a_step, started))

    trainer = Trainer(model, split, split, config.train, 0, on_event, progress_bar=False)
    import pipeline.training

    pipeline.training.rows_of_step = lambda n, size, seed, step: list(range(step * size, (step + 1) * size))
    progress = trainer.run()
    return clock[0].result(progress.losses)


def peer_model(work: Work, path: str) -> Any:
    """The peer's base under peft's LoRA, with the start that ours has."""
    import pipeline.bnb  # isort: skip  # its import hazards are none of TRL's
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": getattr(torch, work.dtype)}
    if work.nf4 and work.peer == "trl":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", **options).requires_grad_(False)
    if work.nf4 and work.peer == "trl":
        pipeline.bnb.protect_from_repacking(base)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=TARGETS, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config, autocast_adapter_dtype=work.dtype != "float32")


def trl(work: Work, folder: Path, started: float) -> dict[str, Any]:
    path, ids, masks = read_rows(folder)
    model = peer_model(work, path)
    import datasets
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    stories = work.shape is None
    if stories:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    else:
        from tokenizers import Tokenizer, models

        words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, "<pad>"))
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    rows = datasets.Dataset.from_dict(
        {"input_ids": [i.tolist() for i in ids], "completion_mask": [m.tolist() for m in masks]}
    )
    clock: list[Clock] = []
    losses: list[float] = []

    class Times(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.append(Clock([len(i) for i in ids], work.rows_a_step, started))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock[0].tick()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    arguments = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=work.num_steps, per_device_train_batch_size=work.rows_a_step,
        learning_rate=LEARNING_RATE, lr_scheduler_type="cosine", warmup_steps=0, max_grad_norm=1.0, weight_decay=0.0,
        bf16=work.dtype == "bfloat16", fp16=False, use_cpu=True, gradient_checkpointing=not stories, report_to="none",
        save_strategy="no", disable_tqdm=True, max_length=None, train_sampling_strategy="sequential", seed=0,
        completion_only_loss=True, dataset_num_proc=None, logging_steps=10 if work.num_steps >= 10 else 1,
    )  # fmt: skip
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Times()])
    trainer.train()
    return clock[0].result(losses)


def plain_peft(work: Work, folder: Path, started: float) -> dict[str, Any]:
    """What a user writes by hand: peft, AdamW, padded batches, the model's own loss."""
    import torch

    path, ids, masks = read_rows(folder)
    model = peer_model(work, path).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, work.num_steps)
    clock = Clock([len(i) for i in ids], work.rows_a_step, started)
    losses = []
    for start in range(0, len(ids), work.rows_a_step):
        rows = range(start, start + work.rows_a_step)
        input_ids = torch.tensor(np.stack([ids[i] for i in rows]), dtype=torch.int64)
        labels = torch.where(torch.tensor(np.stack([masks[i] for i in rows])).bool(), input_ids, -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=work.dtype == "bfloat16"):
            loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.tick()
    return clock.result(losses)


SIDES: dict[str, Callable[[Work, Path, float], dict[str, Any]]] = {"ours": ours, "trl": trl, "peft": plain_peft}

if __name__ == "__main__":
    sys.exit(main())
