"""Train LoRA (or QLoRA, or every weight) and store the result by its fingerprint.

Consumes: data/processed, the base, models/quantized.
Produces: models/adapter, models/run.json, metrics/train.json, reports/train.
Command: python -m stages.train lora.r=16
On two GPUs: python -m stages.train runtime=ddp runtime.num_processes=2
Several, each trained and evaluated: python -m stages.train -m lora.r=4,8,16
"""

import logging
import sys

from pipeline import launched, launching, tracking
from pipeline.config import stage
from pipeline.errors import PipelineError
from pipeline.fit import check_fit
from pipeline.plots import plot_training_curves, write_training_tables
from pipeline.schema import RunConfig
from pipeline.stored_training import assist, check_inputs, is_stored, train, want
from pipeline.workspace import PROCESSED, Workspace

logger = logging.getLogger(__name__)


def run(config: RunConfig, workspace: Workspace) -> None:
    from pipeline.device_memory import planned_and_measured  # torch: the head of a sweep does without
    from pipeline.ranks import joined
    from pipeline.runtime import select_device

    launched.check_launch(config.runtime)
    check_inputs(config, workspace)
    is_new = not is_stored(config, workspace)
    if is_new and launching.is_wanted(config.runtime):
        folder = f"runtime.output_dir={workspace.outputs}"  # one for all, whatever the clock says
        return launching.launch(config.runtime, "stages.train", [*sys.argv[1:], folder])
    device = select_device(config.runtime, one_of_several=True)
    with joined(device, config.runtime) as ranks:
        if is_new:
            # of several processes each looks at its own GPU
            check_fit(config, workspace.input(PROCESSED))
        if not ranks.is_main:
            return assist(config, workspace, device, ranks)
        (trained,) = train([want(config, workspace)], device, ranks)
    if isinstance(trained, PipelineError):
        raise trained
    metrics, history = trained.result["metrics"], trained.result["history"]
    if "planned_memory_bytes" in metrics:
        logger.info("peak memory: %s", planned_and_measured(metrics))
    reports = workspace.output("reports/train/curves.png").parent
    write_training_tables(history, reports)
    plot_training_curves(history, reports / "curves.png")
    tracking.record_stage("train", config.runtime, workspace.outputs)


main = stage(run, "train")

if __name__ == "__main__":
    main()
