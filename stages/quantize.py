"""Quantise the base once, and say what it costs.

Consumes: the base, data/processed (its validation split).
Produces: models/quantized, metrics/quantize.json, reports/quantize/layers.csv.
Command: python -m stages.quantize quantization=nf4
"""

import csv
import io

from pipeline.config import stage
from pipeline.dataset import load_split
from pipeline.files import write_json, write_text
from pipeline.fit import check_fit
from pipeline.provenance import check_provenance
from pipeline.quantization import quantize
from pipeline.quantized_layers import LayerError
from pipeline.runtime import select_device
from pipeline.schema import RunConfig
from pipeline.workspace import PROCESSED, QUANTIZED, Workspace


def run(config: RunConfig, workspace: Workspace) -> None:
    check_fit(config, loads_base=True)
    device = select_device(config.runtime)
    processed = workspace.input(PROCESSED)
    check_provenance(processed, config.data, config.model)
    validation = load_split(processed, "validation")
    metrics, layers = quantize(
        config.model, config.quantization, validation, workspace.output(QUANTIZED), device, config.runtime.progress
    )
    write_json(workspace.output("metrics/quantize.json"), metrics)
    write_text(workspace.output("reports/quantize/layers.csv"), _table(layers))


def _table(layers: list[LayerError]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "num_parameters", "bits_per_parameter", "relative_error"])
    writer.writerows(
        [x.layer, x.num_parameters, f"{x.bits_per_parameter:.4f}", f"{x.relative_error:.6f}"] for x in layers
    )
    return text.getvalue()


main = stage(run, "quantize")

if __name__ == "__main__":
    main()
