"""How the MLflow UI first shows the adapters: a saved view whose columns are what a sweep is judged by."""

import json

KEY = "adapters"
PARAMS = ("train.method", "lora.r", "lora.lora_alpha", "lora.target_modules", "train.learning_rate")
METRICS = (
    "evaluate.adapter.loss",
    "evaluate.adapter.exact_match",
    "evaluate.adapter.rouge_l",
    "evaluate.forgetting",
    "merge.mean_kl",
    "gate.passed",
)


def experiment_tags() -> dict[str, str]:
    """Tags of a new experiment: what kind it is, and the view (MLflow reads the state of its run table as JSON)."""
    columns = [f"metrics.`{name}`" for name in METRICS] + [f"params.`{name}`" for name in PARAMS]
    view = {
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "searchFilter": "",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runListHidden": False,
        "viewMaximized": True,
        "groupBy": None,
        "groupsExpanded": {},
    }
    return {"mlflow.experimentKind": "custom_model_development", f"mlflow.sharedViewState.{KEY}": json.dumps(view)}


def address(server: str, experiment_id: str) -> str:
    """The page of the project's adapters."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?viewStateShareKey={KEY}"
