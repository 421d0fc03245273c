"""Merge the adapter into its base, prove it, and score what was saved.

Consumes: the base, models/quantized, models/adapter, data/processed.
Produces: models/merged (a plain Hugging Face folder), metrics/merge.json.
Command: python -m stages.merge merge.dtype=bfloat16
"""

from pipeline import tracking
from pipeline.config import stage
from pipeline.evaluation import evaluate_model
from pipeline.files import hash_path, write_json
from pipeline.merging import MergeInputs, merge_adapter
from pipeline.modeling import load_model_folder
from pipeline.provenance import check_provenance, write_provenance
from pipeline.runtime import select_device, torch_dtype
from pipeline.schema import RunConfig, TrainMethod
from pipeline.tokenizer import load_tokenizer_folder
from pipeline.workspace import ADAPTER, MERGED, PROCESSED, QUANTIZED, Workspace


def run(config: RunConfig, workspace: Workspace) -> None:
    device = select_device(config.runtime)
    processed, quantized, adapter = (workspace.input(name) for name in (PROCESSED, QUANTIZED, ADAPTER))
    check_provenance(processed, config.data, config.model)
    check_provenance(adapter, config.train, config.lora, config.quantization, config.model, config.data)
    if config.train.method is TrainMethod.qlora:
        check_provenance(quantized, config.model, config.quantization)
    inputs = MergeInputs(config.model, config.quantization, config.train.method, quantized, adapter, processed)
    merged = workspace.output(MERGED)
    metrics = merge_adapter(inputs, config.merge, merged, device, config.runtime.progress)
    attention, trusts = str(config.model.attn_implementation), config.model.trust_remote_code
    model = load_model_folder(merged, device, torch_dtype(config.merge.dtype), attention, trusts)
    scores, _ = evaluate_model(
        model,
        load_tokenizer_folder(merged, trusts),
        processed,
        config.evaluate,
        name="merged",
        progress=config.runtime.progress,
    )
    write_provenance(merged, "merge", config.merge, adapter_sha256=hash_path(adapter))
    write_json(workspace.output("metrics/merge.json"), {**metrics, "merged": scores})
    tracking.record_stage("merge", config.runtime, workspace.outputs)


main = stage(run, "merge")

if __name__ == "__main__":
    main()
