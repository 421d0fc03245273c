"""The adapter into its base: summed in fp32, compared with the adapter before anything is saved, saved plain.

peft's own merge on a 4-bit layer rounds the sum back to 4 bits and loses nearly all of the update; here the base is
dequantised once and plain, so that W' = W + scaling B A (with DoRA, its norm too) is plain fp32 arithmetic.
"""

import dataclasses
import gc
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.batching import Batch
from pipeline.bnb import bnb
from pipeline.errors import ModelError, ParityError
from pipeline.lora import load_adapter
from pipeline.model_files import written_folder
from pipeline.modeling import load_model, load_model_folder, load_tokenizer, quiet_transformers
from pipeline.parity import (
    Parity,
    check_differs,
    check_parity,
    collect_logits,
    compare,
    parity_batches,
    parity_loss,
    token_logits,
)
from pipeline.quantization import load_training_base, num_bytes
from pipeline.runtime import torch_dtype
from pipeline.schema import (
    KeepQuantized,
    MergeBase,
    MergeConfig,
    ModelConfig,
    QuantizationConfig,
    TrainMethod,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MergeInputs:
    """What a merge is made of.

    Attributes:
        quantized: folder of the quantised base (read with train.method=qlora alone).
        adapter: PEFT folder; with train.method=full a whole model.
        processed: splits that parity is measured on.
    """

    model: ModelConfig
    quantization: QuantizationConfig
    method: TrainMethod
    quantized: Path
    adapter: Path
    processed: Path


def merge_adapter(
    inputs: MergeInputs, merge: MergeConfig, folder: Path, device: torch.device, progress: bool = False
) -> dict[str, Any]:
    """Writes the merged model, whole or not at all; returns parity and cast figures.

    Raises:
        ParityError: a limit is missed on the training base, the merged model is the base, or what was saved is not it.
        ModelError: a folder that cannot be used, or too little memory or disk.
    """
    try:
        return _merge_adapter(inputs, merge, folder, device, progress)
    except ParityError:
        shutil.rmtree(folder, ignore_errors=True)  # an older merge would look like this one, finished
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"merge: the base in fp32 does not fit on {device} ({str(error).splitlines()[0]}). Merge in main memory: "
            "`python -m stages.merge runtime.device=cpu`, or set runtime.device in conf/runtime."
        ) from None


def _merge_adapter(
    inputs: MergeInputs, merge: MergeConfig, folder: Path, device: torch.device, progress: bool
) -> dict[str, Any]:
    tokenizer = load_tokenizer(inputs.model)
    batches = parity_batches(inputs.processed, merge.parity_num_tokens, tokenizer.pad_token_id)
    if inputs.method is TrainMethod.full:
        merged, merge_base, judged = _load_full(inputs, device), "none", False  # nothing is summed
        base = load_model(inputs.model, device).float()
        from_base = compare(collect_logits(base, batches, "the base", progress), merged, batches, progress)
        del base
        parity = compare(collect_logits(merged, batches, "the trained model", progress), merged, batches, progress)
    else:
        merged, parity, from_base, merge_base, judged = _merge_lora(inputs, merge, batches, device, progress)
    if judged:
        check_parity(parity, merge)
    check_differs(from_base)
    _check_plain(merged)
    cast = _save(merged, tokenizer, merge, folder, batches, device, inputs.model.trust_remote_code)
    logger.info("merged into %s base: mean_kl %.2e, top1 %.6f", merge_base, parity.mean_kl, parity.top1_agreement)
    return {
        "method": str(inputs.method),
        "merge_base": merge_base,
        "parity_judged": judged,
        "max_abs_logit_diff": parity.max_abs_logit_diff,
        "mean_kl": parity.mean_kl,
        "top1_agreement": parity.top1_agreement,
        "parity_num_tokens": parity.num_tokens,
        "base_mean_kl": from_base.mean_kl,
        "base_max_abs_logit_diff": from_base.max_abs_logit_diff,
        "dtype": str(merge.dtype),
        **cast,
    }


def _load_full(inputs: MergeInputs, device: torch.device) -> PreTrainedModel:
    if not (inputs.adapter / "config.json").is_file():
        raise ModelError(f"{inputs.adapter}: holds no whole model, as train.method=full makes. Train again.")
    return load_model_folder(
        inputs.adapter, device, torch.float32, str(inputs.model.attn_implementation), inputs.model.trust_remote_code
    )


def _merge_lora(
    inputs: MergeInputs, merge: MergeConfig, batches: list[Batch], device: torch.device, progress: bool
) -> tuple[PreTrainedModel, Parity, Parity, str, bool]:
    """The merged fp32 model, its parity with the adapter, its distance from its base, its base's name, if judged.

    One model is held at a time; reference logits wait in main memory.
    """
    is_quantized = inputs.method is TrainMethod.qlora
    into_other = is_quantized and merge.base is MergeBase.original
    base = load_training_base(
        inputs.model, inputs.quantization, inputs.method, inputs.quantized, device, KeepQuantized.never
    ).float()
    base_logits = collect_logits(base, batches, "the base", progress)
    model = load_adapter(base, inputs.adapter).float()
    adapter_logits = collect_logits(model, batches, "the adapter", progress)
    if into_other:
        del model, base
        gc.collect()
        base = load_model(inputs.model, device, torch.float32)
        base_logits = collect_logits(base, batches, "the original base", progress)
        model = load_adapter(base, inputs.adapter).float()
    try:
        merged = model.merge_and_unload(safe_merge=True, progressbar=progress)
    except ValueError as error:
        raise ParityError(f"{inputs.adapter}: the merged weights are not finite ({error}). Train again.") from None
    parity = compare(adapter_logits, merged, batches, progress)
    from_base = compare(base_logits, merged, batches, progress)
    name = "dequantized" if is_quantized and not into_other else "original"
    return merged.eval(), parity, from_base, name, not into_other


def _check_plain(merged: PreTrainedModel) -> None:
    """Raises: ParityError: something of peft or bitsandbytes is left on the model (a bug)."""
    foreign = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    for name, module in merged.named_modules():
        if isinstance(module, foreign) or type(module).__module__.startswith(("peft.", "bitsandbytes.")):
            raise ParityError(
                f"{name}: still a {type(module).__name__} after merging. Report this with lora.* and versions."
            )
    if getattr(merged.config, "quantization_config", None) is not None:
        raise ParityError("config.quantization_config is still set after merging. Report this.")


def _save(
    merged: PreTrainedModel,
    tokenizer: Any,
    merge: MergeConfig,
    folder: Path,
    batches: list[Batch],
    device: torch.device,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Casts and saves, loads the result again, and measures what the cast costs; `merged` is cast in place."""
    dtype = torch_dtype(merge.dtype)
    before = parity_loss(merged, batches)
    expected = token_logits(merged, batches[0])
    merged.to(dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    broken = [name for name, p in merged.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise ParityError(f"{broken[0]}: not finite in {merge.dtype}. Set merge.dtype to bfloat16 or float32.")
    merged.config.dtype = dtype
    merged.__dict__.pop("_hf_peft_config_loaded", None)
    if merged.generation_config is not None and merged.generation_config.pad_token_id is None:
        merged.generation_config.pad_token_id = tokenizer.pad_token_id
    with written_folder(folder, num_bytes(merged)) as temporary:
        with quiet_transformers():
            merged.save_pretrained(temporary, max_shard_size=merge.max_shard_size)
            tokenizer.save_pretrained(temporary)
        reloaded = load_model_folder(temporary, device, dtype, trust_remote_code=trust_remote_code)
        after = parity_loss(reloaded, batches)
        changed = float((token_logits(reloaded, batches[0]) - expected).abs().max())
        if dtype is torch.float32 and not changed <= 1e-4:
            raise ParityError(f"{folder}: logits of the saved model differ by {changed:.2e} from those before saving.")
    return {"loss_before_cast": before, "loss_after_cast": after, "cast_loss_difference": after - before}
