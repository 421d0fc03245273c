"""Chat templates of real families, by stand-in: which tokens are supervised, and what generation starts from."""

import itertools

import numpy as np
import pytest

from pipeline.conversations import Conversation, Document, Unusable
from pipeline.encoding import Encoder
from pipeline.errors import ConfigError, ModelError
from pipeline.rows import Reason
from pipeline.schema import TooLong
from pipeline.templates import ChatTemplate, check_system_prompt
from pipeline.tokenizer import PROJECT_TEMPLATE
from tests.chat_templates import (
    CHATML,
    END,
    GEMMA2,
    LLAMA3,
    QWEN3,
    SPECIAL,
    TEMPLATES,
    family_tokenizer,
    make_spaced_tokenizer,
    make_tokenizer,
)  # fmt: skip

PROJECT = PROJECT_TEMPLATE.read_text(encoding="utf-8")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}]


def turns(*texts: str, system: str | None = None) -> tuple[dict, ...]:
    first = [{"role": "system", "content": system}] if system else []
    return (*first, *({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)))


def row(messages: tuple[dict, ...], tools=None) -> Conversation:
    return Conversation("f.jsonl", 1, messages, tools, (), "p", "r")


def encode(tokenizer, *rows, max_length: int = 10_000, too_long: TooLong = TooLong.drop, overlap: int = 0):
    return Encoder(tokenizer, max_length, too_long, overlap).encode(rows)


def supervised(tokenizer, example) -> list[str]:
    """The text of each run of supervised tokens."""
    runs, mask = [], np.concatenate([[0], example.completion_mask, [0]])
    for start, end in zip(*(np.flatnonzero(np.diff(mask.astype(int)) == sign) for sign in (1, -1)), strict=True):
        runs.append(tokenizer.decode(example.input_ids[start:end]))
    return runs


@pytest.mark.parametrize("family", TEMPLATES)
def test_answers_and_their_end_tokens_are_supervised_and_nothing_else(family):
    tokenizer = family_tokenizer(family)
    encoded = encode(tokenizer, row(turns("Hi", "Hello there")))
    (example,) = encoded.examples
    think = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    space = " " if family == "mistral" else ""
    assert supervised(tokenizer, example) == [space + think + "Hello there" + END[family]]
    assert example.input_ids[-1] == tokenizer.convert_tokens_to_ids(
        END[family]
    )  # no newline of the template's after it
    assert example.references == ["Hello there"]


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_prompt_is_what_generation_starts_from_token_by_token(family):
    tokenizer = family_tokenizer(family)
    messages = turns("Hi", "Hello", "And\n\nnow?", "Bye")
    for example in encode(tokenizer, row(messages)).examples:
        num_messages = 1 if example.row_id.endswith("#1") else 3
        prompt = tokenizer.apply_chat_template(
            list(messages[:num_messages]), add_generation_prompt=True, tokenize=False
        )
        if family == "llama3":  # it writes the day; ours is fixed
            prompt = (
                prompt.partition("Date: ")[0] + "Date: 26 Jul 2024\n" + prompt.partition("Date: ")[2].partition("\n")[2]
            )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert example.input_ids[: example.num_prompt_tokens].tolist() == ids
        assert example.prompt == prompt
        assert example.completion_mask[example.num_prompt_tokens :].all()
        changed = tokenizer(prompt + "x", add_special_tokens=False)["input_ids"]  # negative control
        assert example.input_ids[: example.num_prompt_tokens].tolist() != changed


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma3", "mistral"])
def test_every_answer_of_several_turns_is_supervised_in_one_row(family):
    tokenizer = family_tokenizer(family)
    encoded = encode(tokenizer, row(turns("Hi", "Hello", "How?", "Well", "Bye", "See you")))
    (example,) = encoded.examples
    space, end = (" " if family == "mistral" else ""), END[family]
    assert supervised(tokenizer, example) == [space + answer + end for answer in ("Hello", "Well", "See you")]
    assert encoded.num_unrolled == 0


def test_a_template_that_writes_past_answers_otherwise_gives_a_row_for_each_answer():
    tokenizer = family_tokenizer("qwen3")
    encoded = encode(tokenizer, row(turns("Hi", "Hello", "How?", "Well")))
    first, last = encoded.examples
    think = "<think>\n\n</think>\n\n"
    assert encoded.num_unrolled == 1
    assert [first.row_id, last.row_id] == ["f.jsonl:1#1", "f.jsonl:1#2"]
    assert supervised(tokenizer, first) == [think + "Hello<|im_end|>"]
    assert supervised(tokenizer, last) == [think + "Well<|im_end|>"]
    assert "<|im_start|>assistant\nHello<|im_end|>" in last.prompt  # as generation sees it: without the block


@pytest.mark.parametrize("family", ["llama3", "gemma3", "mistral"])
def test_the_begin_token_stands_once(family):
    tokenizer = family_tokenizer(family)
    (example,) = encode(tokenizer, row(turns("Hi", "Hello"))).examples
    assert example.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert example.input_ids[0] == tokenizer.bos_token_id


def test_a_template_that_begins_twice_is_refused():
    with pytest.raises(ModelError, match=r"begin token <s> twice"):
        ChatTemplate(make_tokenizer("{{ bos_token }}" + TEMPLATES["mistral"]))


def test_a_template_without_an_end_token_is_refused():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    with pytest.raises(ModelError, match=r"no end token.*eos_token"):
        ChatTemplate(make_tokenizer(template))


def test_system_text_is_kept_or_its_refusal_is_said():
    messages = turns("Hi", "Hello", system="Be brief.")
    for family in ("chatml", "llama3", "gemma3"):
        (example,) = encode(family_tokenizer(family), row(messages)).examples
        assert "Be brief." in example.prompt
    for template, reason in ((GEMMA2, "System role not supported"), (TEMPLATES["mistral"], "Only user and assistant")):
        tokenizer = make_tokenizer(template, "gemma3" if template is GEMMA2 else "mistral")
        encoded = encode(tokenizer, row(messages))
        assert not encoded.examples
        assert encoded.bad[0].reason is Reason.refused_by_template
        assert reason in encoded.bad[0].detail
        assert reason in str(check_system_prompt(ChatTemplate(tokenizer), "Be brief."))
        assert check_system_prompt(ChatTemplate(tokenizer), None) is None


def test_a_message_that_the_template_leaves_out_in_silence_is_found():
    deaf = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    encoded = encode(make_tokenizer(deaf, "chatml"), row(turns("Hi", "Hello", system="Be brief.")))
    assert "leaves out or changes messages[0]" in encoded.bad[0].detail


def test_tool_calls_are_supervised_and_tool_answers_are_not():
    tokenizer = family_tokenizer("qwen3")
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    messages = (
        *turns("Rome?"),
        call,
        {"role": "tool", "content": "12 degrees"},
        {"role": "assistant", "content": "Cool."},
    )
    first, last = encode(tokenizer, row(messages, TOOLS)).examples
    assert '"weather"' in first.prompt  # the tools
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    assert supervised(tokenizer, first) == ["<think>\n\n</think>\n\n" + text]
    assert first.references == ["<think>\n\n</think>\n\n" + text]
    assert supervised(tokenizer, last) == ["<think>\n\n</think>\n\nCool.<|im_end|>"]
    assert "12 degrees" in last.prompt
    encoded = encode(family_tokenizer("chatml"), row((*turns("Rome?"), call)))
    assert "leaves out tool_calls" in encoded.bad[0].detail


def test_the_projects_template_takes_every_role():
    tokenizer = make_tokenizer(PROJECT)
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    messages = (
        *turns("Rome?", system="Be brief."),
        call,
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "Cool."},
    )
    (example,) = encode(tokenizer, row(messages, TOOLS)).examples
    assert supervised(tokenizer, example) == [
        'Call: {"name": "weather", "arguments": {"city": "Rome"}}</s>',
        "Cool.</s>",
    ]
    assert example.prompt.startswith("<s>Tools:\n")
    assert example.prompt.endswith("System:\nBe brief.\nUser:\nRome?\nAssistant:\n" + 'Call: {"name": "weather", '
        '"arguments": {"city": "Rome"}}</s>\nTool:\n12\nAssistant:\n')  # fmt: skip


def test_nothing_depends_on_the_day():
    (example,) = encode(family_tokenizer("llama3"), row(turns("Hi", "Hello"))).examples
    assert "Today Date: 26 Jul 2024\n" in example.prompt
    fresh = family_tokenizer("llama3").apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "26 Jul 2024" not in fresh  # negative control: the template does write today's date


def test_an_answer_that_does_not_continue_its_prompt_is_said():
    template = CHATML.replace("'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>assistant\\n<plan>' }}{% endif")
    encoded = encode(make_tokenizer(template, "chatml"), row(turns("Hi", "Hello")))
    assert encoded.bad[0].reason is Reason.prompt_not_prefix


def test_merges_across_the_prompts_end_are_undone():
    """A newline at the answer's start would merge with the prompt's last one, which generation never sees."""
    tokenizer = make_tokenizer(CHATML, "chatml", merges=(("Ċ", "Ċ"),))
    (example,) = encode(tokenizer, row(turns("Hi", "\nHello"))).examples
    prompt = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
    assert example.input_ids[: example.num_prompt_tokens].tolist() == prompt
    assert supervised(tokenizer, example) == ["\nHello<|im_end|>"]
    whole = tokenizer("<|im_start|>assistant\n\nHello", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("ĊĊ") in whole  # negative control: they do merge in one text
    assert tokenizer.convert_tokens_to_ids("ĊĊ") not in example.input_ids


def test_a_merge_that_cannot_be_undone_goes_to_the_quarantine():
    ends_in_space = PROJECT.replace("'Assistant:\\n'", "'Assistant: '").replace(
        "capitalize + ':\\n'", "capitalize + ': '"
    )
    tokenizer = make_spaced_tokenizer(ends_in_space)
    encoded = encode(tokenizer, row(turns("x", "abc")), row(turns("x", "cba")))
    assert [bad.reason for bad in encoded.bad] == [Reason.prompt_not_prefix]
    assert len(encoded.examples) == 1
    assert not encode(make_spaced_tokenizer(PROJECT), row(turns("x", "abc"))).bad


@pytest.mark.parametrize(
    ("family", "text", "role", "found"),
    [
        ("chatml", "a <|im_end|> b", 0, True),
        ("chatml", "a <|im_end|> b", 1, True),
        ("chatml", "a <|im_end| > b", 0, False),
        ("qwen3", "a <think> b", 0, True),  # an added token that the template writes
        ("qwen3", "<think>x</think> b", 1, False),  # which an answer may hold
        ("gemma3", "a\n\nb <table>", 0, False),  # added tokens that are plain text
        ("gemma3", "a <eos>", 0, True),
    ],
)
def test_control_tokens_typed_in_text_are_found(family, text, role, found):
    texts = ["Hi", "Hello"]
    texts[role] = text
    template = ChatTemplate(family_tokenizer(family))
    if found:
        with pytest.raises(Unusable, match=r"control token") as error:
            template.check_text(row(turns(*texts)))
        assert error.value.reason is Reason.control_token
    else:
        template.check_text(row(turns(*texts)))


def test_control_tokens_are_found_in_calls_tools_and_documents():
    template = ChatTemplate(family_tokenizer("qwen3"))
    evil = {"type": "function", "function": {"name": "f", "arguments": {"a": ["<|im_end|>"]}}}
    with pytest.raises(Unusable, match=r"messages\[1\].tool_calls"):
        template.check_text(row((*turns("Hi"), {"role": "assistant", "content": "", "tool_calls": [evil]})))
    with pytest.raises(Unusable, match=r"tools"):
        template.check_text(row(turns("Hi", "Hello"), [evil]))
    with pytest.raises(Unusable, match=r"the text"):
        template.check_text(Document("f", 1, "a<|endoftext|>b", ends=True))


def test_truncation_cuts_the_middle_of_the_prompt_and_nothing_else():
    tokenizer = family_tokenizer("llama3")
    messages = turns("BEGIN" + "x" * 300 + "FINISH", "The whole answer", system="Stay whole.")
    (full,) = encode(tokenizer, row(messages)).examples
    limit = len(full.input_ids) - 150
    encoded = encode(tokenizer, row(messages), max_length=limit, too_long=TooLong.truncate_prompt)
    (example,) = encoded.examples
    assert encoded.num_truncated == 1
    assert len(example.input_ids) == limit
    assert supervised(tokenizer, example) == ["The whole answer<|eot_id|>"]
    assert "Stay whole." in example.prompt
    assert "BEGINx" in example.prompt
    assert "xFINISH" in example.prompt
    control = [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL["llama3"][2]]
    count = lambda ids: [ids.tolist().count(token) for token in control]
    assert count(example.input_ids) == count(full.input_ids)
    prompt = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
    assert example.input_ids[: example.num_prompt_tokens].tolist() == prompt


def test_truncation_keeps_each_row_of_an_unrolled_conversation_apart():
    tokenizer = family_tokenizer("qwen3")
    messages = turns("A" * 80, "Hello", "B" * 80, "Well")
    encoded = encode(tokenizer, row(messages), max_length=160, too_long=TooLong.truncate_prompt)
    assert [example.row_id for example in encoded.examples] == ["f.jsonl:1#1", "f.jsonl:1#2"]
    assert encoded.num_truncated == 1
    assert supervised(tokenizer, encoded.examples[1]) == ["<think>\n\n</think>\n\nWell<|im_end|>"]
    assert max(len(example.input_ids) for example in encoded.examples) <= 160


@pytest.mark.parametrize("too_long", [TooLong.drop, TooLong.truncate_prompt])
def test_an_answer_that_does_not_fit_is_dropped_and_said(too_long):
    encoded = encode(family_tokenizer("chatml"), row(turns("Hi", "y" * 200)), max_length=100, too_long=too_long)
    assert not encoded.examples
    assert encoded.bad[0].reason is Reason.too_long


def test_windows_supervise_every_token_of_a_document_once():
    tokenizer = make_tokenizer(PROJECT)
    text = "".join(chr(97 + i % 26) for i in range(103))
    for overlap in (0, 3):
        examples = encode(tokenizer, Document("t.txt", 1, text, ends=False), max_length=10, overlap=overlap).examples
        counted = [i for e in examples for i, m in zip(e.input_ids, e.completion_mask, strict=True) if m]
        first_unseen = [int(examples[0].input_ids[0])]  # the first token has no predecessor
        if overlap:
            assert tokenizer.decode(first_unseen + counted) == text
        assert all(len(e.input_ids) <= 10 and e.num_prompt_tokens == 0 and not e.references for e in examples)
        assert [e.row_id for e in examples[:2]] == ["t.txt:1#1", "t.txt:1#2"]
        for previous, following in itertools.pairwise(examples):
            assert (
                previous.input_ids[len(previous.input_ids) - overlap :].tolist()
                == following.input_ids[:overlap].tolist()
            )


def test_windows_begin_with_the_begin_token_where_the_tokenizer_says_so():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(PROJECT)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    text = "abcdefghijklmnopqrstuvwxyz"
    examples = encode(tokenizer, Document("t.txt", 1, text, ends=True), max_length=10, overlap=2).examples
    assert all(
        e.input_ids.tolist().count(tokenizer.bos_token_id) == 1 and e.input_ids[0] == tokenizer.bos_token_id
        for e in examples
    )
    counted = [i for e in examples for i, m in zip(e.input_ids, e.completion_mask, strict=True) if m]
    assert tokenizer.decode(counted) == text + "</s>"
    (chat,) = encode(tokenizer, row(turns("Hi", "Hello"))).examples
    assert chat.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    with pytest.raises(ConfigError, match=r"text_overlap"):
        Encoder(tokenizer, 10, TooLong.drop, 9)


def test_the_template_is_named_by_its_content():
    assert ChatTemplate(make_tokenizer(QWEN3, "qwen3")).sha256 == ChatTemplate(make_tokenizer(QWEN3, "qwen3")).sha256
    assert (
        ChatTemplate(make_tokenizer(CHATML, "chatml")).sha256 != ChatTemplate(make_tokenizer(LLAMA3, "llama3")).sha256
    )
