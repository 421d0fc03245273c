"""Rows of what models did: written, read, joined by row, and the figures of it."""

import json

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.evidence import Evidence, ModelItems, join_items, read_evidence, write_items
from pipeline.scoring import METRICS, answer_sums
from pipeline.statistics import Outcome


def model_items(worse: float = 0.0, num: int = 30, generate: bool = True, seed: int = 0) -> ModelItems:
    """Rows of a made-up model: `worse` nats a token above the base's, an answer to every third row right."""
    rng = np.random.default_rng(seed)
    test, general = [], []
    for i in range(num):
        sums = {"loss": [(2.0 + rng.random() + worse) * (i + 3), i + 3]}
        if generate:
            sums |= answer_sums("the cat sat down" if i % 3 == 0 else f"a {i}", ["the cat sat down"] if i < 20 else [])
        test.append({"row_id": f"test:{i}", "cluster": f"prompt {i // 2}", "sums": sums})
    for i in range(num + 5):
        sums = {"general_loss": [(3.0 + rng.random() + worse) * 10, 10]}
        general.append({"row_id": f"general:{i}", "cluster": f"general:{i}", "sums": sums})
    return ModelItems(test, general, [])


def models(**worse: float) -> dict[str, ModelItems]:
    return {name: model_items(value) for name, value in worse.items()}


def test_written_rows_are_the_scores_of_their_sums(tmp_path):
    made = models(base=0.0, adapter=-0.5)
    write_items(tmp_path / "items.jsonl", made)
    evidence = read_evidence(tmp_path / "items.jsonl", num_resamples=200)
    assert evidence.models == ["base", "adapter"]
    assert evidence.scores == list(METRICS)
    values = evidence.values("adapter")
    nats, tokens = np.array([row["sums"]["loss"] for row in made["adapter"].test]).sum(axis=0)
    assert values["loss"] == pytest.approx(nats / tokens)
    assert values["perplexity"] == pytest.approx(np.exp(nats / tokens))
    assert (values["num_tokens"], values["general_num_tokens"]) == (tokens, 350)
    assert values["exact_match"] == 7 / 20  # of the rows with a reference
    assert (evidence.num_clusters("loss"), evidence.num_clusters("bleu")) == (15, 10)
    assert evidence.estimate("adapter", "loss").interval.low < values["loss"]
    assert np.exp(evidence.samples("base", "loss")) == pytest.approx(evidence.samples("base", "perplexity"))


def test_scores_that_were_not_measured_are_not_there():
    evidence = Evidence(join_items({"base": model_items(generate=False)}))
    assert evidence.scores == ["loss", "perplexity", "general_loss"]
    assert "exact_match" not in evidence.values("base")


def test_models_of_several_files_are_compared_row_by_row(tmp_path):
    write_items(tmp_path / "a.jsonl", models(base=0.0, adapter=-0.01))
    write_items(tmp_path / "b.jsonl", models(merged=-0.01))
    evidence = read_evidence(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert evidence.compare("merged", "adapter", "loss").p_value == 1.0
    assert (evidence.samples("merged", "bleu") == evidence.samples("adapter", "bleu")).all()
    found = evidence.compare_all([("adapter", "base"), ("merged", "adapter")], ["loss", "exact_match"])
    assert [c.outcome for c in found] == [Outcome.better, Outcome.none, Outcome.none, Outcome.none]
    assert found[0].difference == pytest.approx(-0.01)
    assert found[0].p_value == pytest.approx(4 * evidence.compare("adapter", "base", "loss").p_value)
    assert evidence.forgetting("adapter").difference == pytest.approx(-0.01)


def test_the_general_text_is_resampled_on_its_own():
    """As many rows of both, and the same figures: one draw for both would make unrelated rows move together."""
    made = model_items(num=30)
    rows = [row | {"cluster": row["row_id"]} for row in made.test]
    test, general = ([row | {"sums": {key: row["sums"]["loss"]}} for row in rows] for key in ("loss", "general_loss"))
    made = ModelItems(test, general, [])
    evidence = Evidence(join_items({"base": made}), num_resamples=2000)
    together = np.corrcoef(evidence.samples("base", "loss"), evidence.samples("base", "general_loss"))[0, 1]
    assert abs(together) < 0.1


def rewrite(path, change) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def drop_score(rows):
    del rows[4]["models"]["merged"]["loss"]
    return rows


def other_prompt(rows):
    rows[4]["cluster"] = "another prompt"
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "is not on the rows of"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "is not on the rows of"),
        (other_prompt, "is not on the rows of"),
        (lambda rows: [], "is not on the rows of"),
        (drop_score, "rows that differ in what they hold"),
        (lambda rows: [{}, *rows[1:]], "rows that differ in what they hold"),
        (lambda rows: [["test"], *rows[1:]], "rows that differ in what they hold"),
        (lambda rows: [rows[0] | {"models": {"merged": {"loss": [1.0]}}}, *rows[1:]], "rows that differ"),
        (lambda rows: rows, None),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, change, message):
    write_items(tmp_path / "a.jsonl", models(base=0.0))
    write_items(tmp_path / "b.jsonl", models(merged=0.0))
    rewrite(tmp_path / "b.jsonl", change)
    if message is None:
        assert read_evidence(tmp_path / "a.jsonl", tmp_path / "b.jsonl").models == ["base", "merged"]
        return
    with pytest.raises(DataError, match=message):
        read_evidence(tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_an_empty_or_missing_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match=r"a\.jsonl: no row"):
        read_evidence(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_evidence(tmp_path / "b.jsonl")
