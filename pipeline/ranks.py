"""The processes of one training: which one this is, how they share work, and what they agree on.

One process alone is the usual case: then nothing here communicates. Sharding is torch's FSDP2 (`fully_shard`,
arXiv 2304.11277), or DeepSpeed's (`pipeline.zero`); accelerate makes the process group, by NCCL on GPUs and gloo on
CPUs.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState

from pipeline.errors import PipelineError, TrainingError
from pipeline.launched import check_package, rank, world_size
from pipeline.packing import inner_model
from pipeline.schema import Engine, RuntimeConfig

T = TypeVar("T")
CPU = torch.device("cpu")
MEETING_TIMEOUT = timedelta(hours=2)  # others wait while process 0 loads, or writes a checkpoint


@dataclass(frozen=True)
class Ranks:
    """Attributes:
    index: of this process, from 0.
    count: of all processes.
    device: of this process: where it computes, and where tensors lie that the processes exchange.
    engine: what the processes share of the model.
    zero_stage: of DeepSpeed; 0 with another engine.
    """

    index: int = 0
    count: int = 1
    device: torch.device = CPU
    engine: Engine = Engine.ddp
    zero_stage: int = 0

    @property
    def is_main(self) -> bool:
        return self.index == 0

    @property
    def shards(self) -> bool:
        """Whether each process holds pieces of the weights (FSDP, ZeRO-3)."""
        return self.count > 1 and (self.engine is Engine.fsdp or self.zero_stage == 3)

    def share(self, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """Every count-th item, and True. All processes get as many: where there is none left the last one again, False.

        Sharded weights are put together by all processes in step, so that all have to make as many forwards.
        """
        for turn in range(math.ceil(len(items) / self.count)):
            place = turn * self.count + self.index
            yield items[min(place, len(items) - 1)], place < len(items)

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in float64."""
        if self.count == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(totals)
        return totals.tolist()

    def gather(self, value: T) -> list[T]:
        """The value of each process, in their order; any picklable one: the processes are of one training."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """Process 0's value."""
        if self.count == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]


ALONE = Ranks()


@contextmanager
def joined(device: torch.device, runtime: RuntimeConfig) -> Iterator[Ranks]:
    """This process among those that a launcher started with it, which meet here; it alone where there is none.

    Raises:
        TrainingError: instead of the library's error, where another process is gone.
    """
    if world_size() == 1:
        yield ALONE
        return
    check_package(runtime)
    uses_zero = runtime.engine is Engine.deepspeed
    if uses_zero and device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would take a GPU that it finds
    PartialState(cpu=device.type == "cpu", timeout=MEETING_TIMEOUT)
    try:
        yield Ranks(rank(), world_size(), device, runtime.engine, runtime.zero_stage if uses_zero else 0)
    except RuntimeError as error:
        is_of_torch = isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)
        if isinstance(error, PipelineError) or not is_of_torch:
            raise
        raise TrainingError(
            "another process of this training does not answer, and none goes on alone "
            f"({str(error).strip().splitlines()[0]})."
        ) from None
    torch.distributed.destroy_process_group()


def shard(model: torch.nn.Module, device: torch.device) -> None:
    """Leaves each process its piece of every weight (FSDP2); a layer's are put together while it computes.

    Each decoder layer goes to the device as it is cut, so that the whole model need not fit there.

    Args:
        model: with its adapter; 4-bit weights are stored in a floating dtype (`bnb.store_for_shards`).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # its import takes most of a second

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    names = set(inner_model(model)._no_split_modules or [])
    for module in model.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    embeddings, head = inner_model(model).get_input_embeddings(), inner_model(model).get_output_embeddings()
    if head is None or embeddings.weight is not head.weight:
        fully_shard(embeddings, mesh=mesh)
    # What is left, the output head and the last norm, stays put together from the forward to the backward: the loss
    # uses the head in chunks, and not every process has as many.
    fully_shard(model, mesh=mesh)
    move_rest(model, device)


def move_rest(model: torch.nn.Module, device: torch.device) -> None:
    """Brings to the device what a sharded model has beside its parameters."""
    for module in model.modules():
        if getattr(module, "quant_state", None) is not None:  # of bitsandbytes: no parameter, and every process has all
            module.quant_state.to(device)
    for _, buffer in model.named_buffers():
        buffer.data = buffer.data.to(device)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together, on every process (all have to ask); any other as it is. Without a gradient."""
    if hasattr(tensor, "ds_id"):  # of DeepSpeed's ZeRO-3
        from deepspeed import zero

        with zero.GatheredParameters([tensor]):
            return tensor.data.clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole_state(value: Any) -> Any:
    """A state dict with its sharded tensors put together, on the CPU."""
    if isinstance(value, dict):
        return {key: whole_state(each) for key, each in value.items()}
    if isinstance(value, list):
        return [whole_state(each) for each in value]
    return whole(value).cpu() if _is_sharded(value) else value


def piece_like(tensor: torch.Tensor, parameter: Any) -> torch.Tensor:
    """This process's piece of a tensor that every process has whole, cut as the parameter is."""
    if not _is_sharded(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)


def _is_sharded(value: Any) -> bool:
    return hasattr(value, "full_tensor")  # torch's DTensor, without importing it
