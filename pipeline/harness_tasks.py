"""Tasks for lm-evaluation-harness: the test split as one of them, and the harness's own, found by name.

Nothing here imports the harness before it is needed.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from pipeline.dataset import Split, load_split
from pipeline.errors import ConfigError, DataError
from pipeline.files import write_jsonl, write_text

logger = logging.getLogger(__name__)
LOCAL = "local_test"
LOCAL_TASKS = (LOCAL, f"{LOCAL}_generate", f"{LOCAL}_loglikelihood")


def write_local_task(
    processed: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, name: str = LOCAL
) -> None:
    """Writes the test split's rows that have a prompt and a reference as two tasks that the harness reads offline.

    `NAME_generate`: greedy answers to the training prompts, exact match with a reference. `NAME_loglikelihood`: the
    row's last completion, its end token included, given all before it. The tag NAME stands for both.

    Args:
        processed: folder of the processed splits.
        tokenizer: writes the completion's ids as text.
        max_new_tokens: of an answer.

    Raises:
        DataError: the split is missing, or no row has a prompt and a reference.
    """
    split = load_split(processed, "test")
    indices = answered_rows(split)
    rows = [
        {
            "row_id": split.row_id(i),
            "prompt": split.prompt(i),
            "completion": tokenizer.decode(completion_ids(split, i), clean_up_tokenization_spaces=False),
            "references": split.references(i),
            "num_tokens": len(completion_ids(split, i)),
        }
        for i in indices
    ]
    write_jsonl(folder / "test.jsonl", rows)
    shared = {
        "tag": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / "test.jsonl").resolve())}},
        "test_split": "test",
        "doc_to_text": "prompt",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    ends = r"\A\s+|\s+\Z"  # as pipeline.scoring.exact_match: white space at both ends apart
    generate = {
        "task": f"{name}_generate",
        "output_type": "generate_until",
        "doc_to_target": "references",
        "generation_kwargs": {"until": [], "max_gen_toks": max_new_tokens, "do_sample": False},
        "metric_list": [_metric("exact_match", "mean", True) | {"regexes_to_ignore": [ends]}],
    }
    loglikelihood = {
        "task": f"{name}_loglikelihood",
        "output_type": "loglikelihood",
        "doc_to_target": "completion",
        "metric_list": [
            _metric("nats", "mean", False),
            _metric("token_perplexity", "weighted_perplexity", False),
            _metric("acc", "mean", True),
        ],
    }
    scorer = "process_results: !function pipeline.harness_tasks.score_completion\n"  # a tag of the harness's own YAML
    for task, code in ((generate, ""), (loglikelihood, scorer)):
        write_text(folder / f"{task['task']}.yaml", yaml.safe_dump(shared | task, sort_keys=False) + code)


def _metric(metric: str, aggregation: str, higher_is_better: bool) -> dict[str, Any]:
    return {"metric": metric, "aggregation": aggregation, "higher_is_better": higher_is_better}


def score_completion(row: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """What the harness aggregates of a row: its nats, (log-likelihood, tokens), whether greedy decoding gives it.

    The harness's own `perplexity` is of whole answers and overflows beyond 709 nats; this one is of tokens.
    """
    [(log_likelihood, is_greedy)] = results
    return {
        "nats": -log_likelihood,
        "token_perplexity": (log_likelihood, row["num_tokens"]),
        "acc": int(is_greedy),
    }


def answered_rows(split: Split) -> list[int]:
    """Indices of the rows that have a prompt and a reference. Raises: DataError: there is none."""
    indices = [i for i in range(len(split)) if split.references(i) and len(split.prompt_ids(i))]
    if not indices:
        raise DataError(f"split {split.name}: no row has a prompt and a reference (plain text?). Leave {LOCAL} out.")
    if len(indices) < len(split):
        logger.info("%d of %d test rows, without prompt or reference, left out", len(split) - len(indices), len(split))
    return indices


def completion_ids(split: Split, row: int) -> list[int]:
    """What stands after the row's prompt: the last answer and its end token."""
    return split.input_ids(row)[split.num_prompt_tokens(row) :].tolist()


class Tasks:
    """Harness tasks, found by name, their data read.

    Attributes:
        local: those of the local folder.
        library: the harness's own.

    Raises:
        ConfigError: a name that the harness does not know; the message gives the nearest.
        DataError: a task's data cannot be had.
    """

    def __init__(self, names: Sequence[str], folder: Path):
        from lm_eval.tasks import TaskManager

        self.manager = TaskManager(include_path=str(folder), include_defaults=False)
        local = set(self.manager.all_tasks)
        if not local.issuperset(names):
            self.manager = TaskManager(include_path=str(folder))  # reads 13,000 files
        known = self.manager.all_tasks
        unknown = [f"{name}: {_nearest(name, [*LOCAL_TASKS, *known])}" for name in names if name not in known]
        if unknown:
            raise ConfigError("--tasks: the harness has no such task\n  " + "\n  ".join(unknown))
        self.local = [task for name in names if name in local for task in self._load(name)]
        self.library = [task for name in names if name not in local for task in self._load(name)]

    def _load(self, name: str) -> list[Any]:
        try:
            loaded: Any = self.manager.load([name])
        except Exception as error:  # a task's code and `datasets` raise whatever they like
            raise DataError(
                f"task {name}: its data cannot be had ({first_line(error)}). Offline, only what is in the cache of "
                f"`datasets` can be read: run this task once with network and without HF_HUB_OFFLINE, or leave it out."
            ) from None
        return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them all"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
