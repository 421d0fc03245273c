"""How the MLflow UI first shows the adapters: a saved view with the columns and the chart that sweeps are judged by."""

import json
from typing import Any

KEY = "adapters"
LOSS = "evaluate.adapter.loss"
AXES = ("lora.r", "lora.lora_alpha", "train.learning_rate")
CURVES = ("validation.loss", "train.loss", "train.grad_norm", "train.learning_rate")
SECTIONS = ("Settings and test loss", "Training")
LINE = {  # MLflow's own defaults of such a chart
    "lineSmoothness": 0,
    "scaleType": "linear",
    "xAxisScaleType": "linear",
    "xAxisKey": "step",
    "selectedXAxisMetricKey": "",
    "yAxisKey": "metric",
    "yAxisExpressions": [],
    "range": {},
    "ignoreOutliers": False,
    "useGlobalXaxisKey": True,
    "useGlobalLineSmoothing": True,
}
WIDTHS = {  # of the columns, in pixels and from left to right: their titles are not cut
    "attributes.`Run Name`": 330,
    "runDateAndNestInfo": 130,
    "tags.`point`": 70,
    "params.`lora.r`": 70,
    "params.`lora.lora_alpha`": 130,
    "params.`lora.target_modules`": 160,
    "params.`train.learning_rate`": 145,
    "params.`train.seed`": 90,
    f"metrics.`{LOSS}`": 165,
    "metrics.`train.validation_loss`": 155,
    "metrics.`evaluate.adapter.exact_match`": 220,
    "metrics.`evaluate.adapter.rouge_l`": 185,
    "metrics.`evaluate.adapter.bleu`": 170,
    "metrics.`evaluate.forgetting`": 150,
    "metrics.`train.trainable_parameters`": 200,
    "metrics.`train.duration_seconds`": 185,
    "metrics.`merge.mean_kl`": 120,
    "metrics.`gate.passed`": 100,
    "params.`train.method`": 110,
    "tags.`failure`": 300,
}
FIXED = ("attributes.`Run Name`", "runDateAndNestInfo")  # cannot be left out


def experiment_tags() -> dict[str, str]:
    """Tags of an experiment: what kind it is, and the view (MLflow reads the state of its run table as JSON).

    Sorted by date, the table nests children under their parents; by a column, all runs are one list.
    """
    charts = [
        _chart("PARALLEL", SECTIONS[0], selectedParams=list(AXES), selectedMetrics=[LOSS], showAllRuns=True),
        *(_chart("LINE", SECTIONS[1], metricKey=key, selectedMetricKeys=[key]) for key in CURVES),
    ]
    view = {
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "searchFilter": "",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [column for column in WIDTHS if column not in FIXED],
        "columnOrder": list(WIDTHS),
        "columnWidths": WIDTHS,
        "compareRunCharts": charts,
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": False, "deleted": False, "isGenerated": False}
            for name in SECTIONS
        ],
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsHiddenMode": "FIRST_20_RUNS",  # in charts of curves; MLflow's own default is 10
        "runListHidden": False,
        "viewMaximized": True,
        "groupBy": None,
        "groupsExpanded": {},
    }
    return {"mlflow.experimentKind": "custom_model_development", f"mlflow.sharedViewState.{KEY}": json.dumps(view)}


def _chart(kind: str, section: str, **content: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": f"{section}-{kind}-{content.get('metricKey', '')}",
        "metricSectionId": section,
        "isGenerated": False,
        "deleted": False,
        **content,
        **(LINE if kind == "LINE" else {}),
    }


def address(server: str, experiment_id: str) -> str:
    """The page of the project's adapters."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?viewStateShareKey={KEY}"
