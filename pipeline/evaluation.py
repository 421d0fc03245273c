"""What a model is worth on the processed test split: loss, perplexity, task scores, and loss on general text."""

import hashlib
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.contamination import contaminated, overlaps
from pipeline.dataset import Split, load_split
from pipeline.errors import ModelError
from pipeline.evidence import Evidence, ModelItems, join_items
from pipeline.files import write_jsonl
from pipeline.generation import Model, answer_text, generate_answers, plain_model, stop_token_ids
from pipeline.losses import measure_rows
from pipeline.schema import EvaluateConfig
from pipeline.scoring import answer_sums, exact_match, rouge_l

logger = logging.getLogger(__name__)
Answer = dict[str, Any]


def evaluate_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    processed_folder: Path,
    evaluate: EvaluateConfig,
    *,
    name: str,
    progress: bool,
) -> ModelItems:
    """What the model does on every row of the test split and of the general text.

    Args:
        name: what logs and progress bars call the model.

    Returns:
        Sums by row of `loss` (nats and supervised tokens), of `exact_match`, `rouge_l` and `bleu` where answers were
        generated, and of `general_loss`. Settings and data alone decide which there are, so all models have the same.
        Answers: `row_id`, `prompt`, `references`, `prediction`, `ended` (a stop token came), `exact_match`, `rouge_l`.

    Raises:
        DataError: a split is missing or has no supervised token.
        ModelError: a loss is NaN or infinite.
    """
    pad_token_id = int(tokenizer.pad_token_id)
    test = load_split(processed_folder, "test").head(evaluate.max_rows)
    nats = measure_rows(model, test, evaluate.batch_size, pad_token_id, progress)
    items = [_item(test, i, _cluster(test, i), "loss", nats) for i in range(len(test))]
    _check_finite(nats, test, name)
    answers = answer_rows(model, tokenizer, test, evaluate, name=name, progress=progress) if evaluate.generate else []
    if answers:
        by_row = {answer["row_id"]: answer for answer in answers}
        for item in items:
            answer = by_row.get(item["row_id"], {"prediction": "", "references": []})
            item["sums"] |= answer_sums(answer["prediction"], answer["references"])
    else:
        why = "no test row has a prompt and a reference" if evaluate.generate else "evaluate.generate is false"
        logger.info("%s: no task scores, %s", name, why)
    general = load_split(processed_folder, "general").head(evaluate.general_max_rows)
    nats = measure_rows(model, general, evaluate.batch_size, pad_token_id, progress)
    _check_finite(nats, general, name)
    general_items = [_item(general, i, general.row_id(i), "general_loss", nats) for i in range(len(general))]
    found = ModelItems(items, general_items, answers)
    scores = Evidence(join_items({name: found}), num_resamples=1).values(name)
    logger.info("%s: %s", name, ", ".join(f"{key} {value:.5g}" for key, value in scores.items()))
    return found


def _check_finite(nats: np.ndarray, split: Split, name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(nats))
    if len(bad):
        raise ModelError(
            f"{name}: the loss of {len(bad)} of {len(split)} {split.name} rows is not finite, first of "
            f"{split.row_id(int(bad[0]))}: the model overflows. Set model.dtype and quantization.compute_dtype to "
            "bfloat16 or float32; if it is the adapter alone, train again with a lower train.learning_rate."
        )


def _item(split: Split, row: int, cluster: str, score: str, nats: np.ndarray) -> dict[str, Any]:
    sums = {score: [float(nats[row]), int(split.num_supervised[row])]}
    return {"row_id": split.row_id(row), "cluster": cluster, "sums": sums}


def _cluster(split: Split, row: int) -> str:
    """What names the row's prompt; a row without one stands alone."""
    prompt = split.prompt(row)
    return hashlib.sha256(prompt.encode()).hexdigest()[:16] if prompt else split.row_id(row)


def answer_rows(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    evaluate: EvaluateConfig,
    *,
    name: str,
    progress: bool,
) -> list[Answer]:
    """Greedy answers to the rows that have a prompt and a reference, each with its own scores."""
    indices = [i for i in range(len(split)) if split.references(i) and len(split.prompt_ids(i))]
    if not indices:
        return []
    if len(indices) < len(split):
        logger.info(
            "%s: %d of %d test rows, without reference, not scored", name, len(split) - len(indices), len(split)
        )
    longest = max(int(split.completion_mask(i)[split.num_prompt_tokens(i) :].sum()) - 1 for i in indices)  # but its end
    if longest > evaluate.max_new_tokens:
        logger.warning(
            "%s: right answers have up to %d tokens, and evaluate.max_new_tokens is %d: what is longer is cut, and "
            "scores are too low. Raise it.", name, longest, evaluate.max_new_tokens,
        )  # fmt: skip
    answers = generate_answers(
        model,
        [split.prompt_ids(i) for i in indices],
        stop_ids=stop_token_ids(model, tokenizer, split),
        pad_token_id=int(tokenizer.pad_token_id),
        max_new_tokens=evaluate.max_new_tokens,
        batch_size=evaluate.batch_size,
        context=getattr(plain_model(model).config.get_text_config(), "max_position_embeddings", None),
        progress=f"answers of {name}" if progress else None,
    )
    num_cut = sum(not answer.ended for answer in answers)
    if num_cut:
        limit = f"evaluate.max_new_tokens ({evaluate.max_new_tokens}) or the end of the context"
        logger.info("%s: %d of %d answers were cut off by %s", name, num_cut, len(answers), limit)
    rows = []
    for i, answer in zip(indices, answers, strict=True):
        text = answer_text(tokenizer, answer.ids)
        references = split.references(i)
        rows.append(
            {
                "row_id": split.row_id(i),
                "prompt": split.prompt(i),
                "references": references,
                "prediction": text,
                "ended": answer.ended,
                "exact_match": exact_match(text, references),
                "rouge_l": rouge_l(text, references),
            }
        )
    return rows


def measure_contamination(processed_folder: Path, evaluate: EvaluateConfig, path: Path) -> dict[str, int]:
    """Writes what each test row shares with the training rows, a line a row, and warns before anyone believes a score.

    Returns:
        `num_rows`, `num_seen` (prompt and answer share `evaluate.contamination_share` or more of their n-grams) and
        `num_exact`.
    """
    test = load_split(processed_folder, "test").head(evaluate.max_rows)
    found = overlaps(test, load_split(processed_folder, "train"), evaluate.contamination_ngram)
    rows = [{**asdict(overlap), "seen": contaminated(overlap, evaluate.contamination_share)} for overlap in found]
    write_jsonl(path, rows)
    num_seen, num_exact = (sum(bool(row[key]) for row in rows) for key in ("seen", "is_exact"))
    if num_seen:
        logger.warning(
            "%d of %d test rows were seen in training (%d exactly): prompt and answer share %.0f %% or more of their "
            "n-grams of %d tokens with it. Their scores measure memory: see %s",
            num_seen, len(rows), num_exact, 100 * evaluate.contamination_share, evaluate.contamination_ngram, path,
        )  # fmt: skip
    return {"num_rows": len(rows), "num_seen": num_seen, "num_exact": num_exact}
