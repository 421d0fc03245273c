"""Several adapters trained together on one frozen base: a forward and a backward pass serve all of them.

Each adapter keeps a `Trainer` of its own: rows, optimizer, schedule, checkpoints, early stop. A round makes one
optimizer step of every adapter that is still training: their micro-batches lie one after another in one batch, the
base's layers give every segment its own adapter (`pipeline.segmented_lora`), and the sum of the adapters' losses, each
over its own number of supervised tokens, goes backward once. Rows never mix, so each adapter gets the gradient that it
would get alone; adapters may be at different steps; and one that fails or ends leaves the batch.

Shape suffixes: M members in the batch, S supervised tokens.
"""

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.batching import Batch, collate, rows_by_length
from pipeline.checkpoints import Checkpoints
from pipeline.dataset import Split
from pipeline.errors import Interrupted, PipelineError
from pipeline.losses import ForwardPlan, Loss, plan_forward, token_nats
from pipeline.packing import agree, eval_mode
from pipeline.parents import Starters
from pipeline.segmented_lora import CannotFuse, Segments, segmented_lora
from pipeline.stopping import StopRequest
from pipeline.training import Trainer, is_out_of_memory, micro_batch_rows

logger = logging.getLogger(__name__)
CACHED_TOKENS = 4096  # of a validation's forward on a CPU: more leave its caches and take longer together than in turn


@dataclass
class Fused:
    """One adapter of a group.

    Attributes:
        error: what ended its training before its time.
        saved_step: of its newest checkpoint that this process wrote.
    """

    trainer: Trainer
    checkpoints: Checkpoints | None = None
    error: PipelineError | None = None
    saved_step: int | None = None

    @property
    def is_live(self) -> bool:
        return self.error is None and not self.trainer.is_done


@dataclass(frozen=True)
class Step:
    """The optimizer step that a member is about to make."""

    member: Fused
    rows: list[int]
    num_tokens: int  # supervised ones


class FusedTrainer:
    """Members on one base, on their way through their steps.

    Args:
        base: frozen; the members' models are `share_weights` of it under an adapter each, their splits the same.
    """

    def __init__(self, base: torch.nn.Module, members: Sequence[Fused], progress_bar: bool = True):
        self.base, self.members, self.progress_bar = base, list(members), progress_bar
        first = self.members[0].trainer
        self.accelerator, self.pad_token_id = first.accelerator, first.pad_token_id
        self.train_split, self.validation_split = first.train_split, first.validation_split
        self.members_a_forward = self.members_a_validation = len(self.members)
        if self.accelerator.device.type == "cpu":
            tokens = first.progress.eval_batch_size * float(self.validation_split.lengths.mean())
            self.members_a_validation = min(len(self.members), max(1, int(CACHED_TOKENS / tokens)))
        self.segments, self.plan = Segments(), ForwardPlan()

    def run(self) -> None:
        """Trains all members to their ends, from their newest checkpoints, and leaves the kept weights in their models.

        A member that fails has its `error`; the others go on.

        Raises:
            Interrupted: SIGTERM, Ctrl-C or the death of its dvc; checkpoints of all members were written.
            CannotFuse: the base does not take several adapters at once.
        """
        starters, models = Starters(), [member.trainer.model for member in self.members]
        bar = tqdm(total=max(m.trainer.num_steps for m in self.members), desc="train together", unit="step",
                   disable=not self.progress_bar)  # fmt: skip
        with (
            StopRequest() as stop,
            plan_forward(self.base) as self.plan,
            segmented_lora(self.base, models) as self.segments,
            bar,
        ):
            self._check_forward()
            for member in self.members:
                with _leaving(member):
                    member.trainer.start(member.checkpoints)
            self.base.train()
            self._recompute_where_needed()
            self._validate([member for member in self.members if member.is_live and not member.trainer.progress.step])
            while live := [member for member in self.members if member.is_live]:
                self._take_round(live)
                self._validate([m for m in live if m.error is None and m.trainer.validation_due])
                stopped_by = stop.received or starters.death()
                self._save(always=stopped_by is not None)
                if stopped_by:
                    raise Interrupted(f"stopped by {stopped_by}; {len(self.members)} adapters have their checkpoints.")
                bar.set_postfix_str(f"{len(live)} adapters", refresh=False)
                bar.update(max(m.trainer.progress.step for m in self.members) - bar.n)
        for member in self.members:
            if member.error is None:
                member.trainer.finish()

    def _save(self, always: bool) -> None:
        """Writes the checkpoints that are due, and that of a member that is done before the others."""
        goes_on = any(member.is_live for member in self.members)
        for member in self.members:
            trainer, checkpoints = member.trainer, member.checkpoints
            if member.error is not None or checkpoints is None or trainer.progress.step == member.saved_step:
                continue
            if always or (goes_on and trainer.is_done) or checkpoints.due(trainer.progress.step):
                member.saved_step = trainer.progress.step
                with _leaving(member):
                    checkpoints.save(trainer.checkpoint())

    def _take_round(self, live: Sequence[Fused]) -> None:
        """One optimizer step of each."""
        started = time.perf_counter()
        steps = [Step(member, *member.trainer.next_rows()) for member in live]
        while True:
            steps = [step for step in steps if step.member.error is None]
            try:
                values = self._accumulate(steps)
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().splitlines()[0]
            self._take_less_memory(reason, [step.member for step in steps])
        for step, (loss, grad_norm) in zip(steps, values, strict=True):
            with _leaving(step.member):
                step.member.trainer.finish_step(step.rows, step.num_tokens, loss, grad_norm)
        seconds = time.perf_counter() - started
        tokens = [int(self.train_split.lengths[step.rows].sum()) for step in steps]
        for step, num_tokens in zip(steps, tokens, strict=True):
            step.member.trainer.progress.training_seconds += seconds * num_tokens / sum(tokens)

    def _accumulate(self, steps: Sequence[Step]) -> list[list[float]]:
        """The gradients of all steps; for each its loss in nats a supervised token, and its gradient's norm."""
        if not steps:
            return []
        parts = [
            self._backward(steps[start : start + self.members_a_forward])
            for start in range(0, len(steps), self.members_a_forward)
        ]
        norms = torch.stack([step.member.trainer.clip().to(self.accelerator.device) for step in steps])
        found: list[list[float]] = torch.stack([torch.cat(parts), norms], dim=1).tolist()  # one wait for the device
        return found

    def _backward(self, steps: Sequence[Step]) -> torch.Tensor:
        """Accumulates the gradients of the steps over their micro-batches; returns their losses, float32 [M]."""
        split = self.train_split
        losses_M = torch.zeros(len(steps), device=self.accelerator.device)
        cuts = [micro_batch_rows(split, s.rows, s.member.trainer.progress.micro_batch_size) for s in steps]
        for pieces in itertools.zip_longest(*cuts, fillvalue=()):
            present = [i for i, rows in enumerate(pieces) if rows]
            counts = [int(split.num_supervised[list(pieces[i])].sum()) for i in present]
            shares = np.repeat([1 / steps[i].num_tokens for i in present], counts)
            shares_S = torch.from_numpy(shares).to(losses_M)  # before the forward pass, for which a copy would wait
            nats_S = self._nats([(steps[i].member, list(pieces[i])) for i in present], split)
            self.accelerator.backward((nats_S * shares_S).sum())
            sums = [part.sum() for part in nats_S.detach().split(counts)]
            for i, nats in zip(present, sums, strict=True):
                losses_M[i] += nats / steps[i].num_tokens
        return losses_M

    def _nats(self, pieces: Sequence[tuple[Fused, list[int]]], split: Split) -> torch.Tensor:
        """Nats of every supervised token of the members' rows, float32 [S], in one forward."""
        batch = self._batch(pieces, split)
        with self.accelerator.autocast():
            return token_nats(self.base, batch, self.plan)

    def _batch(self, pieces: Sequence[tuple[Fused, list[int]]], split: Split) -> Batch:
        rows = [row for _, own in pieces for row in own]
        batch = collate(split, rows, self.pad_token_id, self.plan.packed)
        width = batch.input_ids.shape[1]
        is_packed = batch.cu_seq_lens is not None
        sizes = [int(split.lengths[own].sum()) if is_packed else len(own) * width for _, own in pieces]
        device = self.accelerator.device
        self.segments.lay_out([(self.members.index(m), n) for (m, _), n in zip(pieces, sizes, strict=True)], device)
        return batch.to(device)

    def _take_less_memory(self, reason: str, members: Sequence[Fused]) -> None:
        """Fewer adapters a forward, then what a training alone does; a member whom nothing helps has its error."""
        for member in members:
            member.trainer.optimizer.zero_grad()
        if self.members_a_forward > 1:
            if self.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
            self.members_a_forward = math.ceil(min(self.members_a_forward, len(members)) / 2)
            logger.warning("out of memory (%s): %d adapters a forward, the same result", reason, self.members_a_forward)
            return
        for member in members:
            with _leaving(member):
                member.trainer.take_less_memory(reason)
        self._recompute_where_needed()

    def _recompute_where_needed(self) -> None:
        if any(member.trainer.progress.gradient_checkpointing for member in self.members if member.is_live):
            base: Any = self.base
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _validate(self, members: Sequence[Fused]) -> None:
        """Measures the members on the validation split, each with its adapter as it is now."""
        fresh = all(_is_fresh(member.trainer) for member in members)
        measured = members[:1] if fresh else members  # fresh adapters add nothing: all are the base
        while True:
            measured = [member for member in measured if member.error is None]
            try:
                losses = self._measure(measured)
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().splitlines()[0]
            self._validate_with_less_memory(reason, members)
        members = [member for member in members if member.error is None]
        for member, loss in zip(members, losses * (len(members) // max(1, len(losses))), strict=True):
            with _leaving(member):
                member.trainer.judge(loss)

    def _validate_with_less_memory(self, reason: str, members: Sequence[Fused]) -> None:
        """Fewer adapters a forward, then what a training alone does."""
        if self.members_a_validation > 1:
            self.members_a_validation = math.ceil(min(self.members_a_validation, len(members)) / 2)
            logger.warning("out of memory in validation (%s): %d adapters a forward", reason, self.members_a_validation)
            return
        for member in members:
            with _leaving(member):
                member.trainer.validate_with_less_memory(reason)

    def _measure(self, members: Sequence[Fused]) -> list[Loss]:
        size = self.members_a_validation
        nats = [self._measure_together(members[start : start + size]) for start in range(0, len(members), size)]
        count = int(self.validation_split.num_supervised.sum())
        return [Loss(float(own) / count, count) for part in nats for own in part]

    def _measure_together(self, members: Sequence[Fused]) -> np.ndarray:
        """Each member's nats over the whole split, float64 [M]."""
        split, sums_M = self.validation_split, np.zeros(len(members))
        size = min(member.trainer.progress.eval_batch_size for member in members)
        with torch.no_grad(), eval_mode(self.base):
            for rows in rows_by_length(split, size):
                nats_S = self._nats([(member, rows) for member in members], split)
                sums_M += nats_S.view(len(members), -1).double().sum(1).cpu().numpy()
        return sums_M

    @torch.no_grad()
    def _check_forward(self) -> None:
        """Tries on a few rows, with made-up lora_B, whether each member gets what its own model computes.

        Raises:
            CannotFuse: one gets something else.
        """
        split, members = self.train_split, self.members
        rows = np.flatnonzero(split.num_supervised)[:2].tolist()
        random = torch.Generator().manual_seed(0)
        matrices = [p for member in members for name, p in member.trainer.trainable.items() if "lora_B" in name]
        before = [matrix.clone() for matrix in matrices]
        for matrix in matrices:
            matrix.copy_(0.05 * torch.randn(matrix.shape, generator=random))
        for member, found_S in zip(members, self._try_forward(rows), strict=True):
            model = member.trainer.model
            batch = collate(split, rows, self.pad_token_id).to(self.accelerator.device)
            with eval_mode(model), self.accelerator.autocast():
                expected_S = token_nats(model, batch, ForwardPlan())
            if not agree(model, found_S, expected_S):
                difference = float((found_S - expected_S).abs().max())
                raise CannotFuse(f"beside others an adapter computes otherwise than alone: by {difference:.3g} nats")
        for matrix, values in zip(matrices, before, strict=True):
            matrix.copy_(values)

    def _try_forward(self, rows: list[int]) -> torch.Tensor:
        """Every member's nats of these rows, float32 [members, S], as many adapters a forward as memory takes."""
        while True:
            size = self.members_a_forward
            parts = [self.members[start : start + size] for start in range(0, len(self.members), size)]
            try:
                with eval_mode(self.base):
                    nats = [self._nats([(member, rows) for member in part], self.train_split) for part in parts]
                return torch.cat(nats).view(len(self.members), -1)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
                reason = str(error).strip().splitlines()[0]
            self._take_less_memory(reason, self.members)


def _is_fresh(trainer: Trainer) -> bool:
    return not any(bool(p.detach().any()) for name, p in trainer.trainable.items() if "lora_B" in name)


@contextmanager
def _leaving(member: Fused) -> Iterator[None]:
    """What goes wrong inside is this member's end and no other's."""
    try:
        yield
    except Interrupted:
        raise
    except PipelineError as error:
        member.error = error
        member.trainer.optimizer.zero_grad()
        logger.error("an adapter leaves the group after step %d: %s", member.trainer.progress.step, error)
