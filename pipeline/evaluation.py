"""What a model is worth on the processed test split: loss, perplexity, task scores, and loss on general text."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.dataset import Split, load_split
from pipeline.generation import Model, generate_answers, plain_model, stop_token_ids
from pipeline.losses import measure_loss
from pipeline.schema import EvaluateConfig
from pipeline.scoring import exact_match, rouge_l, task_scores

logger = logging.getLogger(__name__)


def evaluate_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    processed_folder: Path,
    evaluate: EvaluateConfig,
    *,
    name: str,
    progress: bool,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The model's scores, and one object a test row with its answer.

    Args:
        name: what logs and progress bars call the model.

    Returns:
        Scores: `loss` (nats per supervised token), `perplexity`, `num_tokens`; `exact_match` and `rouge_l` (0 to 1) and
        `bleu` (0 to 100) where answers were generated; `general_loss`, `general_num_tokens`. Settings and data alone
        decide which keys there are, so all models have the same.
        Rows: `row_id`, `prompt`, `references`, `prediction`, `ended` (a stop token came), `exact_match`, `rouge_l`.

    Raises:
        DataError: a split is missing or has no supervised token.
    """
    pad_token_id = int(tokenizer.pad_token_id)
    test = load_split(processed_folder, "test").head(evaluate.max_rows)
    measured = measure_loss(model, test, evaluate.batch_size, pad_token_id, progress)
    scores: dict[str, float] = {
        "loss": measured.loss,
        "perplexity": measured.perplexity,
        "num_tokens": measured.num_tokens,
    }
    rows = answer_rows(model, tokenizer, test, evaluate, name=name, progress=progress) if evaluate.generate else []
    if rows:
        scores |= task_scores([row["prediction"] for row in rows], [row["references"] for row in rows])
    else:
        why = "no test row has a prompt and a reference" if evaluate.generate else "evaluate.generate is false"
        logger.info("%s: no task scores, %s", name, why)
    general = load_split(processed_folder, "general").head(evaluate.general_max_rows)
    measured = measure_loss(model, general, evaluate.batch_size, pad_token_id, progress)
    scores |= {"general_loss": measured.loss, "general_num_tokens": measured.num_tokens}
    logger.info("%s: %s", name, ", ".join(f"{key} {value:.5g}" for key, value in scores.items()))
    return scores, rows


def answer_rows(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    evaluate: EvaluateConfig,
    *,
    name: str,
    progress: bool,
) -> list[dict[str, Any]]:
    """Greedy answers to the rows that have a prompt and a reference, each with its own scores."""
    indices = [i for i in range(len(split)) if split.references(i) and len(split.prompt_ids(i))]
    if not indices:
        return []
    if len(indices) < len(split):
        logger.info(
            "%s: %d of %d test rows, without reference, not scored", name, len(split) - len(indices), len(split)
        )
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
        text = str(tokenizer.decode(answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()
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


def forgetting(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """How much the loss on general text rose, in nats a token; under 0: it fell."""
    return after["general_loss"] - before["general_loss"]
