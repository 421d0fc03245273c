"""Questions as training put them: a row without its answer, in its chat template, as token ids."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.conversations import Conversation, Document, Unusable, parse_row
from pipeline.encoding import Encoder
from pipeline.errors import DataError
from pipeline.rows import BadRow, RawRow, has_bad_encoding
from pipeline.schema import DataConfig, Shape
from pipeline.templates import PROBE, begin_ids


@dataclass(frozen=True)
class Prompt:
    """A question as the model reads it.

    Attributes:
        row_id: `file:line`.
        text: the question in its chat template, special tokens written out.
        ids: int32 [num_tokens].
        end_id: the token that ends an answer to it in training.
        adapter: which of the adapters is to answer; None: all.
    """

    row_id: str
    text: str
    ids: np.ndarray
    end_id: int
    adapter: str | None


class PromptEncoder:
    """Makes prompts the way prepare does, so that a row of the data gets the ids that training saw.

    Args:
        context: the model's, in tokens; None where it sets no limit.
        plain: text to continue, without the chat template (always so where `data.shape` is text).
        system: takes the place of `data.system_prompt`.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        plain: bool = False,
        system: str | None = None,
    ):
        self._encoder = Encoder(tokenizer, data.max_length, data.too_long, data.text_overlap)
        self._tokenizer = tokenizer
        self._context = context
        self._plain = plain or data.shape is Shape.text
        self._data = dataclasses.replace(data, system_prompt=system or data.system_prompt)

    def encode(self, row: RawRow) -> Prompt:
        """The row's prompt; its own answer, where it has one, is left out.

        Args:
            row: `prompt`, `messages`, or the columns of the training data; `system` and `adapter` where wanted.

        Raises:
            DataError: none of these, an empty or control-token prompt, a template that refuses it, no room to answer.
        """
        where = f"{row.file}:{row.line}"
        adapter = row.fields.get("adapter")
        if not (adapter is None or isinstance(adapter, str)) or has_bad_encoding(row.fields):
            raise DataError(f"{where}: 'adapter' must be a name, and every text UTF-8. Mend the row.")
        try:
            text, ids, end_id = self._encode_plain(row) if self._plain else self._encode_conversation(row)
        except Unusable as error:
            raise DataError(f"{where}: {error.detail}. Mend the prompt.") from None
        if self._context is not None and len(ids) >= self._context:
            raise DataError(
                f"{where}: the prompt has {len(ids):,} tokens and the model's context is {self._context:,}, which has "
                "to hold the answer too. Shorten the prompt."
            )
        return Prompt(where, text, ids, end_id, adapter)

    def _encode_conversation(self, row: RawRow) -> tuple[str, np.ndarray, int]:
        conversation = self._conversation(row)
        self._encoder.template.check_text(conversation)
        layout = self._encoder.template.lay_out(conversation.messages, conversation.tools)[-1]
        tokens = self._encoder.tokenize([layout])[0]
        if tokens is None:
            raise DataError(f"{row.file}:{row.line}: the prompt's last token would merge with any answer. Change it.")
        ids, spans = tokens
        return layout.prompt, np.array(ids[: spans[-1][0]], dtype=np.int32), ids[-1]

    def _conversation(self, row: RawRow) -> Conversation:
        """The row with an answer to look for in the place of its own: prepare's code takes rows with answers."""
        fields, data = dict(row.fields), self._data
        answer = {"role": "assistant", "content": PROBE}
        if "prompt" in fields or "messages" in fields:
            messages = fields.get("messages", [{"role": "user", "content": fields.get("prompt")}])
            if isinstance(messages, list):
                answered = bool(messages) and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
                fields["messages"] = [*(messages[:-1] if answered else messages), answer]
            columns = dataclasses.replace(data.columns, messages="messages")
            data = dataclasses.replace(data, shape=Shape.messages, columns=columns)
        else:
            fields = {data.columns.output: PROBE, data.columns.completion: PROBE, **fields}
        parsed = parse_row(RawRow(row.file, row.line, fields), data)
        if isinstance(parsed, BadRow):
            raise DataError(
                f"{row.file}:{row.line}: {parsed.detail}. A row has `prompt`, `messages`, or the columns of the data "
                f"({data.shape}); this one has {', '.join(row.fields) or 'nothing'}."
            )
        assert isinstance(parsed, Conversation)
        return parsed

    def _encode_plain(self, row: RawRow) -> tuple[str, np.ndarray, int]:
        text = row.fields.get("prompt", row.fields.get(self._data.columns.text))
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{row.file}:{row.line}: no text to continue; without a chat template a row has `prompt`.")
        self._encoder.template.check_text(Document(row.file, row.line, text, ends=False))
        ids = begin_ids(self._tokenizer) + self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return text, np.array(ids, dtype=np.int32), int(self._tokenizer.eos_token_id)
