"""Attention over rows that lie end to end in one long row without padding; no row sees another.

Padding is often a third of a batch's tokens. One dense attention over the long row would cost its length squared, so
every row gets its own; everything else in the model runs once over all tokens.

Shape suffixes: H heads, N tokens of all rows, D head dimension.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from pipeline import native_attention
from pipeline.batching import Batch, pack_rows, pad_rows

try:
    from torch.nn.attention import varlen
except ImportError:  # torch before 2.10
    varlen = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
NAME = "packed_sdpa"
UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask")  # what some architectures want of attention beside scaling
VARLEN_ARGUMENTS = set(inspect.signature(varlen.varlen_attn).parameters) if varlen is not None else set()
PROBE_LENGTHS = (5, 9, 3)
_windows_seen: set[int | None] = set()  # that attention was called with since it was cleared


def packed_sdpa(
    module: torch.nn.Module,
    query_1HND: torch.Tensor,
    key_1HND: torch.Tensor,
    value_1HND: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row by itself, [1, N, H, D]; transformers' signature of an attention function.

    Args:
        cu_seq_lens_q: int32 [rows + 1], where the rows begin and end. None: a batch of rows of one length (or padded on
            the right, which causal attention does not see).

    Raises:
        NotImplementedError: the architecture wants what is not done here.
    """
    _windows_seen.add(sliding_window)
    wanted = [name for name in UNKNOWN if others.get(name) is not None]
    if wanted or attention_mask is not None:
        raise NotImplementedError(f"packed attention knows no {wanted[0] if wanted else 'attention mask'}")
    longest = max_length_q or query_1HND.shape[2]  # at least
    is_windowed = longest > (sliding_window or longest)
    if not dropout and not is_windowed and native_attention.takes(query_1HND, key_1HND, value_1HND, longest):
        scale = query_1HND.shape[-1] ** -0.5 if scaling is None else scaling
        return native_attention.attend(query_1HND, key_1HND, value_1HND, cu_seq_lens_q, scale), None
    has_groups = query_1HND.shape[1] != key_1HND.shape[1]
    if cu_seq_lens_q is None:
        output = _attend(query_1HND, key_1HND, value_1HND, dropout, scaling, sliding_window, has_groups)
        return output.transpose(1, 2).contiguous(), None
    if query_1HND.is_cuda and _varlen_takes(query_1HND, dropout, has_groups):
        query_NHD, key_NHD, value_NHD = (t[0].transpose(0, 1) for t in (query_1HND, key_1HND, value_1HND))
        arguments: dict[str, Any] = {"enable_gqa": True} if has_groups else {}
        output_NHD: Any = varlen.varlen_attn(
            query_NHD, key_NHD, value_NHD, cu_seq_lens_q, cu_seq_lens_q, longest, longest,
            scale=scaling, window_size=(sliding_window - 1 if sliding_window else -1, 0), **arguments,
        )  # fmt: skip
        return output_NHD.unsqueeze(0), None
    lengths = cu_seq_lens_q.diff().tolist()
    rows = zip(*(t.split(lengths, dim=2) for t in (query_1HND, key_1HND, value_1HND)), strict=True)
    outputs = [_attend(q, k, v, dropout, scaling, sliding_window, has_groups) for q, k, v in rows]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _varlen_takes(query: torch.Tensor, dropout: float, has_groups: bool) -> bool:
    wanted = {"window_size", "scale"} | ({"enable_gqa"} if has_groups else set())
    return query.dtype in (torch.bfloat16, torch.float16) and not dropout and wanted <= VARLEN_ARGUMENTS


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    has_groups: bool,
) -> torch.Tensor:
    length = query.shape[2]
    band = None
    if sliding_window is not None and length > sliding_window:
        ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
        band = ones.tril().triu(1 - sliding_window)
    return F.scaled_dot_product_attention(
        query, key, value, band, dropout, is_causal=band is None, scale=scaling, enable_gqa=has_groups
    )


AttentionInterface.register(NAME, packed_sdpa)  # without a mask function: it needs no mask


@contextmanager
def packed_attention(model: torch.nn.Module) -> Iterator[bool]:
    """Has the model take packed batches while inside; says whether it does, after trying it on a few tokens.

    With `sdpa` the model's attention is changed for the time; `eager` does not pack.
    """
    inner = inner_model(model)
    config: Any = inner.config.get_text_config()
    before = config._attn_implementation
    if before not in ("sdpa", NAME):
        logger.info("rows are padded: attention is %s, which does not pack", before)
        yield False
        return
    if before == NAME:
        yield True
        return
    expected = _probe(model, packed=False)
    config._attn_implementation = NAME
    try:
        problem = _problem(model, expected)
        if problem:
            config._attn_implementation = before
            logger.warning("rows are padded, which is slower: packed, %s", problem)
        yield problem is None
    finally:
        config._attn_implementation = before


def _problem(model: torch.nn.Module, expected: torch.Tensor) -> str | None:
    """What keeps the model from taking packed rows: an error, or logits that are not those of the rows alone."""
    _windows_seen.clear()
    try:
        found = _probe(model, packed=True)
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        return f"the model fails ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    if not agree(model, found, expected):
        return "its logits are not those of the rows alone"
    return _window_in_the_mask(inner_model(model).config.get_text_config())


def _window_in_the_mask(config: Any) -> str | None:
    """A window that attention is not told of, which the probe's short rows cannot show: no mask is made here."""
    chunk, window = getattr(config, "attention_chunk_size", None), getattr(config, "sliding_window", None)
    if chunk is not None:
        return f"its attention in chunks of {chunk} tokens is done by a mask"
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and window not in _windows_seen and "sliding_attention" in layers:
        return f"its window of {window} tokens is done by a mask"
    return None


@torch.no_grad()
def _probe(model: torch.nn.Module, packed: bool) -> torch.Tensor:
    """float32 logits of all tokens of a few made-up rows, [tokens, vocabulary]."""
    batch = probe_batch(model, packed)
    with eval_mode(model):
        logits = model(**model_inputs(batch)).logits
    return (logits[0] if batch.attention_mask is None else logits[batch.attention_mask.bool()]).float()


def probe_batch(model: torch.nn.Module, packed: bool) -> Batch:
    """A few made-up rows, all supervised, on the model's device: to see whether two ways of computing agree."""
    vocabulary = inner_model(model).config.get_text_config().vocab_size
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, vocabulary, length) for length in PROBE_LENGTHS]
    masks = [np.ones(length, dtype=bool) for length in PROBE_LENGTHS]
    batch = pack_rows(rows, masks) if packed else pad_rows(rows, masks, 0)
    return batch.to(next(model.parameters()).device)


def agree(model: torch.nn.Module, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two ways to the same logits differ by rounding alone: 1e-4 of the largest in fp32, 2e-2 below."""
    autocasts = hasattr(model, "_original_forward")  # accelerate's mark
    is_fp32 = not autocasts and all(p.dtype is torch.float32 for p in model.parameters())
    limit = (1e-4 if is_fp32 else 2e-2) * float(expected.abs().max())
    return found.shape == expected.shape and float((found - expected).abs().max()) <= limit


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """No dropout while inside; the mode before comes back, also after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def inner_model(model: torch.nn.Module) -> Any:
    """The transformers model inside what wraps it for several processes (DDP) or for an adapter (PEFT)."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The batch as a causal language model of transformers takes it."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.cu_seq_lens is None:
        return inputs | {"attention_mask": batch.attention_mask}
    ends = {"cu_seq_lens_q": batch.cu_seq_lens, "cu_seq_lens_k": batch.cu_seq_lens}
    lengths = {"max_length_q": batch.max_length, "max_length_k": batch.max_length}
    return inputs | {"position_ids": batch.position_ids} | ends | lengths
