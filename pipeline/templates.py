"""Conversations as text by the chat template, with the characters that the model has to produce.

Real templates rarely say which part is the answer, so it is derived from what they render. An answer is what the whole
adds to the generation prompt (the turns before it, rendered with `add_generation_prompt`), up to and with the first
token that ends a turn. What a template writes after that token (a newline, mostly) is its own and is never supervised.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.conversations import Document, Message, Row, Unusable, digest
from pipeline.errors import ModelError
from pipeline.rows import Reason

logger = logging.getLogger(__name__)
# Templates that write today's date would make other tokens every day: they get the one that Llama 3's falls back to.
DATE = datetime(2024, 7, 26, 12)
DATE_CODES = ("%d", "%-d", "%b", "%B", "%m", "%Y", "%y", "%a", "%A", "%H", "%I", "%M", "%S", "%p", "%j")
PROBE = "An answer to look for."


@dataclass(frozen=True)
class Layout:
    """A rendered conversation.

    Attributes:
        messages: what was rendered; its last turn is an answer.
        text: up to and with the last answer's end token, special tokens written out.
        spans: (start, end) characters of each supervised answer, its end token included; the last ends the text.
        turn: which answer of the row this is, from 1, where a row makes several layouts; else 0.
    """

    messages: tuple[Message, ...]
    tools: list[Any] | None
    text: str
    spans: tuple[tuple[int, int], ...]
    turn: int = 0

    @property
    def prompt(self) -> str:
        return self.text[: self.spans[-1][0]]


class ChatTemplate:
    """The tokenizer's chat template.

    Attributes:
        sha256: of its source.
        control_tokens: matches tokens that no text of a row may hold.
        markers: matches these and the added tokens that the template itself writes (`<think>`): for answers only.
        end_tokens: those that end a turn.

    Raises:
        ModelError: it ends answers with no token, or writes the begin token twice.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        source = str(tokenizer.get_chat_template())
        self.sha256 = digest(source)
        added = list(tokenizer.added_tokens_decoder.values())
        special = [str(token) for token in added if token.special and str(token).strip()]
        written = [str(token) for token in added if not token.special and str(token).strip() and str(token) in source]
        self.control_tokens = _any_of(special)
        self.markers = _any_of(special + written)
        self.end_tokens = self._find_end_tokens()

    def _find_end_tokens(self) -> re.Pattern[str]:
        messages = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": PROBE}]
        text = self.render(messages, None, False)
        end = self.markers.search(text, text.rindex(PROBE) + len(PROBE))
        if end is None:
            raise ModelError(
                "chat template: it writes no end token after an answer, so generation could never stop. Add "
                "{{ eos_token }} after the content of assistant messages, in a file that model.chat_template names."
            )
        bos = self._tokenizer.bos_token
        if bos and text.startswith(bos + bos):
            raise ModelError(f"chat template: it writes the begin token {bos} twice. Mend it (model.chat_template).")
        if bos and not text.startswith(bos) and begin_ids(self._tokenizer):
            logger.warning("chat template: writes no %s, which the tokenizer puts before plain text", bos)
        return _any_of([end.group(), str(self._tokenizer.eos_token)])

    def render(self, messages: Sequence[Message], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        """The conversation as text; nothing in it depends on the day.

        Raises:
            Unusable: the template refuses it, or fails.
        """
        try:
            source = str(self._tokenizer.get_chat_template(tools=tools))
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=_FIXED_DATE + source if "strftime_now" in source else source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # the template is a program: it can raise anything
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Unusable(Reason.refused_by_template, f"the chat template: {message}") from None
        return str(text)

    def lay_out(self, messages: tuple[Message, ...], tools: list[Any] | None, last_only: bool = False) -> list[Layout]:
        """One layout with every answer supervised; or one for each answer, where the template renders them differently.

        Some templates write an answer otherwise once a turn follows it (Qwen3 writes `<think>` in the last one only).
        What generation has to produce at each turn then stands in no single text.

        Args:
            last_only: supervise the last answer alone.

        Raises:
            Unusable: refused by the template; an answer that does not continue its prompt; a message that is left out.
        """
        parts = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0 or (last_only and i < len(messages) - 1):
                continue
            prompt = self.render(messages[:i], tools, True)
            text = self.render(messages[: i + 1], tools, False)
            if not text.startswith(prompt):
                detail = f"the rendered messages[{i}] does not continue its generation prompt, which ends in"
                raise Unusable(Reason.prompt_not_prefix, f"{detail} {prompt[-40:]!r}")
            parts.append((len(prompt), text[: self._end_of_turn(text, len(prompt))], i))
        _check_complete(messages, parts[-1][1], parts[-1][0])
        whole = parts[-1][1]
        if all(whole.startswith(text) for _, text, _ in parts):
            return [Layout(messages, tools, whole, tuple((start, len(text)) for start, text, _ in parts))]
        return [
            Layout(messages[: i + 1], tools, text, ((start, len(text)),), turn)
            for turn, (start, text, i) in enumerate(parts, start=1)
        ]

    def _end_of_turn(self, text: str, start: int) -> int:
        end = self.end_tokens.search(text, start)
        if end is None:  # such as Llama 3.1's <|eom_id|> after a call
            end = next(reversed(list(self.markers.finditer(text, start))), None)
        if end is None:
            raise Unusable(Reason.refused_by_template, "the chat template writes no end token after the answer")
        return end.end()

    def check_text(self, row: Row) -> None:
        """Raises: Unusable: a text of the row holds a control token, which tokenising would turn into the real one."""
        for role, where, text in _texts(row):
            found = (self.control_tokens if role in ("assistant", "text") else self.markers).search(text)
            if found:
                raise Unusable(Reason.control_token, f"{where} holds the control token {found.group()}")


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin token where the tokenizer puts one before plain text, else nothing."""
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if begins else []


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(set(tokens), key=len, reverse=True)) or r"(?!)")


def _texts(row: Row) -> list[tuple[str, str, str]]:
    """(role, where, text) of every text in the row."""
    if isinstance(row, Document):
        return [("text", "the text", row.text)]
    texts = [] if row.tools is None else [("system", "tools", json.dumps(row.tools, ensure_ascii=False))]
    for i, message in enumerate(row.messages):
        for key, value in message.items():
            if key != "role":
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                texts.append((message["role"], f"messages[{i}].{key}", text))
    return texts


def _check_complete(messages: Sequence[Message], text: str, start: int) -> None:
    """Raises: Unusable: the template left out a system or user message, or the answer's tool calls, in silence."""
    for i, message in enumerate(messages):
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            detail = f"the chat template leaves out or changes messages[{i}], role {message['role']}"
            raise Unusable(Reason.refused_by_template, detail)
    for call in messages[-1].get("tool_calls", []):
        if call["function"]["name"] not in text[start:]:
            raise Unusable(Reason.refused_by_template, "the chat template leaves out tool_calls")


def _fixed_date() -> str:
    """A Jinja macro that stands in for `strftime_now`."""
    filters = "".join(f" | replace('{code}', '{DATE.strftime(code)}')" for code in DATE_CODES)
    return "{%- macro strftime_now(format) -%}{{- format" + filters + " -}}{%- endmacro -%}"


_FIXED_DATE = _fixed_date()


def check_system_prompt(template: ChatTemplate, system_prompt: str | None) -> str | None:
    """What is wrong with giving this template a system prompt; None where nothing is."""
    if system_prompt is None:
        return None
    contents = {"system": system_prompt, "user": "A question.", "assistant": PROBE}
    try:
        template.lay_out(tuple({"role": role, "content": content} for role, content in contents.items()), None)
    except Unusable as error:
        return error.detail
    return None
