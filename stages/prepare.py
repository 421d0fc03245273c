"""Raw data to tokenised splits.

Consumes: data.path, data.general_path, the base's tokenizer.
Produces: data/processed/ (an Arrow file a split, provenance.json), reports/prepare/ (quarantine.jsonl, lengths.csv),
metrics/prepare.json.

    python -m stages.prepare data=local data.path=/data/support data.files.train=answers.jsonl
"""

import logging

from pipeline.config import stage
from pipeline.files import write_json
from pipeline.fit import check_fit
from pipeline.modeling import check_model, load_tokenizer, max_context
from pipeline.preparation import Outputs, prepare
from pipeline.provenance import write_provenance
from pipeline.schema import RunConfig
from pipeline.workspace import PROCESSED, Workspace

logger = logging.getLogger(__name__)


def run(config: RunConfig, workspace: Workspace) -> None:
    check_fit(config)
    check_model(config.model)
    tokenizer = load_tokenizer(config.model)
    outputs = Outputs(
        processed=workspace.output(PROCESSED),
        quarantine=workspace.output("reports/prepare/quarantine.jsonl"),
        lengths=workspace.output("reports/prepare/lengths.csv"),
    )
    runtime = config.runtime
    metrics = prepare(config.data, tokenizer, max_context(config.model), outputs, runtime.num_workers, runtime.progress)
    write_provenance(outputs.processed, "prepare", config.data, config.model)
    write_json(workspace.output("metrics/prepare.json"), metrics)
    for name in ("train", "validation", "test", "general"):
        split = metrics[name]
        logger.info("%s: %s rows, %s tokens", name, f"{split['num_rows']:,}", f"{split['num_tokens']:,}")
    if metrics["num_quarantined"]:
        logger.info("quarantined: %s rows, see %s", f"{metrics['num_quarantined']:,}", outputs.quarantine)


main = stage(run, "prepare")

if __name__ == "__main__":
    main()
