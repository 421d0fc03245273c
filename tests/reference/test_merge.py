"""The merged folder where neither peft nor bitsandbytes can be imported: plain transformers, equal logits."""

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from pipeline.dataset import load_split
from pipeline.lora import load_adapter
from pipeline.merging import MergeInputs, merge_adapter
from pipeline.quantization import load_training_base, quantize
from pipeline.schema import KeepQuantized, TrainMethod
from tests.standins import CPU, make_model, merge_config, model_config, quantization_config, write_processed

PLAIN = """
import sys

for name in ("peft", "bitsandbytes", "pipeline"):
    sys.modules[name] = None  # not to be imported, and not found where somebody looks whether it is installed
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
assert not any(name.startswith(("peft.", "bitsandbytes.")) for name in sys.modules)
ids = torch.randint(0, 250, (4, 40), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    logits = model(ids, attention_mask=torch.ones_like(ids)).logits
generated = model.generate(ids[:1, :8], max_new_tokens=12, do_sample=False)
save_file({"logits": logits, "generated": generated}, out)
"""


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_merged_folder_needs_plain_transformers_alone(tmp_path: Path, use_dora: bool) -> None:
    make_model(tmp_path / "base")
    processed = write_processed(tmp_path / "processed")
    arguments = (model_config(tmp_path / "base"), quantization_config())
    quantize(*arguments, load_split(processed, "validation"), tmp_path / "q", CPU)
    base = load_training_base(*arguments, TrainMethod.qlora, tmp_path / "q", CPU)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=use_dora)
    adapted = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = MergeInputs(*arguments, TrainMethod.qlora, tmp_path / "q", tmp_path / "adapter", processed)
    merge_adapter(inputs, merge_config(), tmp_path / "merged", CPU)

    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "merged"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr

    kept = load_training_base(*arguments, TrainMethod.qlora, tmp_path / "q", CPU, KeepQuantized.always)
    reference = load_adapter(
        kept, tmp_path / "adapter"
    )  # the adapter as it was trained: on the 4-bit layers themselves
    ids = torch.randint(0, 250, (4, 40), generator=torch.Generator().manual_seed(1))
    result = load_file(out)
    with torch.no_grad():
        expected = reference(ids, attention_mask=torch.ones_like(ids)).logits
        without = reference.get_base_model()
        with reference.disable_adapter():
            base_logits = without(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(result["logits"], expected, rtol=0, atol=2e-4)
    assert (result["logits"] - base_logits).abs().max() > 0.05  # negative control
    generated = reference.generate(ids[:1, :8], max_new_tokens=12, do_sample=False, pad_token_id=256)
    assert torch.equal(result["generated"], generated)


def test_pefts_own_merge_on_4_bit_layers_loses_the_update(tmp_path: Path) -> None:
    """Negative control: why the base is dequantised before the merge."""
    make_model(tmp_path / "base", "mistral")
    processed = write_processed(tmp_path / "processed", 2)
    arguments = (model_config(tmp_path / "base"), quantization_config())
    quantize(*arguments, load_split(processed, "validation"), tmp_path / "q", CPU)
    errors = {}
    for keep in (KeepQuantized.always, KeepQuantized.never):
        base = load_training_base(*arguments, TrainMethod.qlora, tmp_path / "q", CPU, keep)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(base, config).eval()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.002)
        ids = torch.arange(40)[None]
        with torch.no_grad():
            expected = adapted(ids).logits
            errors[keep] = float((adapted.merge_and_unload()(ids).logits - expected).abs().max())
    assert errors[KeepQuantized.never] < 1e-4
    assert errors[KeepQuantized.always] > 10 * errors[KeepQuantized.never]
