"""Train LoRA (or QLoRA, or every weight) and store the result by its fingerprint.

Consumes: data/processed, the base, models/quantized.
Produces: models/adapter, models/run.json, metrics/train.json, reports/train.
Command: python -m stages.train lora.r=16
"""

import logging

from pipeline import store, tracking
from pipeline.checkpoints import Checkpoints
from pipeline.config import stage
from pipeline.files import hash_path, write_json, write_jsonl
from pipeline.finetuning import finetune
from pipeline.fingerprint import fingerprint, training_inputs
from pipeline.lora import copy_folder
from pipeline.modeling import hash_model
from pipeline.plots import plot_training_curves, write_training_tables
from pipeline.provenance import check_provenance, write_provenance
from pipeline.runtime import select_device
from pipeline.schema import RunConfig, TrainMethod
from pipeline.workspace import ADAPTER, PROCESSED, QUANTIZED, RUN, Workspace

logger = logging.getLogger(__name__)


def run(config: RunConfig, workspace: Workspace) -> None:
    device = select_device(config.runtime)
    processed, quantized = workspace.input(PROCESSED), workspace.input(QUANTIZED)
    check_provenance(processed, config.data, config.model)
    is_qlora = config.train.method is TrainMethod.qlora
    if is_qlora:
        check_provenance(quantized, config.model, config.quantization)
    base_hash = hash_path(quantized) if is_qlora else hash_model(config.model)
    data_hash = "".join(hash_path(processed / f"{split}.arrow") for split in ("train", "validation"))
    inputs = training_inputs(config, base_hash, data_hash)
    key = fingerprint(inputs)
    record = tracking.training_record(config, key, inputs, processed)
    reports = workspace.output("reports/train/history.jsonl").parent
    with store.locked(key) as folder, tracking.open_run(record, config.runtime) as live:
        runtime = config.runtime
        checkpoints = Checkpoints(folder / "checkpoints", runtime.checkpoint_steps, runtime.checkpoints_kept)
        result = store.finished(folder)
        if result is not None:
            logger.info("taken from .training/%s: these settings, data, base and code were trained before", key[:12])
        else:
            target = store.new_adapter_folder(folder)
            metrics, history = finetune(config, processed, quantized, target, checkpoints, device, live.log)
            result = {"metrics": metrics, "history": history, "inputs": inputs}
            store.finish(folder, result)
        checkpoints.clear()  # a finished one may have been killed before this line
        adapter = workspace.output(ADAPTER)
        copy_folder(folder / "adapter", adapter)
        groups = (config.train, config.lora, config.quantization, config.model, config.data)
        write_provenance(adapter, "train", *groups, base_sha256=base_hash, data_sha256=inputs["data"])
        run_id = live.close(system_file=reports / "system.jsonl")
    write_json(workspace.output("metrics/train.json"), {**result["metrics"], "fingerprint": key})
    write_jsonl(reports / "history.jsonl", result["history"])
    write_training_tables(result["history"], reports)
    plot_training_curves(result["history"], reports / "curves.png")
    tracking.write_run(record, run_id, workspace.output(RUN))
    tracking.record_stage("train", config.runtime, workspace.outputs)


main = stage(run, "train")

if __name__ == "__main__":
    main()
