"""Conversations and documents as token ids with completion masks, cut to a maximum length."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.conversations import Conversation, Document, Message, Row, Unusable
from pipeline.dataset import Example
from pipeline.errors import ConfigError
from pipeline.rows import BadRow, Reason
from pipeline.schema import TooLong
from pipeline.splits import bad_row
from pipeline.templates import ChatTemplate, Layout, begin_ids

MIN_MESSAGE_CHARACTERS = 16  # a truncated message keeps at least these; a prompt that needs more cutting is dropped
Tokens = tuple[list[int], list[tuple[int, int]]]  # ids, and the (start, end) token span of each answer


@dataclass
class Encoded:
    """What became of some rows, in their order."""

    examples: list[Example] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    num_truncated: int = 0
    num_unrolled: int = 0


class Encoder:
    """Tokenises rows.

    No special token is added to what the template wrote, so the begin token stands once, and
    `input_ids[:num_prompt_tokens]` is exactly what the generation prompt tokenises to.

    Args:
        max_length: tokens of prompt and completion.
        text_overlap: tokens that two windows of a document share; they are supervised in the first of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, too_long: TooLong, text_overlap: int):
        self.template = ChatTemplate(tokenizer)
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._too_long = too_long
        self._overlap = text_overlap
        self._prefix = begin_ids(tokenizer)
        room = max_length - len(self._prefix)
        if text_overlap >= room:
            raise ConfigError(
                f"data.text_overlap: {text_overlap} must be under {room}, the tokens of text in a window."
            )

    def encode(self, rows: Sequence[Row]) -> Encoded:
        """Examples of the rows; those that cannot be used, or are too long, with their reasons."""
        encoded = Encoded()
        laid: list[tuple[Conversation, Layout]] = []
        for row in rows:
            if isinstance(row, Document):
                encoded.examples += self._windows(row)
                continue
            try:
                layouts = self.template.lay_out(row.messages, row.tools)
            except Unusable as error:
                encoded.bad.append(bad_row(row, error.reason, error.detail))
                continue
            encoded.num_unrolled += len(layouts) > 1
            laid += [(row, layout) for layout in layouts]
        for (row, layout), tokens in zip(laid, self.tokenize([layout for _, layout in laid]), strict=True):
            self._add(encoded, row, layout, tokens)
        return encoded

    def _add(self, encoded: Encoded, row: Conversation, layout: Layout, tokens: Tokens | None) -> None:
        if tokens is None:
            detail = "the answer's first characters merge into the prompt's last token"
            encoded.bad.append(bad_row(row, Reason.prompt_not_prefix, detail))
            return
        if len(tokens[0]) > self._max_length:
            detail = f"{len(tokens[0]):,} tokens"
            shorter = self._truncate(layout, tokens) if self._too_long is TooLong.truncate_prompt else None
            if shorter is None:
                if self._too_long is TooLong.truncate_prompt:
                    detail += "; not enough of them are in user or tool messages to cut it to data.max_length"
                encoded.bad.append(bad_row(row, Reason.too_long, detail))
                return
            encoded.num_truncated += 1
            layout, tokens = shorter
        encoded.examples.append(_example(row, layout, *tokens))

    def tokenize(self, layouts: Sequence[Layout]) -> list[Tokens | None]:
        """Ids and answer spans of each layout; None where an answer's beginning merges into its prompt's last token."""
        texts = []
        for layout in layouts:
            texts += [layout.text[:cut] for span in layout.spans for cut in span]
        distinct = list(dict.fromkeys(texts))
        ids = dict(zip(distinct, self._ids(distinct), strict=True))
        prefixes = iter(ids[text] for text in texts)
        return [self._tokens(layout, [next(prefixes) for _ in range(2 * len(layout.spans))]) for layout in layouts]

    def _tokens(self, layout: Layout, prefixes: list[list[int]]) -> Tokens | None:
        whole = prefixes[-1]
        if any(whole[: len(prefix)] != prefix for prefix in prefixes):
            cuts = [0, *(cut for span in layout.spans for cut in span)]
            pieces = self._ids([layout.text[start:end] for start, end in itertools.pairwise(cuts)])
            joined = [token for piece in pieces for token in piece]
            if self._tokenizer.decode(joined) != self._tokenizer.decode(whole):
                return None  # this tokenizer puts a space before every piece
            lengths = [sum(len(piece) for piece in pieces[: i + 1]) for i in range(len(pieces))]
            prefixes, whole = [joined[:length] for length in lengths], joined
        ends = [len(prefix) for prefix in prefixes]
        return whole, list(zip(ends[::2], ends[1::2], strict=True))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        ids: list[list[int]] = self._tokenizer(list(texts), verbose=False, **options)["input_ids"]
        return ids

    def _truncate(self, layout: Layout, tokens: Tokens) -> tuple[Layout, Tokens] | None:
        """Cuts the middle out of the longest user or tool message until the row fits; None where that cannot be.

        What the template writes, system messages and every answer stay whole.
        """
        if sum(end - start for start, end in tokens[1]) >= self._max_length:
            return None
        while len(tokens[0]) > self._max_length:
            lengths = {i: len(m["content"]) for i, m in enumerate(layout.messages) if m["role"] in ("user", "tool")}
            longest = max(lengths, key=lambda i: lengths[i], default=-1)
            if longest < 0 or lengths[longest] <= MIN_MESSAGE_CHARACTERS:
                return None
            messages = list(layout.messages)
            content = messages[longest]["content"]
            num_tokens = max(1, len(self._ids([content])[0]))
            excess = math.ceil((len(tokens[0]) - self._max_length) * len(content) / num_tokens)
            messages[longest] = {**messages[longest], "content": _cut_middle(content, len(content) - excess)}
            try:
                layout = self._lay_out_again(layout, tuple(messages))
            except Unusable:
                return None
            again = self.tokenize([layout])[0]
            if again is None:
                return None
            tokens = again
        return layout, tokens

    def _lay_out_again(self, layout: Layout, messages: tuple[Message, ...]) -> Layout:
        new = self.template.lay_out(messages, layout.tools, last_only=layout.turn > 0)[-1]
        return Layout(new.messages, new.tools, new.text, new.spans, layout.turn)

    def _windows(self, document: Document) -> list[Example]:
        """The document cut into windows of at most `max_length` tokens; every token is supervised once.

        Each window starts with the begin token where the tokenizer puts one before plain text. The first token of a row
        has no predecessor and is not supervised.
        """
        ids = self._ids([document.text])[0]
        if document.ends:
            ids.append(self._tokenizer.eos_token_id)
        size = self._max_length - len(self._prefix)
        examples: list[Example] = []
        for start in range(0, max(1, len(ids) - self._overlap), size - self._overlap):
            window = ids[start : start + size]
            seen = self._overlap if start else 0
            mask = np.ones(len(self._prefix) + len(window), dtype=np.uint8)
            mask[: max(1, len(self._prefix) + seen)] = 0
            row_id = f"{document.row_id}#{len(examples) + 1}"
            examples.append(Example(row_id, np.array(self._prefix + window, dtype=np.int32), mask, 0, "", []))
        return [example for example in examples if np.any(example.completion_mask)]


def _cut_middle(text: str, length: int) -> str:
    length = max(MIN_MESSAGE_CHARACTERS, length)
    head = math.ceil(length / 2)
    return text[:head] + text[len(text) - (length - head) :]


def _example(row: Conversation, layout: Layout, ids: list[int], spans: list[tuple[int, int]]) -> Example:
    mask = np.zeros(len(ids), dtype=np.uint8)
    for start, end in spans:
        mask[start:end] = 1
    answer = layout.messages[-1]["content"]
    is_last = len(layout.messages) == len(row.messages)
    references = list(row.references) if is_last and row.references else [answer] if answer else []
    if not references:  # a tool call alone: as the template writes it
        references = [layout.text[layout.spans[-1][0] :]]
    row_id = f"{row.row_id}#{layout.turn}" if layout.turn else row.row_id
    return Example(row_id, np.array(ids, dtype=np.int32), mask, spans[-1][0], layout.prompt, references)
