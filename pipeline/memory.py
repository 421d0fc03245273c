"""How much memory a training of ours takes, from the architecture and the settings, before anything is loaded.

What lies there for good (weights, scales, adapter, gradients, optimizer states) is arithmetic (`memory_states`). What
comes and goes is found by running a step of this engine's own code on a few layers of the model with tensors that have
shapes and no memory (`memory_simulation`). docs/memory.md has the arithmetic and what was measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeline.architecture import Architecture
from pipeline.losses import CHUNK_ELEMENTS
from pipeline.memory_simulation import simulate_step
from pipeline.memory_states import (
    adapter_tensors,
    base_bytes,
    num_bytes,
    optimizer_bytes,
    quantized_bytes,
    quantized_linear,
    trainable_dtype,
    trainable_tensors,
)
from pipeline.quantized_layers import FOUR_BIT
from pipeline.schema import (
    Attention,
    Dtype,
    Engine,
    Keep,
    KeepQuantized,
    LoraConfig,
    QuantizationConfig,
    QuantizationMethod,
    RunConfig,
    TrainConfig,
    TrainMethod,
)

CUDA_CONTEXT_BYTES = 600 * 2**20  # driver, kernels, libraries of a process: 400 to 600 MiB by card and version
CUDA_FRAGMENTATION = 0.03  # of what the allocator holds in pieces that no tensor fits into
CUBLAS_BYTES = 32 * 2**20  # CUBLAS_WORKSPACE_CONFIG=:4096:8, as use_deterministic_kernels sets it: 8 x 4 MiB
CPU_SLACK = 0.05  # of what comes and goes: freed pieces that malloc holds
CHECKED_ROWS = 2  # finetuning.prepare compares their logits before and under the fresh adapter


@dataclass(frozen=True)
class Setup:
    """Everything beside the architecture that decides memory.

    Attributes:
        device: `cpu` or `cuda`.
        keeps_quantized: the base stays in few bits while training; else it is dequantised once.
        micro_batch_size: rows a forward, of `length` tokens each, all of them supervised.
        num_processes: each on a device of its own; the figures are those of one.
    """

    method: TrainMethod
    quantization: QuantizationConfig
    model_dtype: Dtype
    lora: LoraConfig
    train: TrainConfig
    device: str
    keeps_quantized: bool
    micro_batch_size: int
    length: int
    gradient_checkpointing: bool
    num_processes: int = 1
    engine: Engine = Engine.ddp
    zero_stage: int = 2
    attention: Attention = Attention.sdpa


@dataclass(frozen=True)
class Memory:
    """Bytes of one process's device at the peak of a training. The columns but `loading` add up to its peak.

    Attributes:
        weights: of the base; `scales`: of its quantisation.
        gradients: all of them.
        activations: what forward and backward add at the peak beside all the rest (where gradients come as activations
            go, less than all activations).
        logits: of the output head and the loss, and their gradients.
        workspace: dequantised layers, cuBLAS, the allocator's slack; on a CPU the copy that `train.keep=best` holds.
        loading: the peak before the first step (loading, dequantising, checks), with the weights that lie there then;
            0 where it is below the training's.
    """

    weights: int
    scales: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    loading: int

    @property
    def states(self) -> int:
        """What lies there for good."""
        return self.weights + self.scales + self.adapter + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The peak, of loading or training: compare it with `usable_bytes` of the device."""
        return max(self.loading, self.states + self.activations + self.logits + self.workspace)


def usable_bytes(capacity_bytes: int, device: str) -> int:
    """What tensors can take of a device's memory: on CUDA less than all, for the context and fragmentation."""
    if device == "cpu":
        return capacity_bytes
    return max(0, int((capacity_bytes - CUDA_CONTEXT_BYTES) * (1 - CUDA_FRAGMENTATION)))


def setup_of(config: RunConfig, device: str, *, length: int, keeps_quantized: bool) -> Setup:
    """The setup as configured."""
    train, runtime = config.train, config.runtime
    return Setup(
        method=train.method,
        quantization=config.quantization,
        model_dtype=config.model.dtype,
        lora=config.lora,
        train=train,
        device=device,
        keeps_quantized=keeps_quantized,
        micro_batch_size=train.micro_batch_size,
        length=length,
        gradient_checkpointing=train.gradient_checkpointing,
        num_processes=runtime.num_processes,
        engine=runtime.engine,
        zero_stage=runtime.zero_stage,
        attention=config.model.attn_implementation,
    )


def alternatives(config: RunConfig, device: str, length: int) -> dict[str, Setup]:
    """The plan's columns: `full`, `lora` (16-bit), `lora int8`, `qlora`, otherwise as configured.

    On CUDA the quantized bases stay in few bits, unless `runtime.keep_quantized` is `never`.
    """
    own = setup_of(config, device, length=length, keeps_quantized=False)
    keep, is_cuda = config.runtime.keep_quantized, device == "cuda"
    keeps_4bit = keep is KeepQuantized.always or (keep is KeepQuantized.auto and is_cuda)
    keeps_int8 = is_cuda and keep is not KeepQuantized.never
    dtype = own.model_dtype if own.model_dtype is not Dtype.float32 else Dtype.bfloat16
    is_4bit = own.quantization.method in FOUR_BIT
    four_bit = own.quantization if is_4bit else replace(own.quantization, method=QuantizationMethod.nf4)
    int8 = replace(own.quantization, method=QuantizationMethod.int8)
    quantized = replace(own, method=TrainMethod.qlora)
    return {
        "full": replace(own, method=TrainMethod.full),
        "lora": replace(own, method=TrainMethod.lora, model_dtype=dtype),
        "lora int8": replace(quantized, quantization=int8, keeps_quantized=keeps_int8),
        "qlora": replace(quantized, quantization=four_bit, keeps_quantized=keeps_4bit),
    }


def smallest(setup: Setup) -> Setup:
    """What the engine falls back to by itself when memory runs out."""
    return replace(setup, micro_batch_size=1, gradient_checkpointing=True)


def plan_memory(architecture: Architecture, setup: Setup) -> Memory:
    """The memory of one process.

    Raises:
        ConfigError: target or skipped modules that the model does not have, nothing to quantise.
        ModelError: the model's forward cannot be followed without data.
    """
    weights, scales = base_bytes(architecture, setup)
    tensors, dtype = trainable_tensors(architecture, setup), trainable_dtype(setup)
    trained = sum(tensors) * num_bytes(dtype)
    optimizer = optimizer_bytes(tensors, dtype, setup.train.optimizer, setup.device)
    adapter = 0 if setup.method is TrainMethod.full else trained
    rows_a_step = setup.train.micro_batch_size * setup.train.gradient_accumulation_steps
    step = simulate_step(architecture, setup, accumulates=rows_a_step > setup.micro_batch_size)
    added = max(step.peak, step.validation, trained) - trained  # beside the gradients
    logits = min(step.loss, added)
    workspace = _workspace(architecture, setup, trained, added)
    loading = _outside_steps(architecture, setup, weights + scales, adapter, optimizer)
    memory = Memory(weights, scales, adapter, trained, optimizer, added - logits, logits, workspace, loading)
    memory = _share(memory, setup, architecture)
    return replace(memory, loading=0) if memory.total > memory.loading else memory


def _workspace(architecture: Architecture, setup: Setup, trained: int, added: int) -> int:
    dequantized = 0
    if setup.method is TrainMethod.qlora and setup.keeps_quantized:
        largest = max(layer.num_weights for layer in architecture.linear)
        dequantized = largest * num_bytes(setup.quantization.compute_dtype)
    if setup.device == "cuda":
        return dequantized + CUBLAS_BYTES
    return dequantized + _kept_copy(setup, trained) + round(CPU_SLACK * added)


def _kept_copy(setup: Setup, trained: int) -> int:
    """The best weights so far lie in main memory."""
    return trained if setup.device == "cpu" and setup.train.keep is Keep.best else 0


def _outside_steps(architecture: Architecture, setup: Setup, base: int, adapter: int, optimizer: int) -> int:
    """The peak before the first step and after the last."""
    phases = [base]
    if setup.method is TrainMethod.qlora and not setup.keeps_quantized:
        # quantized_layers.dequantize holds the layers in few bits until the last one is done
        phases.append(
            base + sum(quantized_bytes(quantized_linear(architecture, setup.quantization), setup.quantization))
        )
    if setup.method is not TrainMethod.full:
        # guards.check_same_logits: float32 logits before and after, their difference and its absolute value
        logits = CHECKED_ROWS * setup.length * architecture.vocab_size * 4
        phases.append(base + adapter + 4 * logits)
    if setup.device == "cpu":
        # guards.parameter_checksums: on a CPU torch turns a tensor of any integers into int64 to sum it
        checksum = 8 * architecture.largest_parameter
        trained = base if setup.method is TrainMethod.full else adapter
        phases.append(base + adapter + optimizer + _kept_copy(setup, trained) + checksum)
    return max(phases)


def _share(memory: Memory, setup: Setup, architecture: Architecture) -> Memory:
    """What one of several processes holds; its micro-batch is its own."""
    n = setup.num_processes
    if n == 1:
        return memory
    if setup.engine is Engine.ddp:  # gradients are summed in buckets beside them
        return replace(memory, workspace=memory.workspace + memory.gradients)
    shared = {"gradients": memory.gradients // n, "optimizer": memory.optimizer // n}
    if setup.engine is Engine.deepspeed and setup.zero_stage == 2:
        return replace(memory, **shared)
    a_layer = (memory.weights + memory.scales + memory.adapter) // architecture.num_layers
    shared |= {name: getattr(memory, name) // n for name in ("weights", "scales", "adapter")}
    # the layer at work and the next one are gathered whole
    return replace(memory, **shared, workspace=memory.workspace + 2 * a_layer)


def largest_micro_batch(architecture: Architecture, setup: Setup, capacity_bytes: int) -> int:
    """The most rows of `setup.length` that fit into `usable_bytes`; 0 where none does."""
    usable = usable_bytes(capacity_bytes, setup.device)
    return _largest(lambda n: plan_memory(architecture, replace(setup, micro_batch_size=n)).total, usable, 2**16)


def largest_length(architecture: Architecture, setup: Setup, capacity_bytes: int) -> int:
    """The longest rows that fit at `setup.micro_batch_size`, at most the model's context; 0 where none does."""
    usable = usable_bytes(capacity_bytes, setup.device)
    most = architecture.max_context or 2**20
    return _largest(lambda n: plan_memory(architecture, replace(setup, length=n)).total, usable, most)


def _largest(total: Callable[[int], int], usable: int, most: int) -> int:
    """The largest n up to `most` with total(n) <= usable, to 1.5 %, where the total grows with n about as a line."""
    low, at_low = 1, total(1)
    if at_low > usable:
        return 0
    high, guess, slope = most + 1, min(16, most), 0.0  # low fits, high does not
    while high - low > max(1, low // 64):
        at_guess = total(guess)
        slope = max((at_guess - at_low) / (guess - low), 1.0)
        low, at_low, high = (guess, at_guess, high) if at_guess <= usable else (low, at_low, guess)
        ahead = int((usable - at_low) / slope)
        # a little short of it and then a little beyond, so that the two sides close in
        step = ahead - ahead // 128 if at_guess > usable else ahead + ahead // 128 + 1
        guess = low + min(max(step, 1), high - low - 1)
    return low


def trainable_parameters(architecture: Architecture, setup: Setup) -> int:
    """Raises: ConfigError: see `plan_memory`."""
    return sum(trainable_tensors(architecture, setup))


def flops_per_token(architecture: Architecture, setup: Setup) -> float:
    """Floating-point operations of training, a token (a multiplication and an addition are two).

    2 N forward and 2 N for the gradient of the inputs, with N the weights of the linear layers and the head; 2 more for
    the gradient of each weight that trains; attention over half of the row on average; with checkpointing the
    decoder's forward once more, and the head's where its logits come in chunks.
    """
    decoder = sum(layer.num_weights for layer in architecture.linear)
    head = architecture.vocab_size * architecture.hidden_size
    width = architecture.num_heads * architecture.head_dim
    attention = 2 * architecture.num_layers * setup.length * width  # two products, half of each
    adapter = 0 if setup.method is TrainMethod.full else sum(adapter_tensors(architecture, setup.lora))
    forward = 2 * (decoder + adapter) + attention
    backward = 2 * forward if setup.method is TrainMethod.full else forward + attention + 2 * adapter
    head_passes = 3 if setup.method is TrainMethod.full else 2
    if setup.micro_batch_size * setup.length * architecture.vocab_size > CHUNK_ELEMENTS:
        head_passes += 1
    again = forward if setup.gradient_checkpointing else 0
    return float(forward + backward + again + head_passes * 2 * head)


def disk_bytes(architecture: Architecture, config: RunConfig) -> dict[str, int]:
    """Bytes of what the stages write: `quantized`, `adapter`, `checkpoints`, `merged`."""
    setup = setup_of(config, "cpu", length=config.data.max_length, keeps_quantized=True)
    tensors, dtype = trainable_tensors(architecture, setup), trainable_dtype(setup)
    trained = sum(tensors) * num_bytes(dtype)
    quantized = 0
    if config.quantization.method is not QuantizationMethod.none:
        compute = config.quantization.compute_dtype
        # quantize leaves other weights in their own dtype where compute_dtype is float32
        other = config.model.dtype if compute is Dtype.float32 else compute
        layers = quantized_linear(architecture, config.quantization)
        rest = architecture.num_parameters - sum(layer.num_weights for layer in layers)
        quantized = rest * num_bytes(other) + sum(quantized_bytes(layers, config.quantization))
    copies = 2 if config.train.keep is Keep.best else 1
    states = optimizer_bytes(tensors, dtype, config.train.optimizer, "cpu")
    written = config.runtime.checkpoints_kept + 1  # a new one is whole before the oldest goes
    return {
        "quantized": quantized,
        "adapter": trained,
        "checkpoints": written * (copies * trained + states),
        "merged": architecture.num_parameters * num_bytes(config.merge.dtype),
    }
