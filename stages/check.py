"""Refuse to build from a params.yaml that is not what conf/ composes to.

Consumes: conf/, params.yaml. Produces: reports/check.txt, always the same, which prepare depends on.
Command: python -m stages.check (inside a DVC experiment params.yaml holds the experiment's settings)
"""

import os

from pipeline.config import check_params, clean_errors
from pipeline.files import write_text
from pipeline.workspace import Workspace


def run(workspace: Workspace) -> None:
    if not os.environ.get("DVC_EXP_NAME"):
        check_params()
    write_text(workspace.output("reports/check.txt"), "params.yaml is what conf/ composes to, or a DVC experiment's.\n")


def main() -> None:
    with clean_errors("check"):
        run(Workspace.here())


if __name__ == "__main__":
    main()
