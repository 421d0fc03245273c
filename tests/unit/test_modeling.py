"""Loading a base: what is refused, with which words, and what a good folder gives."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from pipeline import model_files
from pipeline.errors import ConfigError, ModelError
from pipeline.model_files import hash_model
from pipeline.modeling import check_model, load_model, load_tokenizer, max_context
from tests.standins import ARCHITECTURES, CPU, make_model, make_tokenizer, model_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "base"
    make_model(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good, tmp_path / "base"))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_loads_with_its_own_logits(kind: str, tmp_path: Path) -> None:
    saved = make_model(tmp_path, kind)
    config = model_config(tmp_path)
    check_model(config)
    loaded = load_model(config, CPU)
    ids = torch.randint(0, 250, (2, 20))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, attention_mask=mask).logits, saved(ids, attention_mask=mask).logits)
    assert not loaded.training
    assert not any("vision" in name for name, _ in loaded.named_modules())
    assert max_context(config) == 128


def test_dtype_is_the_configured_one_unless_another_is_asked_for(good: Path) -> None:
    assert load_model(model_config(good, dtype="bfloat16"), CPU).dtype is torch.bfloat16
    assert load_model(model_config(good, dtype="bfloat16"), CPU, torch.float32).dtype is torch.float32


def test_hash_follows_weights_and_config_and_nothing_else(good: Path, folder: Path) -> None:
    before = hash_model(model_config(good))
    assert hash_model(model_config(folder)) == before
    (folder / "README.md").write_text("a note")
    assert hash_model(model_config(folder)) == before
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert hash_model(model_config(folder)) != before


def test_missing_folder_file_and_config_are_named(folder: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        check_model(model_config(folder / "nowhere"))
    with pytest.raises(ModelError, match="is a file"):
        check_model(model_config(folder / "config.json"))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        check_model(model_config(folder))


def test_relative_path_outside_the_project_is_refused_with_advice() -> None:
    with pytest.raises(ConfigError, match=r"leaves the project.*absolute path.*dvc add"):
        check_model(model_config("../elsewhere/base"))
    with pytest.raises(ConfigError, match="leaves the project"):
        check_model(model_config("models/../../elsewhere"))


def test_no_weights_and_pickle_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        check_model(model_config(folder))
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"pickle weights only \(pytorch_model\.bin\).*save_pretrained"):
        load_model(model_config(folder), CPU)


def test_truncated_weights_and_lfs_pointers_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"cannot be read as safetensors.*Fetch it again"):
        check_model(model_config(folder))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        check_model(model_config(folder))


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names model-00002-of-00002\.safetensors"):
        check_model(model_config(folder))


def test_wrong_shape_is_found_before_the_weights_are_read(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 200}))
    with pytest.raises(
        ModelError,
        match=r"wrong shape: .*mlp\.down_proj\.weight is \(64, 172\), config\.json "
        r"makes it \(64, 200\)",
    ):
        check_model(model_config(folder))
    with pytest.raises(ModelError, match="wrong shape"):
        load_model(model_config(folder), CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"),
            r"the files lack: "
            r"model\.layers\.1\.mlp\.up_proj",
        ),
        (lambda weights: weights.update(extra=torch.ones(3)), r"the architecture lacks: extra"),
    ],
)
def test_missing_and_unexpected_weights_are_errors(folder: Path, change, message: str) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_model(model_config(folder), CPU)


def test_unusable_configs_are_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for change in ({"model_type": "no_such_type"}, {"num_attention_heads": 0}):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=r"config\.json"):
            check_model(model_config(folder))
    (folder / "config.json").write_text("{not json")
    with pytest.raises(ModelError, match=r"config\.json"):
        check_model(model_config(folder))


def test_code_from_the_model_folder_needs_consent(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    auto = {"model_type": "custom", "auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}}
    (folder / "config.json").write_text(json.dumps({**config, **auto}))
    (folder / "custom.py").write_text("raise SystemExit('this code ran')\n")
    with pytest.raises(ModelError, match=r"model\.trust_remote_code=true"):
        check_model(model_config(folder))


def test_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    other = make_tokenizer()
    other.add_tokens([f"word{i}" for i in range(50)])
    other.save_pretrained(folder)
    with pytest.raises(ModelError, match="embeddings for 272"):
        check_model(model_config(folder))


def test_tokenizer_without_end_token_is_refused(folder: Path) -> None:
    make_tokenizer(eos_token=None).save_pretrained(folder)
    with pytest.raises(ModelError, match="no end token"):
        check_model(model_config(folder))


def test_missing_tokenizer_is_named(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(model_config(folder))


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({}, "<unk>"),  # stories260K, babyllama361: nothing else there
        ({"pad_token": "<mine>"}, "<mine>"),
        ({"pad_token": "</s>"}, "<unk>"),  # many models pad with the end token, which would then never be learnt
        ({"unk_token": None, "additional_special_tokens": ["<reserved_0>"]}, "<reserved_0>"),
    ],
)
def test_pad_token_exists_and_is_never_the_end_token(folder: Path, special: dict, pad: str) -> None:
    make_tokenizer(**special).save_pretrained(folder)
    tokenizer = load_tokenizer(model_config(folder))
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_nothing_to_pad_with_is_an_error_not_the_end_token(folder: Path) -> None:
    make_tokenizer(unk_token=None, bos_token=None).save_pretrained(folder)
    with pytest.raises(ModelError, match="no token to pad with"):
        load_tokenizer(model_config(folder))


def test_chat_template_of_the_file_wins_over_the_tokenizers_over_the_projects(folder: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello"}]
    ours = load_tokenizer(model_config(folder)).apply_chat_template(chat, tokenize=False)
    assert "hello" in ours
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "own:{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(model_config(folder)).apply_chat_template(chat, tokenize=False) == "own:hello"
    file = tmp_path / "template.jinja"
    file.write_text("file:{% for m in messages %}{{ m['content'] }}{% endfor %}")
    config = model_config(folder, chat_template=str(file))
    assert load_tokenizer(config).apply_chat_template(chat, tokenize=False) == "file:hello"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }", r"is not valid Jinja \(line 1"),
        ("{{ raise_exception('no') }}", "fails on a question and an answer"),
        ("{{ messages[0]['content'] }}", "leaves out the message 'trial answer'"),
        ("always the same", "leaves out the message 'trial question'"),
    ],
)
def test_invalid_chat_templates_are_refused(folder: Path, tmp_path: Path, template: str, message: str) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(template)
    with pytest.raises(ConfigError, match=message):
        check_model(model_config(folder, chat_template=str(file)))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=message):
        check_model(model_config(folder))


@pytest.mark.parametrize("revision", [None, "main", "0123abc", COMMIT.upper()])
def test_hub_model_needs_a_pinned_commit(revision: str | None) -> None:
    config = model_config("conf/model/llama3_8b.yaml", hub_id="meta-llama/Llama-3.1-8B", revision=revision)
    with pytest.raises(
        ConfigError,
        match=r"40 hex "
        r"digits.*huggingface\.co/meta-llama/Llama-3\.1-8B/commits.*conf/model",
    ):
        check_model(config)


def test_unreachable_hub_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    config = model_config("conf/model/llama3_8b.yaml", hub_id="meta-llama/Llama-3.1-8B", revision=COMMIT)
    with pytest.raises(ModelError, match=r"the Hub cannot be reached.*hf download"):
        load_model(config, CPU)


def test_hub_model_loads_from_the_pinned_snapshot(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(repo_id: str, revision: str, **kwargs: object) -> str:
        asked.append((repo_id, revision))
        return str(good)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    config = model_config("conf/model/smollm2_135m.yaml", hub_id="org/name", revision=COMMIT)
    check_model(config)
    assert load_model(config, CPU).num_parameters() > 0
    assert set(asked) == {("org/name", COMMIT)}
    assert hash_model(config) == f"org/name@{COMMIT}"


def fill_the_disk(target: Path) -> None:
    with model_files.written_folder(target, 10) as temporary:
        (temporary / "b").write_text("2")
        raise OSError(28, "No space left on device")


def test_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    with model_files.written_folder(target, 10) as temporary:
        (temporary / "a").write_text("1")
    assert (target / "a").read_text() == "1"
    with pytest.raises(ModelError, match="disk was full"):
        fill_the_disk(target)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in target.iterdir()] == ["a"]
    with pytest.raises(ModelError, match="nothing was written"), model_files.written_folder(target, 10**18):
        pytest.fail("started writing")
