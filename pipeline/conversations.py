"""The four shapes of raw rows, made one: conversations, or documents of plain text.

`instruction` and `prompt_completion` become a conversation of one question and one answer.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pipeline.errors import ConfigError
from pipeline.rows import BadRow, RawRow, Reason, excerpt
from pipeline.schema import Columns, DataConfig, Shape

ROLES = ("system", "user", "assistant", "tool")
NEEDED = {
    Shape.instruction: ("instruction", "output"),
    Shape.prompt_completion: ("prompt", "completion"),
    Shape.messages: ("messages",),
    Shape.text: ("text",),
}
OPTIONAL = {
    Shape.instruction: ("input", "references", "system"),
    Shape.prompt_completion: ("references", "system"),
    Shape.messages: ("references", "system"),
    Shape.text: (),
}
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """One usable row that a chat template renders.

    Attributes:
        messages: up to the last assistant turn.
        tools: JSON schemas of tools, for the template; None for none.
        references: right answers for the last turn.
        prompt_key: SHA-256 of what stands before the first answer: rows with equal keys stay in one split.
        row_key: SHA-256 of the whole row.
    """

    file: str
    line: int
    messages: tuple[Message, ...]
    tools: list[Any] | None
    references: tuple[str, ...]
    prompt_key: str
    row_key: str

    @property
    def row_id(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Document:
    """One usable row of plain text; `ends`: the text is whole, so that the end token after it is right."""

    file: str
    line: int
    text: str
    ends: bool
    prompt_key: str = ""
    row_key: str = ""

    @property
    def row_id(self) -> str:
        return f"{self.file}:{self.line}"


Row = Conversation | Document


class Unusable(Exception):
    """A row that goes to the quarantine."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def check_columns(found: Iterable[str], data: DataConfig, file: str) -> None:
    """Compares `data.columns` with the names of a file's fields.

    What a shape can do without (`input`, `references`, `system`) must exist only where a person gave it another name.

    Raises:
        ConfigError: a column is not there; the message names those that are.
    """
    existing = sorted(set(found))
    needed = list(NEEDED[data.shape])
    if data.columns.references in existing and needed[-1] in ("output", "completion"):
        needed.pop()
    needed += [key for key in OPTIONAL[data.shape] if key != "references" and getattr(data.columns, key) != key]
    missing = [key for key in needed if getattr(data.columns, key) not in existing]
    lines = []
    for key in missing:
        name = getattr(data.columns, key)
        near = get_close_matches(name, existing, n=1)
        hint = f"did you mean data.columns.{key}={near[0]}?" if near else "set it to one of these, or set data.shape."
        names = ", ".join(existing) or "none"
        lines.append(f"data.columns.{key}: {file} has no column '{name}'; it has {names}; {hint}")
    if lines:
        raise ConfigError("\n".join(lines))


def parse_row(row: RawRow, data: DataConfig) -> Row | BadRow:
    """The row as a conversation or document, or why it cannot be one."""
    try:
        if data.shape is Shape.text:
            text = _text(row.fields, data.columns.text)
            return Document(row.file, row.line, text, ends=True, prompt_key=digest(text), row_key=digest(text))
        return _parse_conversation(row, data)
    except Unusable as error:
        return BadRow(row.file, row.line, error.reason, error.detail, excerpt(row.fields))


def _parse_conversation(row: RawRow, data: DataConfig) -> Conversation:
    fields, columns = row.fields, data.columns
    references = _references(fields, columns)
    tools = None
    if data.shape is Shape.messages:
        messages = _messages(fields, columns.messages)
        tools = _without_none(_json_list(fields.get("tools"), "tools")) or None
    else:
        messages = _question_and_answer(fields, columns, data.shape, references)
    system = _optional_text(fields, columns.system)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    if not answers:
        raise Unusable(Reason.nothing_to_supervise, "no assistant turn after a first message")
    messages = messages[: answers[-1] + 1]
    last = messages[-1]["content"]
    if last and last not in references:
        references = [last, *references]
    prompt_key = digest(_canonical([messages[: answers[0]], tools]))
    row_key = digest(_canonical([messages, tools, references]))
    if data.system_prompt and messages[0]["role"] != "system":  # after the keys: a new system prompt moves no row
        messages.insert(0, {"role": "system", "content": data.system_prompt})
    return Conversation(row.file, row.line, tuple(messages), tools, tuple(references), prompt_key, row_key)


def _question_and_answer(
    fields: dict[str, Any], columns: Columns, shape: Shape, references: list[str]
) -> list[Message]:
    if shape is Shape.instruction:
        question, answer = _text(fields, columns.instruction), columns.output
        given = _optional_text(fields, columns.input)
        question = f"{question}\n{given}" if given else question
    else:
        question, answer = _text(fields, columns.prompt), columns.completion
    completion = references[0] if fields.get(answer) is None and references else _text(fields, answer)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": completion}]


def _messages(fields: dict[str, Any], column: str) -> list[Message]:
    raw = _json_list(fields.get(column), column)
    if raw is None:
        raise Unusable(Reason.missing_field, f"no '{column}'")
    if not raw:
        raise Unusable(Reason.empty_field, f"'{column}' is empty")
    return [_message(item, f"{column}[{i}]") for i, item in enumerate(raw)]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise Unusable(Reason.wrong_type, f"{where} must be an object with 'role' and 'content'")
    message = {key: value for key, value in item.items() if value is not None}
    role = message.get("role")
    if role is None:
        raise Unusable(Reason.missing_field, f"{where} has no 'role' (it has {', '.join(message) or 'nothing'})")
    if role not in ROLES:
        raise Unusable(Reason.wrong_type, f"{where} has role {role!r}; known are {', '.join(ROLES)}")
    if message.get("tool_calls"):
        calls = _json_list(message["tool_calls"], f"{where}.tool_calls") or []
        message["tool_calls"] = [_tool_call(call, where) for call in calls]
    else:
        message.pop("tool_calls", None)
    content = message.setdefault("content", "" if "tool_calls" in message else None)
    if content is None:
        raise Unusable(Reason.missing_field, f"{where} has no 'content'")
    if not isinstance(content, str):
        raise Unusable(Reason.wrong_type, f"{where}.content must be a text")
    if not content.strip() and "tool_calls" not in message and role != "tool":
        raise Unusable(Reason.empty_field, f"{where}.content is empty")
    return message


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """The call with its arguments as an object: as a string, templates that write JSON would quote it twice."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable(Reason.wrong_type, f"{where}.tool_calls: each needs function.name and function.arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            detail = f"{where}.tool_calls: the arguments of {function['name']} are not JSON"
            raise Unusable(Reason.wrong_type, detail) from None
    outer = {
        key: item for key, item in call.items() if key not in ("function", "name", "arguments") and item is not None
    }
    named = {"name": function["name"], "arguments": _without_none(arguments or {})}
    return {"type": "function", **outer, "function": named}


def _without_none(value: Any) -> Any:
    """Arrow gives every key of a column to every row; those that a row did not have are None."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _json_list(value: Any, name: str) -> list[Any] | None:
    """A list as it is; a text as JSON of one (CSV has no other way)."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise Unusable(Reason.wrong_type, f"'{name}' must be a list (or JSON of one)") from None
    if value is None or value == "":
        return None
    if not isinstance(value, list):
        raise Unusable(Reason.wrong_type, f"'{name}' must be a list")
    return value


def _references(fields: dict[str, Any], columns: Columns) -> list[str]:
    found = _json_list(fields.get(columns.references), columns.references) or []
    if not all(isinstance(item, str) and item.strip() for item in found):
        raise Unusable(Reason.wrong_type, f"'{columns.references}' must hold texts that are not empty")
    return list(dict.fromkeys(found))


def _text(fields: dict[str, Any], name: str) -> str:
    if fields.get(name) is None:
        raise Unusable(Reason.missing_field, f"no '{name}'")
    text = _optional_text(fields, name)
    if text is None:
        raise Unusable(Reason.empty_field, f"'{name}' is empty")
    return text


def _optional_text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise Unusable(Reason.wrong_type, f"'{name}' must be a text, it is {json.dumps(value, default=str)[:40]}")
    return value if value and value.strip() else None


def _canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
