"""The doctor on torch, bitsandbytes and peft, tried on the device itself.

Run by the doctor in a process of its own, since a kernel that does not fit a device may end the process:
`python -m pipeline.doctor_device auto` (or cpu, cuda) prints each finding as a line of JSON.
"""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.doctor_refusal import REMEDY, ROOT, Finding, Patient, open_gpus
from pipeline.errors import PipelineError

TRIAL_SECONDS = 180.0  # imports on a cold disk, and CUDA's start
STEP_ERROR = 0.05  # of three 8-bit AdamW steps, relative to the way that fp32 went; measured on a CPU: 0.008
BITSANDBYTES = ("bitsandbytes", "8-bit optimizer", "peft")
DRIVER = Path("/proc/driver/nvidia/version")


def check_device(patient: Patient) -> Iterator[Finding]:
    """The trials of `main` in a child, and what became of it."""
    device = str(patient.config.runtime.device) if patient.config else "auto"
    command = [sys.executable, "-m", "pipeline.doctor_device", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_SECONDS, cwd=ROOT)
        output, code, error = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as late:
        output, code = (late.stdout or b"").decode(), None
        error = f"no end after {TRIAL_SECONDS:.0f} s"
    for line in output.splitlines():
        if line.startswith("{"):
            finding = Finding(**json.loads(line))
            unused = finding.name in BITSANDBYTES and finding.status == "fail" and not _needs_bitsandbytes(patient)
            yield dataclasses.replace(finding, status="warn") if unused else finding
    if code != 0:
        last = (error.strip().splitlines() or ["no message"])[-1]
        how = f"ended by {signal.Signals(-code).name}" if code is not None and code < 0 else last
        remedy = f"run `{' '.join(command)}` to see where; reinstall torch and bitsandbytes for this machine"
        yield Finding("fail", f"the trial on the device broke: {how}", remedy, "device")


def check_processes(patient: Patient) -> Iterator[Finding]:
    """Processes of the training on this machine against its GPUs, where it uses any: one process a GPU."""
    if patient.config is None:
        return
    import torch

    runtime = patient.config.runtime
    here = runtime.num_processes // runtime.num_machines
    text = f"{here} of the training ({runtime.engine}) on this machine"
    gpus = 0 if runtime.device == "cpu" else torch.cuda.device_count()
    if not gpus:  # where one is asked for or lies idle, the check of the GPU says it
        yield Finding("ok", f"{text}, on the CPU")
    elif here > gpus:
        remedy = f"set runtime.num_processes={gpus * runtime.num_machines}, or look at CUDA_VISIBLE_DEVICES"
        yield Finding("fail", f"{text}, and torch finds {gpus} GPUs here: one process a GPU", remedy)
    elif runtime.num_processes == 1 and runtime.engine != "ddp":
        remedy = f"set runtime.num_processes={gpus}" if gpus > 1 else "set runtime.engine=ddp, or take several GPUs"
        yield Finding("warn", f"{text}: one process alone cuts nothing", remedy)
    else:
        yield Finding("ok", f"{text}, one a GPU; torch finds {gpus}")


def _needs_bitsandbytes(patient: Patient) -> bool:
    config = patient.config
    return config is None or config.quantization.method != "none" or config.train.optimizer != "adamw"


def main(arguments: Sequence[str]) -> None:
    """Prints each finding as soon as there is one: those before a crash are not lost."""
    device = find_device(arguments[0])
    for name, trial in TRIALS.items():
        try:
            findings = list(trial(device))
        except Exception as error:  # a library that does not fit raises anything, from ImportError to NameError
            findings = [_broken(error)]
        for finding in findings:
            print(json.dumps(dataclasses.asdict(dataclasses.replace(finding, name=name))), flush=True)


def _broken(error: Exception) -> Finding:
    lines = (str(error).strip() or "no message").splitlines()
    text = str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {lines[0]}"
    return Finding("fail", text, f"install the versions of constraints.txt ({REMEDY}), or see `python -m bitsandbytes`")


def find_device(asked: str) -> str:
    import torch

    return "cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu"


def try_torch(device: str) -> Iterator[Finding]:
    """torch's build against the driver and the card."""
    import torch

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    about = f"torch {torch.__version__} ({build})"
    if device == "cpu":
        yield Finding("ok", f"{about} on the CPU, {torch.get_num_threads()} threads")
        if Path("/proc/driver/nvidia/gpus").is_dir() and not open_gpus():
            text = "this machine has an NVIDIA GPU that this process may not open"
            yield Finding("warn", text, "in a container: start it with `--gpus all`; in a job: ask for a GPU")
        return
    driver = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", DRIVER.read_text()) if DRIVER.exists() else None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        found = f"{about} with driver {driver[1] if driver else 'unknown'} does not start: {reason}"
        yield Finding(
            "fail", found, "update the driver, or install the torch build for the CUDA that it can (`nvidia-smi`)"
        )
        return
    for index in range(torch.cuda.device_count()):
        capability, archs = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
        card = torch.cuda.get_device_properties(index)
        text = f"{about}, driver {driver[1] if driver else 'unknown'}, {card.name}, {card.total_memory / 1e9:.0f} GB"
        if not runs_on(capability, archs):
            found = f"{text}: compute capability {capability[0]}.{capability[1]} is not among {', '.join(archs)}"
            yield Finding("fail", found, "install a torch build that has it (https://pytorch.org/get-started)")
            continue
        yield Finding("ok", text)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            text = f"{card.name} computes bfloat16 by emulation, slowly"
            yield Finding("warn", text, "model.dtype=float16 quantization.compute_dtype=float16, or a card from 8.0 on")


def runs_on(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Whether a build for these architectures has code for the card: binaries run within one major version, upwards;
    PTX (`compute_`) runs on everything newer; a letter (`sm_90a`) means that architecture alone (CUDA's documentation).
    """
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if match is None:
            continue
        made = (int(match[2]), int(match[3]))
        same_major = made[0] == capability[0] and made <= capability
        if made == capability or (not match[4] and (same_major if match[1] == "sm" else made <= capability)):
            return True
    return False


def try_bitsandbytes(device: str) -> Iterator[Finding]:
    """A quantise-dequantise round trip and a product, against fp32."""
    import torch

    from pipeline.bnb import bnb, check_bitsandbytes

    check_bitsandbytes(torch.device(device))
    yield Finding("ok", f"bitsandbytes {bnb.__version__} on {device}: NF4 round trip and product agree with fp32")


def try_optimizer(device: str) -> Iterator[Finding]:
    """Three steps of 8-bit AdamW against torch's; 8192 weights, since under 4096 bitsandbytes keeps fp32 states."""
    import torch

    from pipeline.bnb import bnb

    start = torch.randn(8192, generator=torch.Generator().manual_seed(0)).to(device)
    moved, states = [], []
    for make in (torch.optim.AdamW, bnb.optim.AdamW8bit):
        weight = torch.nn.Parameter(start.clone())
        optimizer = make([weight], lr=1e-2, weight_decay=0.0)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            weight.grad = torch.randn(8192, generator=generator).to(device)
            optimizer.step()
        moved.append((weight.detach() - start).float())
        states.append({state.dtype for state in optimizer.state[weight].values() if torch.is_tensor(state)})
    error = float((moved[1] - moved[0]).norm() / moved[0].norm())
    remedy = "set train.optimizer=adamw, or install another bitsandbytes"
    if not error < STEP_ERROR or torch.uint8 not in states[1]:
        yield Finding("fail", f"three 8-bit AdamW steps on {device} are off by {error:.1%} of fp32's", remedy)
    else:
        yield Finding("ok", f"three 8-bit AdamW steps on {device} within {error:.1%} of fp32's")


def try_peft(device: str) -> Iterator[Finding]:
    """LoRA by peft on a 4-bit layer: its forward against the layer's own and the product by hand."""
    import torch

    from pipeline.bnb import bnb, protect_from_repacking  # isort: split

    import peft  # after bitsandbytes, see pipeline.bnb

    torch.manual_seed(0)
    model: Any = torch.nn.Module()
    model.is_loaded_in_4bit = True  # what transformers sets, and peft looks at
    layer = bnb.nn.Linear4bit(128, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    model.proj = layer.to(device)
    protect_from_repacking(model)
    x_BI = torch.randn(8, 128, device=device)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["proj"], init_lora_weights=False)
    versions = f"peft {peft.__version__} with bitsandbytes {bnb.__version__} on {device}"
    with torch.no_grad():
        base_BO = model.proj(x_BI)
        peft.inject_adapter_in_model(settings, model)
        adapted = model.eval().proj
        a_RI, b_OR = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
        added_BO = 2 * x_BI @ a_RI.T @ b_OR.T  # lora_alpha / r = 2
        error = float((adapted(x_BI) - base_BO - added_BO).norm() / added_BO.norm())
    if not isinstance(adapted, peft.tuners.lora.Linear4bit) or not error < 1e-2:
        remedy = "install the two that constraints.txt pins"
        yield Finding(
            "fail", f"{versions}: LoRA on a 4-bit layer is off by {error:.1e} ({type(adapted).__name__})", remedy
        )
    else:
        yield Finding("ok", f"{versions}: LoRA on a 4-bit layer is the layer and 2 B A x")


def try_attention(device: str) -> Iterator[Finding]:
    """What the engine's attention on a CPU is compiled with, and its result against torch's."""
    import torch

    from pipeline import native_attention

    if device != "cpu":
        return
    try:
        native_attention.compile_kernel(8, torch.float32)
    except native_attention.CannotCompile as error:
        found = f"attention is torch's, up to 5 times as slow as the engine's own: {error}"
        yield Finding("warn", found, "install a C compiler with OpenMP (`apt install gcc`), or set CC to one")
        return
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 40, 8) for _ in range(3))
    found_BNHD = native_attention.attend(query, key, value, None, 0.3)
    expected_BHND = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    distance = float((found_BNHD.transpose(1, 2) - expected_BHND).abs().max())
    if not distance < 1e-4:
        yield Finding("fail", f"compiled attention is off by {distance:.1e}", "set CC to another C compiler")
    else:
        yield Finding("ok", f"compiled, within {distance:.0e} of torch's")


def try_layers(device: str) -> Iterator[Finding]:
    """A Llama's norms, SwiGLU and rotary embeddings in C against torch's, with their gradients."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline import native_layers

    if device != "cpu":
        return
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 5}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).requires_grad_(False)
    inputs_BNX = torch.randn(2, 9, 40, requires_grad=True)

    def computed() -> torch.Tensor:
        logits_BNV = model(inputs_embeds=inputs_BNX, use_cache=False).logits
        (gradient_BNX,) = torch.autograd.grad((logits_BNV**2).sum(), inputs_BNX)
        return torch.cat([logits_BNV, gradient_BNX / gradient_BNX.abs().max()], dim=-1)

    with native_layers.native_layers(model) as number:
        found = computed()
    if not native_layers.is_compiled():
        found_none = "norms, SwiGLU and rotary embeddings are torch's, which takes longer: nothing was compiled"
        yield Finding("warn", found_none, "install a C compiler with OpenMP (`apt install gcc`), or set CC to one")
    elif number != 5:  # three norms, an MLP and the rotation
        yield Finding("fail", f"{5 - number} of 5 compiled layers are not torch's", "set CC to another C compiler")
    elif not (distance := float((found - computed()).detach().abs().max())) < 1e-5:
        yield Finding("fail", f"compiled layers are off by {distance:.1e}", "set CC to another C compiler")
    else:
        yield Finding("ok", f"norms, SwiGLU, rotary embeddings compiled, within {distance:.0e} of torch's")


TRIALS: dict[str, Callable[[str], Iterator[Finding]]] = {
    "torch": try_torch,
    "bitsandbytes": try_bitsandbytes,
    "8-bit optimizer": try_optimizer,
    "peft": try_peft,
    "attention": try_attention,
    "layers": try_layers,
}

if __name__ == "__main__":
    main(sys.argv[1:])
