"""The training loop: one page, on accelerate.

The loss of an optimizer step is summed over the supervised tokens of all its micro-batches and divided by their
number, so that how a step is cut into micro-batches does not change it. The rows of a step follow from seed and step
alone, and a checkpoint holds everything else, so that a resumed training is the same training.
"""

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from tqdm import tqdm

from pipeline.batching import collate
from pipeline.checkpoints import Checkpoint, Checkpoints
from pipeline.dataset import Split
from pipeline.errors import Interrupted, TrainingError
from pipeline.guards import check_finite
from pipeline.losses import ForwardPlan, Loss, measure_loss, plan_forward
from pipeline.method_hooks import NO_HOOKS, MethodHooks
from pipeline.optimizers import make_optimizer, make_scheduler, page_again
from pipeline.packing import inner_model
from pipeline.parents import Starters
from pipeline.ranks import ALONE, Ranks, piece_like, shard, whole, whole_state
from pipeline.rng import rng_state, set_rng_state, set_torch_rng_state, torch_rng_state
from pipeline.schema import Keep, OnSpike, TrainConfig
from pipeline.spikes import SPIKE_WINDOW, clamped, highest_zscore
from pipeline.stopping import StopRequest

logger = logging.getLogger(__name__)
OnEvent = Callable[[int, dict[str, float]], None]
T = TypeVar("T")
PRECISIONS = {None: "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass
class Progress:
    """What a training has seen and found so far; JSON holds it all."""

    micro_batch_size: int  # rows a forward: as set, or halved where memory ran out
    gradient_checkpointing: bool
    eval_batch_size: int  # rows a forward of the validation: at first twice the micro-batch
    step: int = 0
    stopped_early: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # nats per supervised token, one an optimizer step
    tokens_seen: int = 0  # padding not counted
    supervised_tokens_seen: int = 0
    training_seconds: float = 0.0  # validation not counted
    best_step: int = 0
    best_loss: float | None = None  # None: nothing may be kept yet
    validations_since_best: int = 0
    recent: list[tuple[float, float]] = field(default_factory=list)  # loss and gradient norm, spikes cut down
    num_spikes: int = 0


def num_steps(settings: TrainConfig, num_rows: int) -> int:
    """Optimizer steps of the whole training."""
    rows_a_step = settings.micro_batch_size * settings.gradient_accumulation_steps
    return settings.max_steps or max(1, math.ceil(settings.num_epochs * num_rows / rows_a_step))


def rows_of_step(num_rows: int, rows_a_step: int, seed: int, step: int) -> list[int]:
    """The rows of optimizer step `step` (from 0): pieces of one seeded permutation an epoch, epochs end to end."""
    first, last = step * rows_a_step, (step + 1) * rows_a_step
    rows: list[int] = []
    for epoch in range(first // num_rows, (last - 1) // num_rows + 1):
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        start = epoch * num_rows
        rows += order[max(first - start, 0) : last - start].tolist()
    return rows


def micro_batch_rows(split: Split, rows: list[int], size: int, num_ranks: int = 1) -> list[list[int]]:
    """The step's rows by length, longest first, so that little is padded; rows with nothing to predict left out.

    Args:
        size: rows of a micro-batch, at most; fewer where there would not be one for each process.
    """
    rows = sorted((r for r in rows if split.num_supervised[r]), key=lambda r: -split.lengths[r])
    size = max(1, min(size, math.ceil(len(rows) / num_ranks)))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class Trainer:
    """A model, its optimizer and its schedule, on their way through the steps.

    `run` does all of it. What it consists of beside the forwards can be driven from outside too
    (`pipeline.fused_training` does): `start`, then for each step `next_rows`, `clip`, `finish_step`; where
    `validation_due`, `judge`; at last `finish`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        train_split: Split,
        validation_split: Split,
        settings: TrainConfig,
        pad_token_id: int,
        on_event: OnEvent,
        progress_bar: bool = True,
        ranks: Ranks = ALONE,
        hooks: MethodHooks = NO_HOOKS,
    ):
        # one process may train twice, with other precision; several have met already
        AcceleratorState._reset_state(reset_partial_state=ranks.count == 1)
        device = ranks.device if ranks.count > 1 else next(model.parameters()).device
        self.ranks, self.hooks = ranks, hooks
        self.zero = _load_zero() if ranks.zero_stage else None
        self.accelerator = Accelerator(
            mixed_precision=PRECISIONS[settings.mixed_precision],
            cpu=device.type == "cpu" and self.zero is None,  # with it accelerate refuses DeepSpeed; without GPU as good
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # else the environment may set it
            deepspeed_plugin=None if self.zero is None else self.zero.plugin(settings, ranks.zero_stage),
        )
        if self.zero is not None and ranks.shards:
            self.zero.cut(model, self.accelerator, device)
        elif ranks.shards:
            shard(model, device)
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.num_steps = num_steps(settings, len(train_split))
        optimizer = make_optimizer(settings, model)
        self.in_order = [p for group in optimizer.param_groups for p in group["params"]]  # as its states are numbered
        if self.zero is not None:
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        else:
            self.model = model if ranks.shards else self.accelerator.prepare_model(model)
            self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.scheduler = make_scheduler(settings, self.optimizer, self.num_steps)
        self.train_split, self.validation_split = train_split, validation_split.head(settings.eval_max_rows)
        self.settings, self.pad_token_id, self.on_event, self.progress_bar = (
            settings,
            pad_token_id,
            on_event,
            progress_bar,
        )
        size = settings.micro_batch_size
        self.progress = Progress(size, settings.gradient_checkpointing, eval_batch_size=2 * size)
        self.plan = ForwardPlan()
        self.longest_fitted = 0
        self.best_weights: dict[str, torch.Tensor] = {}

    def run(self, checkpoints: Checkpoints | None = None) -> Progress:
        """Trains to the end, from the newest checkpoint where there is one, and leaves the kept weights in the model.

        Raises:
            TrainingError: NaN or infinite loss or gradient, in training or validation.
            Interrupted: SIGTERM, Ctrl-C or the death of its dvc; a checkpoint was written.
        """
        progress, starters = self.start(checkpoints), Starters()
        bar = tqdm(
            total=self.num_steps, initial=progress.step, desc="train", unit="step", disable=not self.progress_bar
        )
        with StopRequest() as stop, plan_forward(self.model, self.ranks.zero_stage != 3) as self.plan, bar:
            if progress.step == 0:
                self.judge(self._measure())
            while not self.is_done:
                self._take_step()
                if self.validation_due:
                    self.judge(self._measure())
                best = "none yet" if progress.best_loss is None else f"{progress.best_loss:.4f}"
                bar.set_postfix_str(f"loss {progress.losses[-1]:.4f}, best {best}", refresh=False)
                bar.update()
                # asked once a step: a death between two questions would end the training without its checkpoint
                stopped_by = stop.received or starters.death()
                if self.ranks.total([stopped_by is not None])[0]:
                    stopped_by = stopped_by or "the stop of another of its processes"
                if checkpoints and (stopped_by or checkpoints.due(progress.step)):
                    checkpoint = self.checkpoint()
                    if self.ranks.is_main:
                        checkpoints.save(checkpoint)
                if stopped_by:
                    raise Interrupted(f"stopped by {stopped_by} after step {progress.step} of {self.num_steps}.")
        self.finish()
        return progress

    @property
    def is_done(self) -> bool:
        return self.progress.step >= self.num_steps or self.progress.stopped_early

    @property
    def validation_due(self) -> bool:
        """Whether the step that was just made is to be followed by a validation."""
        return self.progress.step % self.settings.eval_steps == 0 or self.progress.step == self.num_steps

    def finish(self) -> None:
        """Leaves the weights in the model that `train.keep` names."""
        if self.progress.stopped_early:
            logger.info("stopped early: no better validation loss since step %d", self.progress.best_step)
        if self.settings.keep is Keep.best:
            self._load_weights(self.best_weights)

    def start(self, checkpoints: Checkpoints | None) -> Progress:
        """Goes back to the newest checkpoint where there is one."""
        newest = self._newest(checkpoints) if checkpoints else None
        if newest is not None:
            self._restore(newest)
            logger.info("going on after step %d of %d, from its checkpoint", newest.step, self.num_steps)
        elif not self.ranks.is_main:
            torch.manual_seed(self.settings.seed + self.ranks.index)  # else all would drop out the same
        if self.progress.gradient_checkpointing:
            self._checkpoint_activations()
        self.model.train()
        return self.progress

    def _newest(self, checkpoints: Checkpoints) -> Checkpoint | None:
        """The newest whole checkpoint; of several processes the one that process 0 chooses.

        Raises:
            TrainingError: a process does not see that one whole.
        """
        newest = checkpoints.latest() if self.ranks.is_main else None
        if self.ranks.count == 1:
            return newest
        step = self.ranks.from_main(newest.step if newest is not None else None)
        if step is not None and newest is None:
            newest = checkpoints.of_step(step)
        blind = [i for i, sees in enumerate(self.ranks.gather(step is None or newest is not None)) if not sees]
        if blind:
            raise TrainingError(
                f"{checkpoints.folder}: process {blind[0]} does not see the checkpoint of step {step} whole, which "
                "process 0 goes on from. Do all machines share this folder? Run the same command again."
            )
        return newest

    def _take_step(self) -> None:
        started = time.perf_counter()
        rows, num_tokens = self.next_rows()
        (step_loss,) = self.ranks.total([self._fitting(lambda: self._accumulate(rows, num_tokens))])
        self.finish_step(rows, num_tokens, step_loss, float(self.clip()))
        self.progress.training_seconds += time.perf_counter() - started

    def next_rows(self) -> tuple[list[int], int]:
        """The rows of the next optimizer step, and how many supervised tokens they have."""
        settings, split = self.settings, self.train_split
        rows_a_step = settings.micro_batch_size * settings.gradient_accumulation_steps
        rows = rows_of_step(len(split), rows_a_step, settings.seed, self.progress.step)
        return rows, int(split.num_supervised[rows].sum())

    def clip(self) -> torch.Tensor:
        """Cuts the gradient down to `train.max_grad_norm`; returns its norm before, a scalar."""
        limit = self.settings.max_grad_norm or math.inf
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(list(self.trainable.values()), limit)
        return norm

    def finish_step(self, rows: list[int], num_tokens: int, step_loss: float, grad_norm: float) -> None:
        """The update by the gradient that is there, and the books.

        Raises:
            TrainingError: NaN or infinite loss or gradient; too little memory for the optimizer.
        """
        progress, split = self.progress, self.train_split
        event = {"train.loss": step_loss, "train.grad_norm": grad_norm}
        overflowed = self._overflowed(step_loss, grad_norm)
        if overflowed:
            event["train.grad_norm"] = grad_norm = 0.0  # of the update that is made: none
        check_finite(step_loss, grad_norm, progress.step + 1, split, rows)
        event["train.learning_rate"] = float(self.scheduler.get_last_lr()[0])
        is_wanted = overflowed or not num_tokens or self._update_is_wanted(step_loss, grad_norm, event)
        if is_wanted:
            self._update()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # as the optimizer's step would
        if overflowed or not is_wanted:
            self.optimizer.zero_grad()  # it made no update: the method learns nothing from it
        self.hooks.after_update(progress.step + 1)
        self.scheduler.step()
        self.optimizer.zero_grad()
        progress.step += 1
        progress.tokens_seen += int(split.lengths[rows].sum())
        progress.supervised_tokens_seen += num_tokens
        progress.losses.append(step_loss)
        self._record(event)

    def _update(self) -> None:
        try:
            self.optimizer.step()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"{self.accelerator.device}: out of memory at step {self.progress.step + 1}, in the optimizer "
                f"({str(error).strip().splitlines()[0]}). Its states take twice the trainable weights: lower lora.r, "
                "or set train.optimizer=paged_adamw_8bit."
            ) from None

    def _accumulate(self, rows: list[int], num_tokens: int) -> float:
        """The step's gradient, summed over all micro-batches; this process's share of the loss, nats a token of all."""
        step_loss, ranks = 0.0, self.ranks
        pieces = micro_batch_rows(self.train_split, rows, self.progress.micro_batch_size, ranks.count)
        shares = list(ranks.share(pieces))
        for number, (piece, counts) in enumerate(shares, 1):
            self.hooks.before_micro_batch(self.progress.step, (number - 1) * ranks.count + ranks.index)
            batch = collate(self.train_split, piece, self.pad_token_id, self.plan.packed)
            with self._gradients_meet(number == len(shares)):
                with self._autocast():
                    loss, _ = self.hooks.loss(self.model, batch.to(self.accelerator.device), self.plan)
                    penalty = self.hooks.penalty() if number == len(shares) else None
                # the processes' gradients are averaged where they meet: times their number, that is the sum
                mean = loss / (num_tokens / ranks.count) if counts else loss * 0.0
                self.accelerator.backward(mean if penalty is None else mean + penalty)
            self.longest_fitted = max(self.longest_fitted, batch.max_length)
            step_loss += loss.item() / num_tokens if counts else 0.0
        self.hooks.after_backward()
        return step_loss

    def _gradients_meet(self, is_last: bool) -> AbstractContextManager[None]:
        """The gradients of all processes are summed after the last micro-batch; there DeepSpeed makes its step too."""
        if self.zero is not None:
            self.accelerator.gradient_state._set_sync_gradients(is_last)
        return nullcontext() if is_last or self.ranks.count == 1 else self.accelerator.no_sync(self.model)

    def _autocast(self) -> AbstractContextManager[None]:
        """accelerate leaves it to DeepSpeed, whose forward has it; the output head may come after that."""
        dtype = self.settings.mixed_precision
        if self.zero is None or dtype is None:
            return self.accelerator.autocast()
        return torch.autocast(self.accelerator.device.type, getattr(torch, dtype))

    def _fitting(self, work: Callable[[], T]) -> T:
        """The work's result; where memory runs out it is done again from its start in smaller pieces.

        The result is the same, but for what is drawn at random for a cut of the step: dropout, AdaMix's routes.

        Raises:
            TrainingError: one row at a time, with activations recomputed, is still too much.
        """
        while True:
            random_state = torch_rng_state()
            try:
                return work()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().splitlines()[0]
            self.take_less_memory(reason)
            set_torch_rng_state(random_state)

    def take_less_memory(self, reason: str) -> None:
        """Halves the micro-batch, then recomputes activations.

        Raises:
            TrainingError: both are done already.
        """
        progress = self.progress
        if self.ranks.count > 1:  # the others are in the middle of the step, and wait for this one
            raise TrainingError(
                f"process {self.ranks.index} of {self.ranks.count}, {self.accelerator.device}: out of memory at step "
                f"{progress.step + 1} with micro-batches of {progress.micro_batch_size} rows ({reason}). Halve "
                "train.micro_batch_size and double train.gradient_accumulation_steps (the same result), or set "
                "train.gradient_checkpointing=true."
            )
        self.optimizer.zero_grad()
        self._free_memory()
        if progress.micro_batch_size > 1:
            progress.micro_batch_size = math.ceil(progress.micro_batch_size / 2)
            size = progress.micro_batch_size
            now = f"micro-batches of {size} rows, more of them: the same result but for dropout's and AdaMix's draws"
        elif not progress.gradient_checkpointing:
            progress.gradient_checkpointing = True
            self._checkpoint_activations()
            now = "activations are recomputed: the same result, slower"
        else:
            fits = f"rows of {self.longest_fitted} tokens fitted" if self.longest_fitted else "no row has fitted yet"
            raise TrainingError(
                f"{self.accelerator.device}: out of memory at step {progress.step + 1} with one row at a time and "
                f"activations recomputed ({reason}). The longest row has {int(self.train_split.lengths.max())} tokens; "
                f"{fits}. Lower data.max_length, or take less for the base (train.method=qlora, "
                "runtime.keep_quantized=always) or the optimizer (train.optimizer=paged_adamw_8bit)."
            )
        logger.warning("out of memory at step %d (%s): %s", progress.step + 1, reason, now)
        self._record(
            {
                "train.micro_batch_size": float(progress.micro_batch_size),
                "train.gradient_checkpointing": float(progress.gradient_checkpointing),
            }
        )

    def _checkpoint_activations(self) -> None:
        inner_model(self.model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _update_is_wanted(self, step_loss: float, grad_norm: float, event: dict[str, float]) -> bool:
        """Looks for a spike and does to the gradient what `train.on_spike` says; False: no update."""
        progress, settings = self.progress, self.settings
        values, recent, limit = (step_loss, grad_norm), progress.recent, settings.spike_zscore
        zscore = highest_zscore(values, recent)
        is_spike = limit is not None and zscore > limit
        kept = clamped(values, recent, limit) if limit is not None and is_spike else values
        progress.recent = [*recent[1 - SPIKE_WINDOW :], kept]
        if not is_spike:
            return True
        progress.num_spikes += 1
        event["train.spike_zscore"] = zscore
        logger.warning(
            "step %d: spike: loss %.4f, gradient norm %.4g, %.1f deviations over the last %d (train.on_spike: %s)",
            progress.step + 1, step_loss, grad_norm, zscore, len(recent), settings.on_spike,
        )  # fmt: skip
        if settings.on_spike is OnSpike.clip:
            usual = statistics.fmean(norm for _, norm in recent)
            torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), usual)  # the scaler's scale is off already
        return settings.on_spike is not OnSpike.skip

    def _overflowed(self, step_loss: float, grad_norm: float) -> bool:
        """Whether float16 gradients overflow at the loss scale, which is high at first.

        The scaler leaves such a step out and halves its scale until they fit.
        """
        scaler = self.accelerator.scaler
        if scaler is None or not math.isfinite(step_loss) or math.isfinite(grad_norm) or scaler.get_scale() <= 1:
            return False
        logger.info(
            "step %d: no update, float16 overflows at loss scale %g", self.progress.step + 1, scaler.get_scale()
        )
        return True

    def judge(self, result: Loss) -> None:
        """Records the validation loss of now, remembers the best, and decides whether to stop early.

        Raises:
            TrainingError: it is not finite.
        """
        progress, settings = self.progress, self.settings
        if not math.isfinite(result.loss):
            raise TrainingError(
                f"step {progress.step}: the validation loss is {result.loss}. At step 0 the base itself overflows: "
                "look at model.dtype, quantization.compute_dtype, train.mixed_precision (bfloat16 has fp32's range). "
                "Later: lower train.learning_rate, or lengthen train.warmup_ratio."
            )
        self._record({"validation.loss": result.loss})
        if not self.hooks.may_be_kept(progress.step):
            return
        if progress.best_loss is None or result.loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.validations_since_best = result.loss, progress.step, 0
            if settings.keep is Keep.best:
                self.best_weights = {name: whole(p).cpu().clone() for name, p in self.trainable.items()}
            return
        progress.validations_since_best += 1
        patience = settings.early_stopping_patience
        progress.stopped_early = (
            patience is not None and progress.validations_since_best >= patience and progress.step < self.num_steps
        )

    def _measure(self) -> Loss:
        """The validation loss, in smaller batches where memory runs out: the same result.

        Raises:
            TrainingError: one row at a time is too much.
        """
        while True:
            size = self.progress.eval_batch_size
            try:
                with self._autocast():
                    return measure_loss(
                        self.model, self.validation_split, size, self.pad_token_id, self.progress_bar, self.plan,
                        self.ranks,
                    )  # fmt: skip
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().splitlines()[0]
            self.validate_with_less_memory(reason)

    def validate_with_less_memory(self, reason: str) -> None:
        """Halves the batches of the validation.

        Raises:
            TrainingError: it is one row at a time already.
        """
        size = self.progress.eval_batch_size
        self._free_memory()
        if size == 1 or self.ranks.count > 1:
            raise TrainingError(
                f"{self.accelerator.device}: out of memory in validation at step {self.progress.step} with {size} rows "
                f"at a time ({reason}). The longest row has {int(self.validation_split.lengths.max())} tokens. "
                "Lower train.micro_batch_size (validation takes twice as many rows) or data.max_length, or take less "
                "for the base (train.method=qlora, runtime.keep_quantized=always)."
            )
        self.progress.eval_batch_size = math.ceil(size / 2)
        logger.warning("out of memory in validation (%s): batches of %d rows", reason, math.ceil(size / 2))

    def _free_memory(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    def _record(self, event: dict[str, float]) -> None:
        self.progress.history.append({"step": self.progress.step, **event})
        self.on_event(self.progress.step, event)

    def checkpoint(self) -> Checkpoint:
        """Everything that a training needs to go on from here as if it had not stopped; all processes have to ask.

        Tensors are whole, so that another engine, or another number of processes, can go on from here too.
        """
        tensors = {f"now.{name}": whole(p).cpu() for name, p in self.trainable.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        state = {
            "optimizer": self._optimizer_state(),
            "scheduler": self.scheduler.state_dict(),
            "rng": rng_state(),
            "method": self.hooks.state(),
        }
        if self.ranks.count > 1:
            state["rng_of_ranks"] = self.ranks.gather(state["rng"])
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return Checkpoint(self.progress.step, tensors, state, dataclasses.asdict(self.progress))

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Puts everything back, and tells `on_event` what it may not have heard."""
        self._load_weights({n.removeprefix("now."): t for n, t in checkpoint.tensors.items() if n.startswith("now.")})
        self.best_weights = {n.removeprefix("best."): t for n, t in checkpoint.tensors.items() if n.startswith("best.")}
        if self.zero is not None:
            weights = list(self.trainable.values())
            self.zero.load_optimizer_state(self.model, weights, checkpoint.state["optimizer"], self.ranks)
        else:
            self.optimizer.load_state_dict(self._in_pieces(checkpoint.state["optimizer"]))
            page_again(self.optimizer)
        self.scheduler.load_state_dict(checkpoint.state["scheduler"])
        if self.accelerator.scaler is not None and "scaler" in checkpoint.state:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        elif self.accelerator.scaler is not None:
            logger.warning("the checkpoint is of a device without a loss scale: it starts anew")
        of_ranks = checkpoint.state.get("rng_of_ranks", [checkpoint.state["rng"]])
        if len(of_ranks) != self.ranks.count:
            logger.warning("the checkpoint is of %d processes, now there are %d: dropout draws otherwise from here",
                           len(of_ranks), self.ranks.count)  # fmt: skip
        set_rng_state(of_ranks[self.ranks.index % len(of_ranks)])
        self.hooks.load_state(checkpoint.state["method"])
        self.progress = Progress(**checkpoint.numbers)
        for event in self.progress.history:
            self.on_event(int(event["step"]), {name: value for name, value in event.items() if name != "step"})

    def _optimizer_state(self) -> Any:
        """The optimizer's state dict as in one process."""
        if self.zero is not None:
            return self.zero.optimizer_state(self.model, list(self.trainable.values()))
        return whole_state(self.optimizer.state_dict())

    def _in_pieces(self, optimizer_state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state dict with each tensor cut as its parameter is."""
        parameters = self.in_order
        states = {
            number: {
                n: piece_like(v, parameters[number]) if isinstance(v, torch.Tensor) else v for n, v in state.items()
            }
            for number, state in optimizer_state["state"].items()
        }
        return {**optimizer_state, "state": states}

    @torch.no_grad()
    def _load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.trainable.items():
            if self.zero is not None:
                self.zero.load_weight(parameter, weights[name], self.ranks)
            else:
                parameter.copy_(piece_like(weights[name], parameter))


def _load_zero() -> Any:
    """What is DeepSpeed's own: an optional package, and seconds to import."""
    from pipeline import zero

    return zero


def is_out_of_memory(error: BaseException) -> bool:
    """On a GPU, or on a CPU where the system refuses (which Linux seldom does: it kills instead)."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
