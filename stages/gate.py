"""Judge the finished model by `gate.conditions`; fails when one is missed, after every other output is committed.

Consumes: metrics/evaluate.json, metrics/merge.json. Produces: metrics/gate.json.
Command: python -m stages.gate gate=improvement
In a DVC experiment (DVC_EXP_NAME is set there and only there) a missed condition is recorded in `gate.passed` and the
stage succeeds: DVC drops an experiment that fails, and a sweep's weak points are results too.
"""

import dataclasses
import logging
import os

from pipeline import tracking
from pipeline.config import stage
from pipeline.errors import GateError
from pipeline.files import hash_file, read_json, write_json
from pipeline.gates import gate_metrics, judge, table
from pipeline.schema import RunConfig
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)
INPUTS = ("metrics/evaluate.json", "metrics/merge.json")


def run(config: RunConfig, workspace: Workspace) -> None:
    evaluate, merge = (workspace.input(name) for name in INPUTS)
    verdicts = judge(config.gate.conditions, gate_metrics(read_json(evaluate), read_json(merge)))
    num_missed = sum(not verdict.passed for verdict in verdicts)
    result = {
        "passed": num_missed == 0,
        "num_conditions": len(verdicts),
        "num_missed": num_missed,
        "conditions": [dataclasses.asdict(verdict) for verdict in verdicts],
        # what was judged, for tracking; pairs, because DVC would show an object's values as metrics
        "inputs": [[name, hash_file(path)] for name, path in zip(INPUTS, (evaluate, merge), strict=True)],
    }
    write_json(workspace.output("metrics/gate.json"), result)
    tracking.record_stage("gate", config.runtime, workspace.outputs)
    if not verdicts:
        logger.info("gate: passed (gate.conditions is empty)")
    elif not num_missed:
        logger.info("gate: passed\n%s", table(verdicts))
    elif os.environ.get("DVC_EXP_NAME"):
        logger.warning("gate: not passed; recorded, the experiment is kept\n%s", table(verdicts))
    else:
        raise GateError(
            f"{num_missed} of {len(verdicts)} conditions missed:\n{table(verdicts)}\n"
            "Every output is made and kept. Train a better adapter, or change gate.conditions in conf/gate."
        )


main = stage(run, "gate")

if __name__ == "__main__":
    main()
