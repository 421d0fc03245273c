"""The sides of `benchmarks.training`: ours, one adapter after another or all together; TRL; a plain loop with peft."""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.works import LEARNING_RATE, TARGETS, Work, flops_a_token, load_base, peak_flops, read_rows

WARMUP_STEPS = 3  # left out of the speed: allocations, first kernels
WINDOW = 10  # steps of which a loss curve has the mean


class Clock:
    """Seconds and memory of the steps after the first few.

    Args:
        tokens: of each step, for all adapters that make it.
        started: when the process's work began, `time.perf_counter`.
    """

    def __init__(self, work: Work, tokens: list[int], started: float):
        self.work, self.tokens = work, tokens
        self.skipped = min(WARMUP_STEPS, len(tokens) - 1)
        self.before: int | None = None
        self.step = self.measured = 0
        self.setup = self.seconds = self.cpu_seconds = 0.0
        self.last = started, 0.0

    def watch_memory(self) -> None:
        """What is there now is not the steps'; else it is what is there at the first of them."""
        self.before = self._memory("VmRSS")
        self._forget_peak()

    def begin(self) -> None:
        """Before the first step of a training. The time since the one before is set-up too."""
        if self.before is None:
            self.watch_memory()
        self.step = 0
        self.setup += time.perf_counter() - self.last[0]
        self.last = time.perf_counter(), time.process_time()

    def tick(self) -> None:
        """After every step."""
        if self.work.device == "cuda":
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        if self.step >= self.skipped:
            self.seconds += now[0] - self.last[0]
            self.cpu_seconds += now[1] - self.last[1]
            self.measured += self.tokens[self.step]
        self.step += 1
        self.last = now

    def result(self, curves: list[list[float]]) -> dict[str, Any]:
        """Curves: of each adapter, the losses of windows of `WINDOW` steps."""
        assert self.before is not None
        peak, speed = self._memory("VmHWM"), self.measured / self.seconds
        ends = [loss for curve in curves for loss in curve[-5:]]
        return {
            "tokens_per_second": speed,
            "tokens_per_cpu_second": self.measured / self.cpu_seconds,
            "setup_seconds": self.setup,
            "loss": sum(ends) / len(ends),
            "windows": [loss for curve in curves for loss in curve],
            "step_bytes": peak - self.before,
            "peak_bytes": peak,
            "utilisation": speed * flops_a_token(self.work) / peak_flops() if self.work.device == "cuda" else None,
        }

    def _forget_peak(self) -> None:
        """The peak so far is of loading, not of training."""
        if self.work.device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def _memory(self, name: str) -> int:
        if self.work.device == "cuda":
            import torch

            return torch.cuda.memory_allocated() if name == "VmRSS" else torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def windows(losses: list[float]) -> list[float]:
    """Their means over `WINDOW` steps."""
    parts = [losses[i : i + WINDOW] for i in range(0, len(losses), WINDOW)]
    return [sum(part) / len(part) for part in parts]


def step_tokens(work: Work, ids: list[np.ndarray]) -> list[int]:
    """Of each step of one adapter."""
    lengths = [len(row) for row in ids]
    return [sum(lengths[i : i + work.rows_a_step]) for i in range(0, len(lengths), work.rows_a_step)]


class Trainings:
    """Our trainings of a work's adapters, on one base in memory."""

    def __init__(self, work: Work, folder: Path):
        import pipeline.bnb  # isort: skip  # before peft

        import pipeline.training
        from pipeline.dataset import Example, load_split, write_split
        from pipeline.runtime import use_deterministic_kernels

        path, ids, masks = read_rows(folder)
        use_deterministic_kernels()  # as the train stage does
        self.work, self.tokens = work, step_tokens(work, ids)
        self.base = load_base(work, path, work.keeps)
        write_split(folder / "ours.arrow", [Example("", i, m, 0, "", []) for i, m in zip(ids, masks, strict=True)])
        self.split = load_split(folder, "ours")
        # the rows stand in the order of the steps, for both sides
        pipeline.training.rows_of_step = lambda n, size, seed, step: list(range(step * size, (step + 1) * size))

    def trainer(self, rank: int, rate: float, on_begin: Callable[[], None], on_step: Callable[[], None]) -> Any:
        """A `pipeline.training.Trainer`; both functions are called by it, the first after its first validation."""
        import torch

        from benchmarks.plain import plain_lora
        from pipeline.lora import attach_adapter
        from pipeline.schema import Dtype, Keep, OnSpike, Optimizer, Scheduler, TrainConfig, TrainMethod
        from pipeline.segmented_lora import share_weights
        from pipeline.training import Trainer

        work = self.work
        torch.manual_seed(0)
        model = attach_adapter(share_weights(self.base), plain_lora(rank, 16, TARGETS))
        settings = TrainConfig(
            method=TrainMethod.lora, seed=0, max_steps=work.num_steps, num_epochs=1, micro_batch_size=work.rows_a_step,
            gradient_accumulation_steps=1, learning_rate=rate, lora_plus_ratio=None,
            lr_scheduler=Scheduler.cosine, warmup_ratio=0.0,
            optimizer=Optimizer.adamw, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
            max_grad_norm=1.0, spike_zscore=6.0, on_spike=OnSpike.log,
            mixed_precision=Dtype.bfloat16 if work.dtype == "bfloat16" else None,
            gradient_checkpointing=work.recompute, eval_steps=10**6, eval_max_rows=1, keep=Keep.last,
            early_stopping_patience=None,
        )  # fmt: skip

        def on_event(step: int, event: dict[str, float]) -> None:
            if "train.loss" in event:
                on_step()
            elif step == 0:  # the validation before the first step
                on_begin()

        return Trainer(model, self.split, self.split, settings, 0, on_event, progress_bar=False)


def one_by_one(work: Work, folder: Path, started: float) -> dict[str, Any]:
    """Each adapter alone, one after another; of a work with one adapter, ours."""
    trainings = Trainings(work, folder)
    clock, curves = Clock(work, trainings.tokens, started), []
    if work.ranks:
        clock.watch_memory()  # the adapters count
    for rank, rate in work.adapters:
        progress = trainings.trainer(rank, rate, clock.begin, clock.tick).run()
        curves.append(windows(progress.losses))
        del progress
        gc.collect()  # of the trainings before, no memory
    return clock.result(curves)


def together(work: Work, folder: Path, started: float) -> dict[str, Any]:
    """All adapters in each forward and backward pass. The last one's calls of the clock are everybody's."""
    from pipeline.fused_training import Fused, FusedTrainer

    trainings = Trainings(work, folder)
    *others, last = work.adapters
    clock = Clock(work, [len(work.adapters) * tokens for tokens in trainings.tokens], started)
    clock.watch_memory()
    members = [Fused(trainings.trainer(*adapter, _nothing, _nothing)) for adapter in others]
    members.append(Fused(trainings.trainer(*last, clock.begin, clock.tick)))
    group = FusedTrainer(trainings.base, members, progress_bar=False)
    group.run()
    for member in members:
        if member.error is not None:
            raise member.error
    way = {"grouped": group.segments.grouped, "adapters_a_forward": group.members_a_forward}
    return clock.result([windows(member.trainer.progress.losses) for member in members]) | way


def _nothing() -> None:
    pass


def peer_model(work: Work, path: str) -> Any:
    """The peer's base, in 4 bits where it is quantized, under peft's LoRA with the start that ours has."""
    import peft
    import torch

    base = load_base(work, path, keeps=work.peer == "trl")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=work.r, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
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
    clock = Clock(work, step_tokens(work, ids), started)
    losses: list[float] = []

    class Times(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    arguments = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=work.num_steps, per_device_train_batch_size=work.rows_a_step,
        learning_rate=LEARNING_RATE, lr_scheduler_type="cosine", warmup_steps=0, max_grad_norm=1.0, weight_decay=0.0,
        bf16=work.dtype == "bfloat16", fp16=False, use_cpu=work.device == "cpu", gradient_checkpointing=not stories,
        report_to="none", save_strategy="no", disable_tqdm=True, max_length=None, seed=0,
        train_sampling_strategy="sequential",
        completion_only_loss=True, dataset_num_proc=None, logging_steps=min(WINDOW, work.num_steps),
    )  # fmt: skip
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Times()])
    trainer.train()
    return clock.result([losses])


def plain_peft(work: Work, folder: Path, started: float) -> dict[str, Any]:
    """What a user writes by hand: peft, AdamW, padded batches, the model's own loss."""
    import torch

    path, ids, masks = read_rows(folder)
    model = peer_model(work, path).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, work.num_steps)
    clock = Clock(work, step_tokens(work, ids), started)
    clock.begin()
    losses = []
    for start in range(0, len(ids), work.rows_a_step):
        rows = range(start, start + work.rows_a_step)
        input_ids = torch.tensor(np.stack([ids[i] for i in rows]), dtype=torch.int64)
        labels = torch.where(torch.tensor(np.stack([masks[i] for i in rows])).bool(), input_ids, -100)
        with torch.autocast(work.device, torch.bfloat16, enabled=work.dtype == "bfloat16"):
            loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.tick()
    return clock.result([windows(losses)])


SIDES: dict[str, Callable[[Work, Path, float], dict[str, Any]]] = {
    "ours": one_by_one, "in_turn": one_by_one, "together": together, "trl": trl, "peft": plain_peft,
}  # fmt: skip
