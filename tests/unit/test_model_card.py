"""The model card: what Hugging Face's own reader makes of it, and what must not be in it."""

import logging
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from pipeline.config import compose_config
from pipeline.evidence import Evidence
from pipeline.model_card import model_card, read_license
from pipeline.schema import RunConfig, Shape

METRICS = {
    "merge_base": "dequantized",
    "dtype": "float32",
    "mean_kl": 4.02e-12,
    "top1_agreement": 1.0,
    "max_abs_logit_diff": 5.2e-5,
    "parity_num_tokens": 5037,
    "survival_min": 0.99991,
    "survival_mean": 0.99999,
    "merged": {"loss": 0.5},
}
FINGERPRINTS = {"base": "b" * 64, "data": "d" * 64}
REVISION = "0123456789" * 4
HUB = (
    "model=smollm2_135m",
    f"model.revision={REVISION}",
    "data=hub",
    "data.hub_id=acme/letters",
    f"data.revision={REVISION}",
)


def make_evidence() -> Evidence:
    """Twenty test rows: the base has 2 nats a token and no right answer, the adapter and the merged 0.5 and half."""

    def sums(good: bool, i: int) -> dict:
        nats = 0.5 if good else 2.0
        return {"loss": [10 * nats + i % 3, 10], "exact_match": [float(good and i % 2 == 0), 1.0]}

    models = {"base": False, "adapter": True, "merged": True}
    test = [
        {"split": "test", "row_id": f"r{i}", "cluster": f"c{i}", "models": {n: sums(g, i) for n, g in models.items()}}
        for i in range(20)
    ]
    general = [
        {"split": "general", "row_id": f"g{i}", "cluster": f"g{i}", "models": {n: {"general_loss": [30.0 + i, 10]} for n in models}}
        for i in range(5)
    ]  # fmt: skip
    return Evidence(test + general, num_resamples=200)


def make_card(config: RunConfig, license: dict | None = None, metrics: dict = METRICS) -> str:
    return model_card(config, make_evidence(), metrics, FINGERPRINTS, license or {"license": "apache-2.0"})


def test_hugging_face_reads_it_back(tmp_path: Path) -> None:
    config = compose_config(HUB)
    (tmp_path / "README.md").write_text(make_card(config))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == config.model.hub_id
    assert card.data.datasets == ["acme/letters"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.license == "apache-2.0"
    assert {"lora", "merged"} <= set(card.data.tags)
    results = {(result.dataset_name, result.metric_name): result for result in card.data.eval_results}
    exact = results["acme/letters", "exact match"]
    assert (exact.metric_type, exact.metric_value, exact.dataset_split) == ("exact_match", 0.5, "test")
    assert (exact.dataset_type, exact.dataset_revision) == ("acme/letters", REVISION)
    assert results["general text", "loss on general text (nats per token)"].metric_value == pytest.approx(3.2)
    front_matter = yaml.safe_load(make_card(config).split("---")[1])
    assert front_matter["model-index"][0]["name"] == card.data.model_name
    assert "None" not in str(front_matter)


def test_people_find_scores_parity_settings_and_sources() -> None:
    text = make_card(compose_config())
    assert "| exact match | 0 [0, 0.1611] | 0.5 [0.2993, 0.7007] | 0.5 [0.2993, 0.7007] |" in text
    assert "| loss (nats per supervised token) | 2.095 [" in text
    assert "200 supervised tokens" in text
    assert "| share of the adapter's update in the saved weights, least layer | 0.9999 |" in text
    assert "| KL(adapter, merged), nats per token, fp32 before the cast | 4.02e-12 |" in text
    assert "| `lora.r` | 8 |" in text
    assert "| `quantization.method` | nf4 |" in text
    assert f"`{'b' * 64}`" in text
    assert f"`{'d' * 64}`" in text
    assert "| peft | " in text
    assert "tokenizer.apply_chat_template(messages" in text
    config = compose_config()
    config.data.shape = Shape.text
    assert 'inputs = tokenizer("...", return_tensors="pt")' in make_card(config)


def test_a_folder_is_not_taken_for_a_model_of_the_hub() -> None:
    """`assets/base` looks like an id on the Hub: as base_model it would link to a stranger's model."""
    config = compose_config()
    card = ModelCard(make_card(config))
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert f"Base: `{config.model.path}`" in card.text


def test_no_path_of_this_machine_and_equal_bytes(tmp_path: Path) -> None:
    overrides = ("model=local", f"model.path={tmp_path}/base", "data=local", f"data.path={tmp_path}/letters")
    config = compose_config([*overrides, "data.files.train=train.jsonl"])
    text = make_card(config)
    assert text == make_card(config)
    assert str(tmp_path) not in text
    assert "Made from `base` by fine-tuning on `letters`" in text
    assert text != make_card(config, metrics={**METRICS, "mean_kl": 5e-12})  # the control: what differs shows


def test_full_training_has_no_lora_settings() -> None:
    metrics = {k: v for k, v in METRICS.items() if not k.startswith("survival")}
    text = make_card(compose_config(["train=full", "quantization=none"]), metrics=metrics)
    assert "`train.method=full`: all weights trained" in text
    assert "lora.r" not in text
    assert ModelCard(text).data.tags == ["text-generation"]


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: mit\ntags: [x]\n---\n# Base\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: llama\nlicense_link: https://x.org/L\n---\n",
            {"license": "other", "license_name": "llama", "license_link": "https://x.org/L"},
        ),
        ("# Base without YAML\n", {"license": "unknown"}),
        ("---\nlicense: [\n---\n", {"license": "unknown"}),
        (None, {"license": "unknown"}),
    ],
    ids=["mit", "other", "no_yaml", "broken", "no_card"],
)
def test_the_licence_is_the_bases_own(
    tmp_path: Path, readme: str | None, expected: dict, caplog: pytest.LogCaptureFixture
) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        assert read_license(tmp_path) == expected
    assert ("its YAML cannot be read" in caplog.text) is (readme == "---\nlicense: [\n---\n")


def test_an_unknown_licence_says_how_to_set_it() -> None:
    card = ModelCard(make_card(compose_config(), {"license": "unknown"}))
    assert card.data.license == "unknown"
    assert "write it into the YAML above (`license: apache-2.0`)" in card.text
    named = {"license": "other", "license_name": "llama3", "license_link": "https://x.org/L"}
    assert "`llama3` (https://x.org/L), as the base's card says" in make_card(compose_config(), named)
