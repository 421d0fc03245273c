"""The plan's parts: models, cards, searches, time, advice. Memory is made up here, but where it says otherwise."""

import dataclasses
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import plan, plan_advice, plan_columns, plan_time
from pipeline.architecture import read_architecture
from pipeline.config import compose, compose_config
from pipeline.dataset import Example, write_split
from pipeline.errors import ConfigError, ModelError
from pipeline.memory import CUDA_CONTEXT_BYTES, Memory, alternatives, usable_bytes
from pipeline.plan_cards import CARDS, parse_card, smallest_size
from pipeline.plan_models import find_model, sizes
from pipeline.plan_text import WIDTH, duration, plan_text
from pipeline.plan_time import Rate, Workload
from pipeline.provenance import write_provenance
from pipeline.schema import Dtype, TrainMethod

A_TOKEN = 2_000_000
METHOD_BYTES = {TrainMethod.full: 100e9, TrainMethod.lora: 16e9, TrainMethod.qlora: 6e9}
HUGE = "1000GB"


@pytest.fixture
def made_up(monkeypatch):
    """Memory of a base by method, and so much a token; a quarter of that where activations are recomputed."""

    def plan_memory(architecture, setup):
        tokens = setup.micro_batch_size * setup.length
        activations = A_TOKEN * tokens // (4 if setup.gradient_checkpointing else 1)
        return Memory(int(METHOD_BYTES[setup.method]), 0, 0, 0, 0, activations, 0, 0, 0)

    for module in (plan_columns, plan_advice):
        monkeypatch.setattr(module, "plan_memory", plan_memory)


@pytest.fixture(scope="module")
def llama():
    return read_architecture(sizes()["llama3_8b"].model_config(), "llama3_8b")


@pytest.mark.parametrize("name", sizes())
def test_a_named_size_has_the_published_number_of_parameters(name):
    size = sizes()[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(size.model_config())
    assert model.num_parameters() == size.num_parameters
    assert size.source.startswith("https://huggingface.co/")


def test_gemma_without_its_vision_part():
    """Gemma 3's report, table 1: 4B has 417M parameters of vision, 675M of embeddings, 3,209M others."""
    assert sizes()["gemma3_4b"].num_parameters == pytest.approx(675e6 + 3209e6, rel=2e-3)


def test_a_hub_model_that_is_not_pinned_is_planned_by_its_named_size():
    composed = compose(["model=llama3_8b"], "run")
    found = find_model(composed, None)
    assert found.name == "llama3_8b"
    assert "named size of meta-llama/Llama-3.1-8B-Instruct" in found.source
    assert composed.model.hub_id is None


def test_a_hub_model_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pin = "model.revision=" + "a" * 40
    assert "named size" in find_model(compose(["model=qwen3_8b", pin], "run"), None).source
    with pytest.raises(ModelError, match=r"cannot be reached.*--model and one of smollm2_135m"):
        find_model(compose(["model=qwen3_8b", "model.hub_id=someone/else", pin], "run"), None)
    with pytest.raises(ConfigError, match="does not pin"):
        find_model(compose(["model=qwen3_8b", "model.hub_id=someone/else"], "run"), None)


@pytest.mark.parametrize(("asked", "hint"), [("llama3_8", "did you mean llama3_8b"), ("./nowhere", "known sizes")])
def test_a_model_that_there_is_not(asked, hint):
    with pytest.raises(ConfigError, match=hint):
        find_model(compose([], "run"), asked)


def test_a_folder_needs_no_weights(tmp_path, tiny_llama):
    tiny_llama.config.save_pretrained(tmp_path)
    found = find_model(compose([], "run"), str(tmp_path))
    assert found.config.hidden_size == 64
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find_model(compose([], "run"), str(tmp_path))


def test_cards_and_sizes():
    assert parse_card("24GB").gigabytes == 24
    assert parse_card("24 GiB").gigabytes == pytest.approx(25.77, abs=0.01)
    assert parse_card("NVIDIA RTX 4090").name == "rtx4090"
    assert parse_card("A100-80GB").tflops == 312
    for wrong, hint in (("rtx4091", "did you mean rtx4090"), ("0GB", "no memory"), ("fast", "known cards: t4")):
        with pytest.raises(ConfigError, match=hint):
            parse_card(wrong)
    for card in CARDS:  # dense, in fp32 without tensor cores: never the doubled figures of sparsity
        assert 1.5 <= card.tflops / card.float32_tflops <= 16.1
        assert card.source.startswith("https://")


def test_context_and_fragmentation_come_off_once():
    """torch reports 23.6 GiB in all on an RTX 4090, 14.6 on a T4, 22.0 on an L4 and 79.1 on an A100 of 80."""
    for name, gibibytes in (("rtx4090", 23.6), ("t4", 14.6), ("l4", 22.0), ("a100-80gb", 79.1), ("h100", 79.1)):
        card = parse_card(name)
        assert (card.free_bytes + CUDA_CONTEXT_BYTES) / 2**30 == pytest.approx(gibibytes, rel=0.015)
    assert usable_bytes(parse_card("rtx4090").free_bytes, "cuda") == pytest.approx(24e9, rel=0.01)
    assert parse_card("24GB").free_bytes == 24 * 10**9 - CUDA_CONTEXT_BYTES
    assert parse_card("24GiB").free_bytes == 24 * 2**30 - CUDA_CONTEXT_BYTES
    assert parse_card("0.1GB").free_bytes == 0
    assert usable_bytes(10**9, "cuda") == 970 * 10**6  # measured: the context is there already
    assert usable_bytes(10**9, "cpu") == 10**9
    least = min(usable_bytes(card.free_bytes, "cuda") for card in CARDS if card.gigabytes == 24)
    assert smallest_size(least) == 24
    assert smallest_size(least + 1) == 32  # some cards of 24 GB have less for it
    assert smallest_size(10**12) is None


def test_the_searches_find_what_fits(made_up, llama):
    config = compose_config(["data.max_length=1000", "train.micro_batch_size=4"])
    setup = dataclasses.replace(alternatives(config, "cuda", 1000)["qlora"], length=1000)
    totals = plan_columns.Totals(llama, setup)
    fitting = 6e9 + 7.5 * A_TOKEN * 1000
    assert totals.largest_micro_batch(int(fitting)) == 7
    assert totals.largest_length(int(fitting)) == 1875
    assert totals.largest_micro_batch(int(6e9)) == 0
    assert totals.largest_length(int(6e9)) == 0
    assert totals.largest_length(10**15) == llama.max_context


def make_plan(*overrides, gpu="24GB", **options):
    return plan.make_plan(["train.micro_batch_size=4", "data.max_length=1024", *overrides], gpu, "llama3_8b", **options)


def test_the_text_is_short_and_the_json_whole(made_up):
    made = make_plan(gpu="rtx4090")
    text = plan_text(made)
    lines = text.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= WIDTH
    for part in (
        "1 GB is 10^9 bytes",
        "LoRA int8",
        "none",
        "over",
        "recommended:",
        "data sheet",
        "0.4 of TFLOPS 165 in 16 bits",
        "disk, GB",
    ):
        assert part in text
    values = json.loads(json.dumps(plan.plan_json(made)))
    qlora = values["columns"]["qlora"]
    assert qlora["kept"]["memory"]["total"] == made.columns["qlora"].kept.memory.total == 6e9 + 4096 * A_TOKEN
    assert qlora["micro_batch_size"] == 4
    assert values["usable_bytes"] == usable_bytes(parse_card("rtx4090").free_bytes, "cuda")
    row = made.grid.micro_batches.index(4)
    assert made.grid.totals[row][made.grid.lengths.index(1024)] == made.columns["qlora"].kept.memory.total


def test_time_is_tokens_by_flops_by_rate(llama):
    config = compose_config(["quantization.compute_dtype=bfloat16"])
    setups = alternatives(config, "cuda", 1024)
    rate = Rate(100.0, 10.0, "made up")
    lora, qlora, full = (
        plan_time.seconds_per_million_tokens(llama, setups[name], rate, 1024) for name in ("lora", "qlora", "full")
    )
    least = 4 * 7.5e9 * 1e6 / (0.4 * 100e12)  # 4 FLOPs a weight and token, head and layers without the embeddings
    assert least < lora < 1.2 * least
    assert qlora / lora == pytest.approx(1 + 665 / (16 * 1024), rel=1e-3)
    assert full > 10 * lora  # in fp32: another rate
    assert Rate(1.0, None, "").of(setups["full"]) is None
    assert plan_time.arithmetic_dtype(setups["full"]) is Dtype.float32
    assert (duration(3.25), duration(100), duration(7300)) == ("3.2 s", "100 s", "2.0 h")


def test_processes_share_the_time_and_the_rows(made_up):
    """Alone and in four processes: with a card's own rate, and by cards of the asked size."""
    steps = ["train.max_steps=10", "train.method=lora", "model.dtype=bfloat16"]
    for gpu in ("rtx4090", "24GB"):
        alone = make_plan(*steps, gpu=gpu)
        four = make_plan(*steps, "runtime.num_processes=4", gpu=gpu)
        assert (alone.micro_batch_size, four.micro_batch_size) == (4, 1)
        assert four.columns["lora"].kept.memory.activations == 1024 * A_TOKEN
        assert not any("micro_batch_size" in override for override in four.advice.overrides)
        if gpu == "24GB":
            assert four.seconds_by_card["rtx4090"] == pytest.approx(alone.seconds_by_card["rtx4090"] / 4)
        else:
            named = four.columns["lora"].kept.seconds
    assert named == pytest.approx(four.seconds_by_card["rtx4090"])


def test_lengths_that_another_tokenizer_counted(tmp_path):
    config = compose_config([])
    write_split(tmp_path / "train.arrow", [Example("r", [1] * 10, [1] * 10, 2, "", ["a"])])
    write_provenance(tmp_path, "prepare", config.data, config.model)
    assert "tokenizer of models/other" in plan_time.read_workload(config, tmp_path, "models/other").source
    assert plan_time.read_workload(config, tmp_path).source == str(tmp_path)


def test_a_plan_says_whose_tokenizer_counted(made_up, tmp_path, monkeypatch):
    asked = []
    read = plan_time.read_workload
    monkeypatch.setattr(plan, "read_workload", lambda *args: asked.append(args[2]) or read(*args))
    make_plan()
    plan.make_plan(["model=llama3_8b"], "24GB")
    assert asked == [compose_config([]).model.path, None]


def test_what_there_is_to_train_on(tmp_path):
    config = compose_config(["data.max_length=320"])
    raw = plan_time.read_workload(config, tmp_path / "none")
    assert (raw.num_rows, raw.tokens_a_row) == (4000, 320)
    assert "raw rows" in raw.source
    answers = ["17 25 98", "3001", "42"]
    rows = [Example(f"r{i}", [1] * (10 + 10 * i), [1] * (10 + 10 * i), 2, "", [a]) for i, a in enumerate(answers)]
    write_split(tmp_path / "train.arrow", rows)
    write_provenance(tmp_path, "prepare", config.data, config.model)
    made = plan_time.read_workload(config, tmp_path)
    assert (made.num_rows, made.tokens_a_row, made.longest_row, made.digit_share) == (3, 20, 30, 1.0)
    other = plan_time.read_workload(compose_config(["data.max_length=100"]), tmp_path)
    assert (other.num_rows, other.tokens_a_row) == (4000, 100)  # of other settings: not taken
    missing = plan_time.read_workload(compose_config(["data.files.train=nothing.jsonl"]), tmp_path / "none")
    assert missing.num_rows is None
    assert "no such file" in missing.source


def advise(llama, workload, *overrides, capacity=HUGE):
    config = compose_config(["train.micro_batch_size=4", "data.max_length=1024", *overrides])
    card = parse_card(capacity).free_bytes
    columns, _ = plan_columns.make_tables(llama, config, "cuda", card, workload, None)
    return plan_advice.advise(llama, config, columns, workload, card, True)


def test_16_bits_where_they_fit_with_room_else_4(made_up, llama):
    workload = Workload(50_000, 300, 1000, 0.01, "made up")
    roomy = advise(llama, workload, capacity="80GB")
    assert roomy.choice.startswith("LoRA on the base in bfloat16")
    assert "train.method=lora" in roomy.overrides
    tight = advise(llama, workload, capacity="18GB")
    assert tight.choice.startswith("QLoRA")
    assert "quantization.compute_dtype=bfloat16" in tight.overrides
    assert any("too little room" in reason or "does not fit" in reason for reason in tight.reasons)
    nowhere = advise(llama, workload, capacity="4GB")
    assert nowhere.choice.startswith("nothing on this device: QLoRA fits a card of 16 GB")


@pytest.mark.parametrize(
    ("rows", "digits", "r", "says"),
    [(200, 0.0, 64, "overfit"), (200, 0.0, 8, ""), (50_000, 0.0, 64, ""), (50_000, 0.9, 8, "digits")],
)
def test_what_the_data_ask_for(made_up, llama, rows, digits, r, says):
    reasons = " ".join(advise(llama, Workload(rows, 300, 1000, digits, ""), f"lora.r={r}").reasons)
    assert ("overfit" in reasons) is (says == "overfit")
    assert ("digits" in reasons) is (says == "digits")


def test_small_models_may_be_trained_whole(made_up, llama):
    small = read_architecture(sizes()["smollm2_135m"].model_config())
    workload = Workload(None, 300, 1000, None, "")
    assert "full fine-tuning" in " ".join(advise(small, workload).reasons)
    assert "full fine-tuning" not in " ".join(advise(llama, workload).reasons)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora.rr=4"], r"lora\.rr: no such setting; did you mean lora\.r"),
        (["--gpu", "24XB"], "--gpu: '24XB' is no size"),
        (["--model", "llama3_8c"], "did you mean llama3_8b"),
        (["--gpu", "24GB", "--measure"], "--measure"),
        (["--tflops", "-1"], "--tflops"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan", *arguments])
    with pytest.raises(SystemExit) as left:
        plan.main()
    assert left.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("plan: error: ")
    assert re.search(message, error)
