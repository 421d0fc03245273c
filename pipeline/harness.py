"""EleutherAI's lm-evaluation-harness on the project's models: public benchmarks, and the test split as a harness task.

    python -m pipeline.harness --tasks local_test,hellaswag --model base --model adapter --limit 100

Consumes: what the chosen models need of data/processed, the base, models/quantized, models/adapter, models/merged.
Produces: metrics/harness.json, reports/harness.

The harness is an optional extra and takes seconds to import: nothing here imports it before it is needed.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline import tracking
from pipeline.config import clean_errors, compose, quiet_logs, to_settings
from pipeline.dataset import Split, load_split
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.files import hash_path, write_json
from pipeline.generation import Model, plain_model, stop_token_ids
from pipeline.harness_scores import Score, as_metrics, as_rows, read_scores, table
from pipeline.harness_tasks import (
    LOCAL,
    LOCAL_TASKS,
    Tasks,
    answered_rows,
    completion_ids,
    first_line,
    write_local_task,
)
from pipeline.project_models import MODELS, ProjectModels
from pipeline.provenance import FILE as PROVENANCE
from pipeline.provenance import check_provenance, write_provenance
from pipeline.runtime import select_device
from pipeline.schema import RunConfig
from pipeline.tokenizer import load_tokenizer, load_tokenizer_folder
from pipeline.workspace import ADAPTER, PROCESSED, Workspace

logger = logging.getLogger(__name__)
INSTALL = "lm-evaluation-harness is not installed. Install it with: pip install -c constraints.txt -e '.[harness]'"


def library_model(model: Model, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The harness's own `HFLM` on a loaded model, with all of its defaults."""
    from lm_eval.models.huggingface import HFLM

    return _quietly(HFLM, pretrained=plain_model(model), tokenizer=tokenizer, batch_size=batch_size)


def local_model(model: Model, tokenizer: PreTrainedTokenizerBase, split: Split, batch_size: int) -> Any:
    """`HFLM` on a loaded model for the local tasks: it is fed the token ids of the split.

    Tokenised again, the text would give others: HFLM moves white space at a prompt's end into the answer (most chat
    templates end a prompt with a newline) and may put a second begin token. Log-softmax is in float32; of prompts
    that leave too little room, HFLM cuts off the beginning, which is refused here.
    """
    from lm_eval.models.huggingface import HFLM

    rows = {split.row_id(i): (split.prompt_ids(i).tolist(), completion_ids(split, i)) for i in answered_rows(split)}
    prompts = {split.prompt(i): split.prompt_ids(i).tolist() for i in answered_rows(split)}

    class LocalLM(HFLM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            encoded = [(request.args, *rows[request.doc["row_id"]]) for request in requests]
            return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

        def tok_batch_encode(
            self, strings: Sequence[str], left_truncate_len: int | None = None, **options: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            ids = [prompts[string] for string in strings]
            longest = max(map(len, ids))
            if left_truncate_len is not None and longest > left_truncate_len:
                raise ConfigError(
                    f"evaluate.max_new_tokens: {self.max_length - left_truncate_len} do not fit beside the longest "
                    f"prompt, {longest} of the model's {self.max_length} tokens, and the harness would cut the "
                    f"prompt. Give evaluate.max_new_tokens={self.max_length - longest} or less."
                )
            padded = self.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
            return padded["input_ids"], padded["attention_mask"]

    options = {"add_bos_token": False, "softmax_dtype": "float32", "batch_size": batch_size}
    return _quietly(LocalLM, pretrained=plain_model(model), tokenizer=tokenizer, **options)


def _quietly(kind: type, **options: Any) -> Any:
    """Without its two warnings that a loaded model is passed, which is how it is meant."""
    noisy = logging.getLogger("lm_eval.models.huggingface")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        return kind(**options)
    finally:
        noisy.setLevel(level)


def measure_tasks(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    split: Split | None,
    batch_size: int,
    limit: int | None,
) -> list[Score]:
    """Every figure of every task and group, in the harness's order.

    Local tasks are answered under a generation config that holds the split's end tokens alone, as in evaluate; the
    harness's own under the model's, as the harness does.

    Args:
        split: the processed test split; needed for local tasks.
        limit: rows of a task; None: all.

    Raises:
        DataError: the harness cannot run a task.
    """
    scores: list[Score] = []
    if tasks.library:
        scores += _evaluate(library_model(model, tokenizer, batch_size), tasks.library, tasks.manager, limit)
    if tasks.local:
        assert split is not None
        plain: Any = plain_model(model)
        inherited = plain.generation_config
        plain.generation_config = GenerationConfig(eos_token_id=stop_token_ids(model, tokenizer, split))
        try:
            scores += _evaluate(local_model(model, tokenizer, split, batch_size), tasks.local, tasks.manager, limit)
        finally:
            plain.generation_config = inherited
    return scores


def _evaluate(lm: Any, tasks: list[Any], manager: Any, limit: int | None) -> list[Score]:
    from lm_eval import simple_evaluate

    try:
        found: Any = simple_evaluate(lm, tasks=tasks, task_manager=manager, limit=limit, log_samples=False)
    except PipelineError:
        raise
    except (ValueError, AssertionError, OverflowError) as error:  # what the harness raises by its own checks
        raise DataError(f"lm-evaluation-harness cannot run these tasks ({first_line(error)}).") from error
    return [score for task, result in found["results"].items() for score in read_scores(task, result)]


def run(config: RunConfig, names: Sequence[str], models: Sequence[str], limit: int | None, output: Path) -> str:
    """Measures the models one after another, writes what was found, logs it; returns the table.

    Raises:
        PipelineError: a task, a model or the data cannot be used.
    """
    workspace = Workspace(Path(config.runtime.inputs_dir), output)
    project = ProjectModels(config, workspace, select_device(config.runtime))
    scores = measure_models(project, names, models, limit)
    _write(scores, config, workspace, limit)
    return table(scores)


def measure_models(
    project: ProjectModels, names: Sequence[str], models: Sequence[str], limit: int | None
) -> dict[str, list[Score]]:
    """What each model does on the named tasks, one model in memory at a time.

    Raises:
        ConfigError: the harness is not installed, or knows no such task.
        PipelineError: a model or the data cannot be used.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(INSTALL)
    config = project.config
    model_folders = {name: project.find(name) for name in models}
    tokenizer = load_tokenizer(config.model)
    split = None
    folder = project.workspace.output("reports/harness/tasks/test.jsonl").parent
    if not set(LOCAL_TASKS).isdisjoint(names):
        processed = project.workspace.input(PROCESSED)
        check_provenance(processed, config.data, config.model)
        split = load_split(processed, "test")
        write_local_task(processed, folder, tokenizer, config.evaluate.max_new_tokens)
    scores: dict[str, list[Score]] = {}
    with _bars(config.runtime.progress):
        tasks = Tasks(names, folder)
        for name in models:
            logger.info("%s: %s", name, ", ".join(names))
            model = project.load(name)
            own = tokenizer
            if name == "merged":  # as whoever gets the folder has it
                own = load_tokenizer_folder(model_folders[name], config.model.trust_remote_code)
            scores[name] = measure_tasks(model, own, tasks, split, config.evaluate.batch_size, limit)
            del model
            gc.collect()
    return scores


@contextlib.contextmanager
def _bars(are_shown: bool) -> Iterator[None]:
    """The harness has no switch for its progress bars."""
    init = tqdm.__init__

    def hidden(bar: Any, *arguments: Any, **options: Any) -> None:
        init(bar, *arguments, **{**options, "disable": True})

    tqdm.__init__ = init if are_shown else hidden
    try:
        yield
    finally:
        tqdm.__init__ = init


def _write(scores: Mapping[str, Sequence[Score]], config: RunConfig, workspace: Workspace, limit: int | None) -> None:
    """metrics/harness.json: numbers by model, task and metric. reports/harness/results.json: all that is known."""
    reports = workspace.output("reports/harness/results.json").parent
    version = importlib.metadata.version("lm_eval")
    write_json(reports / "results.json", {"results": as_rows(scores), "limit": limit, "lm_eval": version})
    write_json(workspace.output("metrics/harness.json"), as_metrics(scores))
    try:
        adapter = workspace.input(ADAPTER)
    except DataError:
        (reports / PROVENANCE).unlink(missing_ok=True)
        logger.info("no adapter here: these figures belong to no MLflow run")
        return
    write_provenance(reports, "harness", config.evaluate, adapter_sha256=hash_path(adapter))
    tracking.record_stage("harness", config.runtime, workspace.outputs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.harness", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", required=True, help=f"names, with commas between; {LOCAL}: the test split")
    parser.add_argument(
        "--model", action="append", choices=MODELS, help="may be given again; default: base and adapter"
    )
    parser.add_argument("--limit", type=int, help="the first rows of each task; default: all")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for metrics/ and reports/; default: here")
    parser.add_argument("overrides", nargs="*", help="settings over params.yaml, such as runtime.device=cpu")
    options = parser.parse_intermixed_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error("--limit: must be 1 or more")
    names = list(dict.fromkeys(name.strip() for name in options.tasks.split(",") if name.strip()))
    if not names:
        parser.error("--tasks: names no task")
    if importlib.util.find_spec("lm_eval") is None:
        print(f"harness: error: {INSTALL}", file=sys.stderr)
        return 2
    quiet_logs()
    with clean_errors("harness"):
        config = to_settings(compose(options.overrides, "locked"))
        models = list(dict.fromkeys(options.model or ("base", "adapter")))
        print(run(config, names, models, options.limit, options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
