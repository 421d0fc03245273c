"""Train LoRA (or QLoRA, or every weight) and store the result by its fingerprint.

Consumes: data/processed, the base, models/quantized.
Produces: models/adapter, models/run.json, metrics/train.json, reports/train.
Command: python -m stages.train lora.r=16
Several, each trained and evaluated: python -m stages.train -m lora.r=4,8,16
"""

from pipeline import tracking
from pipeline.config import stage
from pipeline.errors import PipelineError
from pipeline.fit import check_fit
from pipeline.plots import plot_training_curves, write_training_tables
from pipeline.runtime import select_device
from pipeline.schema import RunConfig
from pipeline.stored_training import check_inputs, train, want
from pipeline.workspace import PROCESSED, Workspace


def run(config: RunConfig, workspace: Workspace) -> None:
    check_fit(config, workspace.input(PROCESSED))
    device = select_device(config.runtime)
    check_inputs(config, workspace)
    (trained,) = train([want(config, workspace)], device)
    if isinstance(trained, PipelineError):
        raise trained
    history, reports = trained.result["history"], workspace.output("reports/train/curves.png").parent
    write_training_tables(history, reports)
    plot_training_curves(history, reports / "curves.png")
    tracking.record_stage("train", config.runtime, workspace.outputs)


main = stage(run, "train")

if __name__ == "__main__":
    main()
