"""Fail when the model missed `gate.conditions`; runs last, when every other output is committed.

Consumes: metrics/gate.json (of the report stage).
Command: python -m stages.gate
In a DVC experiment (DVC_EXP_NAME is set there and only there) a missed condition is recorded in `gate.passed` and the
stage succeeds: DVC drops an experiment that fails, and a sweep's weak points are results too.
"""

import logging
import os

from pipeline.config import stage
from pipeline.errors import GateError
from pipeline.files import read_json
from pipeline.gates import Outcome, Verdict, table
from pipeline.schema import Inconclusive, RunConfig
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)


def run(config: RunConfig, workspace: Workspace) -> None:
    result = read_json(workspace.input("metrics/gate.json"))
    verdicts = [Verdict(**found | {"outcome": Outcome(found["outcome"])}) for found in result["conditions"]]
    if not verdicts:
        logger.info("gate: passed (gate.conditions is empty)")
    elif result["passed"]:
        warns = result["num_inconclusive"] and config.gate.inconclusive is Inconclusive.warn
        log = logger.warning if warns else logger.info
        log("gate: passed, %d of %d inconclusive\n%s", result["num_inconclusive"], len(verdicts), table(verdicts))
    elif os.environ.get("DVC_EXP_NAME"):
        logger.warning("gate: not passed; recorded, the experiment is kept\n%s", table(verdicts))
    else:
        raise GateError(
            f"{result['num_failed']} of {len(verdicts)} conditions failed, {result['num_inconclusive']} inconclusive "
            f"(gate.inconclusive: {config.gate.inconclusive}):\n{table(verdicts)}\n"
            "Every output is made and kept; see reports/evaluate/index.html. Train a better adapter, test on more "
            "rows, or change gate.conditions in conf/gate."
        )


main = stage(run, "gate")

if __name__ == "__main__":
    main()
