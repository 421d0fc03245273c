"""Train and evaluate one point of a sweep, as the sweep does it.

Consumes: what DVC has of the project's own data and base (made where it is not there).
Produces: in a folder of its own under outputs: point.json, models/adapter, metrics, reports.
Command: python -m stages.point lora.r=4 train.seed=1
Many of them: python -m stages.train -m lora.r=4,8 train.seed=0,1
"""

import dataclasses
import shlex
import sys

from pipeline import tracking
from pipeline.config import stage
from pipeline.errors import PipelineError
from pipeline.point_worker import run_job
from pipeline.points import Point, State, link_inputs
from pipeline.schema import RunConfig
from pipeline.shared_inputs import SharedInputs
from pipeline.workspace import Workspace


def run(config: RunConfig, workspace: Workspace) -> None:
    runtime = dataclasses.replace(config.runtime, inputs_dir=str(workspace.outputs))  # where models/run.json is
    overrides = [argument for argument in sys.argv[1:] if not argument.startswith(("-", "hydra"))]
    command = shlex.join(["python", "-m", "stages.point", *overrides])
    point = Point(workspace.outputs, 0, overrides, {}, command, dataclasses.asdict(config))
    point.save()
    shared = SharedInputs()
    inputs = shared.of([point])[0]
    if isinstance(inputs, PipelineError):
        raise inputs
    link_inputs(point.folder, inputs.processed, inputs.quantized)
    run_job([point.folder], fused=False)
    shared.close()
    point = Point.load(point.folder)
    if point.state is not State.finished:
        raise PipelineError(point.reason or str(point.state))
    for name in ("train", "evaluate"):
        tracking.record_stage(name, runtime, workspace.outputs)


main = stage(run, "point")

if __name__ == "__main__":
    main()
