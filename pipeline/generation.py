"""Greedy answers to many prompts: left-padded batches of prompts of similar length.

`generate` of transformers does the decoding, so that every architecture's cache, positions and masks are its own.
What a model folder's `generation_config.json` may bring along (sampling, a repetition penalty, forced tokens, a
maximum length) is kept out: every model is asked the same question in the same way.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.dataset import Split

if TYPE_CHECKING:  # importing peft imports bitsandbytes, which pipeline.bnb has to do
    from peft import PeftModel

Model = Union[PreTrainedModel, "PeftModel"]  # as it is, or with an adapter


@dataclass(frozen=True)
class Answer:
    """Attributes:
    ids: the generated tokens, the stop token left off.
    ended: a stop token came; False: cut off by `max_new_tokens` or by the end of the context.
    """

    ids: list[int]
    ended: bool


def stop_token_ids(model: Model, tokenizer: PreTrainedTokenizerBase, split: Split) -> list[int]:
    """Every token that ends an answer, ascending.

    The tokenizer's end token, those of the model's generation config (instruction-tuned models name several), and
    special tokens that end rows of the split: an end-of-turn token that a chat template writes and neither names.
    """
    stops = {tokenizer.eos_token_id}
    configured = plain_model(model).generation_config.eos_token_id
    stops.update(configured if isinstance(configured, list) else [configured])
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for row in range(len(split)):
        supervised = split.input_ids(row)[split.completion_mask(row) == 1]
        if supervised.size and int(supervised[-1]) in special:
            stops.add(int(supervised[-1]))
    return sorted(stops - {None})


def plain_model(model: Model) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper (its layers hold the adapter); any other model itself."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped


def generate_answers(
    model: Model,
    prompts: Sequence[np.ndarray],
    *,
    stop_ids: list[int],
    pad_token_id: int,
    max_new_tokens: int,
    batch_size: int,
    context: int | None,
    progress: str | None = None,
) -> list[Answer]:
    """Greedy answers, in the order of the prompts.

    Batching changes speed only: prompts are padded on the left under an attention mask, and a row is never cut
    because a longer one stands beside it.

    Args:
        prompts: token ids, int [length] each.
        context: the model's longest sequence; a prompt that leaves less room than `max_new_tokens` gets what is left.
        progress: what the progress bar says; None: no bar.
    """
    plain = plain_model(model)
    was_training = plain.training
    plain.eval()
    answers: list[Answer | None] = [None] * len(prompts)
    batches = list(_batches([len(prompt) for prompt in prompts], max_new_tokens, batch_size, context))
    bar = tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False, unit="row")
    with torch.no_grad(), _no_inherited_generation_config(plain), bar:
        for rows, room in batches:
            generated = _generate([prompts[row] for row in rows], plain, stop_ids, pad_token_id, room)
            for row, ids in zip(rows, generated, strict=True):
                answers[row] = _until_stop(ids, set(stop_ids))
            bar.update(len(rows))
    plain.train(was_training)
    return [answer for answer in answers if answer is not None]


def _batches(
    lengths: list[int], max_new_tokens: int, batch_size: int, context: int | None
) -> Iterator[tuple[list[int], int]]:
    """Rows, longest first, that have equal room for new tokens; and that room."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batch: list[int] = []
    room = max_new_tokens
    for row in order:
        left = max_new_tokens if context is None else min(max_new_tokens, context - lengths[row])
        if batch and (len(batch) == batch_size or left != room):
            yield batch, room
            batch = []
        room = left
        batch.append(row)
    if batch:
        yield batch, room


def _generate(
    prompts: list[np.ndarray], model: Any, stop_ids: list[int], pad_token_id: int, room: int
) -> list[list[int]]:
    """The new tokens of each prompt, padding and all; nothing where there is no room."""
    if room < 1:
        return [[] for _ in prompts]
    longest = max(len(prompt) for prompt in prompts)
    input_ids_BT = torch.full((len(prompts), longest), pad_token_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    for i, prompt in enumerate(prompts):
        input_ids_BT[i, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        attention_mask_BT[i, longest - len(prompt) :] = 1
    settings = GenerationConfig(
        max_new_tokens=room, do_sample=False, use_cache=True, eos_token_id=stop_ids or None, pad_token_id=pad_token_id
    )
    output_BT = model.generate(
        input_ids=input_ids_BT.to(model.device),
        attention_mask=attention_mask_BT.to(model.device),
        generation_config=settings,
    )
    return output_BT[:, longest:].tolist()


def _until_stop(ids: list[int], stop_ids: set[int]) -> Answer:
    for position, token_id in enumerate(ids):
        if token_id in stop_ids:
            return Answer(ids[:position], ended=True)
    return Answer(ids, ended=False)


@contextmanager
def _no_inherited_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills whatever its own config leaves unset from the model's: for its time, there is nothing there."""
    inherited = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = inherited
