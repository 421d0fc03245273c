"""Sweeps made up from known distributions: what is best, equal and smallest; what is read, written and refused."""

import csv
import json
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from pipeline.compare import Comparison, compare, main
from pipeline.compare_edges import Edge, find_edges
from pipeline.compare_judged import Judged
from pipeline.compare_points import read_groups
from pipeline.config import compose_config
from pipeline.errors import ConfigError, DataError
from pipeline.files import write_json, write_jsonl
from pipeline.points import Point, State, Sweep
from pipeline.scoring import METRICS

TARGETS = {"attention": 1000, "mlp": 1500, "all_linear": 2500}
NUM_ROWS, NUM_GENERAL = 60, 20
SETTINGS = {
    "data": {"path": "data/e2e", "hub_id": None, "max_rows": None}, "evaluate": {"max_rows": None},
    "model": {"path": "models/stories260k", "hub_id": None},
    "train": {"method": "qlora", "seed": 0, "eval_max_rows": None},
}  # fmt: skip


def true_loss(swept: dict) -> float:
    """Rank 8 and above are alike, attention is worse, so is another learning rate than 0.005."""
    rank = {1: 0.2, 2: 0.1, 4: 0.04}.get(swept.get("lora.r", 8), 0.0)
    target = 0.1 if swept.get("lora.target_modules") == "attention" else 0.0
    rate = 0.1 * abs(np.log(swept.get("train.learning_rate", 0.005) / 0.005))
    return 0.5 + rank + target + rate


def bleu_sums(quality: float) -> list[float]:
    totals = [12.0, 11.0, 10.0, 9.0]
    return [*(round(total * quality ** (n + 1)) for n, total in enumerate(totals)), *totals, 12.0, 12.0]


def make_point(
    folder: Path, number: int, swept: dict, rng, difficulty, loss: float, generate: bool, noise: float
) -> Point:
    point_folder = folder / f"{number:03d}"
    seed = swept.get("train.seed", 0)
    settings = json.loads(json.dumps(SETTINGS)) | {}
    settings["train"]["seed"] = seed
    for key in (key for key in swept if key.split(".")[0] in settings):
        settings[key.split(".")[0]][key.split(".")[1]] = swept[key]
    overrides = [f"{key}={value}" for key, value in swept.items()]
    point = Point(
        point_folder, number, overrides, swept, f"python -m stages.point {' '.join(overrides)}", settings, State.finished,
        fingerprint=f"{number:064x}", training="new", evaluation="new", seconds={"train": 9.0, "evaluate": 1.0},
    )  # fmt: skip
    items, loss = [], loss + noise * rng.normal()
    for i, (tokens, hard) in enumerate(difficulty):
        own = max(0.01, loss + hard + 3 * noise * rng.normal())
        sums = {"loss": [tokens * own, tokens]}
        if generate:
            quality = float(np.clip(1.2 - own, 0.05, 1.0))
            sums |= {
                "exact_match": [float(rng.random() < quality / 2), 1.0],
                "rouge_l": [quality, 1.0],
                "bleu": bleu_sums(quality),
            }
        base = {key: [tokens * 4.0, tokens] if key == "loss" else [0.0, *values[1:]] for key, values in sums.items()}
        items.append(
            {
                "split": "test",
                "row_id": f"test:{i}",
                "cluster": f"test:{i // 2}",
                "models": {"base": base, "adapter": sums},
            }
        )
    for i in range(NUM_GENERAL):
        worse = [20 * (2.5 + 0.1 * rng.normal()), 20]
        models = {"base": {"general_loss": [20 * (2.0 + i / 40), 20]}, "adapter": {"general_loss": worse}}
        items.append({"split": "general", "row_id": f"general:{i}", "cluster": f"general:{i}", "models": models})
    write_jsonl(point_folder / "reports/evaluate/items.jsonl", items)
    parameters = swept.get("lora.r", 8) * TARGETS.get(swept.get("lora.target_modules"), 2500)
    train = {
        "trainable_parameters": parameters, "validation_loss": loss + 0.01, "training_seconds": 5.0 + parameters / 1e4,
        "peak_memory_bytes": 90_000_000 + parameters * 16,
    }  # fmt: skip
    write_json(point_folder / "metrics/train.json", train)
    write_json(
        point_folder / "metrics/evaluate.json", {"base": {"loss": 4.0}, "quantized": {"loss": 4.1}, "harness": {}}
    )
    steps = [{"step": step, "validation.loss": loss + 3 * np.exp(-step / 50)} for step in range(0, 201, 25)]
    write_jsonl(point_folder / "reports/train/history.jsonl", steps)
    point.save()
    return point


def make_sweep(
    folder: Path,
    axes: dict,
    loss=true_loss,
    generate: bool = True,
    noise: float = 0.01,
    num_rows: int = NUM_ROWS,
    seed: int = 0,
) -> Path:
    """A finished sweep over the product of the axes; test rows of one cluster in pairs."""
    rng = np.random.default_rng(seed)
    difficulty = [(int(rng.integers(5, 40)), 0.1 * rng.normal()) for _ in range(num_rows)]
    points = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    made = [make_point(folder, i, p, rng, difficulty, loss(p), generate, noise) for i, p in enumerate(points)]
    names = [point.folder.name for point in made]
    axes = {key: values for key, values in axes.items() if len(values) > 1}
    Sweep(folder, "python -m stages.train -m ...", "local", axes, names, 1, 2, 1.0, State.finished).save()
    return folder


RANKS = {"lora.r": [1, 2, 4, 8, 16], "lora.target_modules": ["attention", "mlp"], "train.learning_rate": [2e-3, 5e-3]}


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[Path, Comparison]:
    """20 settings of 2 seeds, compared."""
    folder = make_sweep(tmp_path_factory.mktemp("multirun") / "ranks", {**RANKS, "train.seed": [0, 1]}, noise=0.003)
    return folder, compare(folder)


@pytest.fixture
def ranks(compared) -> Path:
    return compared[0]


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "comparison/settings.json").read_text())


def test_the_best_its_equals_and_the_smallest_of_them(ranks):
    """Ranks 8 and 16 on mlp at 0.005 are alike by construction; all others are worse by 0.04 or more."""
    found = settings_of(ranks)
    (group,) = found["groups"]
    equals = [group["settings"][i]["swept"] for i in group["not_shown_worse"]]
    assert {(swept["lora.r"], swept["lora.target_modules"], swept["train.learning_rate"]) for swept in equals} == {
        (8, "mlp", 0.005), (16, "mlp", 0.005),
    }  # fmt: skip
    assert found["smallest"]["swept"]["lora.r"] == 8
    assert found["smallest"]["trainable_parameters"] == 12_000
    assert group["chosen_by"] == "validation_loss"
    validation = [setting["validation_loss"] for setting in group["settings"]]
    assert found["best"]["validation_loss"] == min(validation)
    losses = [setting["scores"]["loss"]["value"] for setting in group["settings"]]
    assert losses == sorted(losses)


def test_a_setting_is_the_mean_of_its_seeds_and_adopts_the_seed_of_lowest_validation_loss(ranks):
    best = settings_of(ranks)["best"]
    rows = {row["point"]: row for row in csv.DictReader((ranks / "comparison/points.csv").open())}
    seeds = [rows[name] for name in best["points"].values()]
    assert [row["train.seed"] for row in seeds] == list(best["points"]) == ["0", "1"]
    for key, value in (("loss", best["scores"]["loss"]["value"]), ("validation_loss", best["validation_loss"])):
        assert np.mean([float(row[key]) for row in seeds]) == pytest.approx(value)
    assert rows[best["point"]]["validation_loss"] == min(row["validation_loss"] for row in seeds)
    items = [
        json.loads(line)["models"]["adapter"]
        for line in (ranks / best["point"] / "reports/evaluate/items.jsonl").open()
    ]
    nats, tokens = np.sum([item["loss"] for item in items if "loss" in item], axis=0)
    assert float(rows[best["point"]]["loss"]) == pytest.approx(nats / tokens)
    assert len(rows) == 40


def test_every_score_has_an_interval_and_forgetting_is_above_the_base(ranks):
    scores = settings_of(ranks)["best"]["scores"]
    assert set(scores) == {*METRICS} - {"general_loss"} | {"forgetting"}
    assert all(score["low"] < score["value"] < score["high"] for score in scores.values())
    base = np.mean([2.0 + i / 40 for i in range(NUM_GENERAL)])
    assert scores["forgetting"]["value"] == pytest.approx(2.5 - base, abs=0.05)
    # paired with the base, row by row: what the adapter's own rows differ by is in it, and the base's
    assert scores["forgetting"]["high"] - scores["forgetting"]["low"] < 0.3


def test_the_table_for_people(compared):
    ranks, text = compared[0], compared[1].text
    assert max(len(line.replace(str(ranks.parent), "multirun")) for line in text.splitlines()) <= 120
    assert "40 points: 40 compared" in text
    assert "20 settings, 2 seeds each; 60 test rows, 20 rows of general text" in text
    assert "test loss before training: base 4.0000, quantized 4.1000" in text
    header = next(line for line in text.splitlines() if "validation" in line)
    assert header.split()[:5] == ["r", "target_modules", "learning_rate", "seeds", "parameters"]
    assert "chosen by validation loss" in text
    assert "smallest of these 2: r=8 target_modules=mlp learning_rate=0.005" in text or "it is the smallest" in text
    assert f"python -m pipeline.adopt {ranks} {settings_of(ranks)['smallest']['point']}" in text


def test_files_and_numbers_for_the_sweeps_own_run(compared):
    ranks, found = compared
    pictures = ["score.png", "loss_curves.png", "heat_map.png", "parallel_coordinates.png"]
    assert [path.name for path in found.files] == ["index.md", "settings.json", "points.csv", *pictures]
    assert {path.name for path in (ranks / "comparison").iterdir()} == {path.name for path in found.files}
    best = settings_of(ranks)["best"]
    assert found.metrics["best.loss"] == best["scores"]["loss"]["value"]
    assert found.metrics["best.loss_low"] == best["scores"]["loss"]["low"]
    assert (found.metrics["num_points"], found.metrics["num_settings"], found.metrics["num_not_shown_worse"]) == (
        40,
        20,
        2,
    )
    assert found.metrics["smallest.trainable_parameters"] == 12_000
    markdown = (ranks / "comparison/index.md").read_text()
    assert all(f"]({name})" in markdown for name in pictures)
    assert markdown.count("\n| * |") == 1
    assert "\n`*`  the best, chosen by" in markdown  # a bare mark would be a bullet
    before = {path: path.read_bytes() for path in found.files}
    compare(ranks)
    assert {path: path.read_bytes() for path in found.files} == before  # equal sweeps, equal bytes


def test_another_score_decides(tmp_path):
    folder = make_sweep(tmp_path / "s", {"lora.r": [1, 4, 8], "train.seed": [0, 1]})
    text = compare(folder, "rouge_l").text
    found = settings_of(folder)
    values = [setting["scores"]["rouge_l"]["value"] for setting in found["groups"][0]["settings"]]
    assert values == sorted(values, reverse=True)
    assert found["groups"][0]["chosen_by"] == "rouge_l"
    assert found["best"]["scores"]["rouge_l"]["value"] == values[0]
    assert "chosen by the test rows' own ROUGE-L" in text


def test_validation_on_other_rows_does_not_choose(tmp_path):
    folder = make_sweep(tmp_path / "s", {"train.eval_max_rows": [10, 50], "lora.r": [1, 8]}, generate=False)
    compare(folder)
    assert settings_of(folder)["groups"][0]["chosen_by"] == "loss"
    folder = make_sweep(tmp_path / "t", {"data.max_rows": [10, 50], "lora.r": [1, 8]}, generate=False)  # of train alone
    compare(folder)
    assert settings_of(folder)["groups"][0]["chosen_by"] == "validation_loss"


def test_settings_that_are_alike_are_said_to_be(tmp_path):
    folder = make_sweep(tmp_path / "s", {"lora.r": [4, 8, 16], "train.seed": [0, 1]}, loss=lambda swept: 0.5)
    text = compare(folder).text
    assert "this sweep cannot tell its 3 settings apart" in text
    assert settings_of(folder)["smallest"]["swept"] == {"lora.r": 4}


def test_one_seed_says_that_seeds_are_not_counted(tmp_path):
    text = compare(make_sweep(tmp_path / "s", {"lora.r": [1, 8]}, generate=False)).text
    assert "interval over test rows;" in text
    assert "Every setting has one seed" in text
    assert "Of the other 1, 1 are shown to be worse; 0 cannot be told from it." in text


def test_one_point_and_seeds_alone(tmp_path):
    text = compare(make_sweep(tmp_path / "one", {"lora.r": [8]}, generate=False)).text
    assert "One setting: there is nothing to compare it with" in text
    assert "no picture score.png" in text
    text = compare(make_sweep(tmp_path / "seeds", {"train.seed": [0, 1, 2]})).text
    assert "1 setting, 3 seeds each" in text
    assert "interval over test rows and seeds" in text


def test_points_that_did_not_finish_are_listed_with_their_reasons(tmp_path):
    folder = make_sweep(tmp_path / "s", {"lora.r": [1, 2, 4, 8, 16]}, generate=False)
    for name, state, reason in (
        ("000", State.failed, "out of memory:\nset a smaller batch"),
        ("001", State.pruned, "step 50"),
    ):
        Point.load(folder / name).end(state, reason)
    (folder / "002/reports/evaluate/items.jsonl").write_text('{"split": "te')
    (folder / "003/metrics/train.json").write_text("{}")
    text = " ".join(compare(folder).text.split())
    assert "5 points: 1 compared, 1 failed, 1 pruned, 2 damaged" in text
    assert "000 failed: out of memory: set a smaller batch" in text
    assert "001 pruned: step 50" in text
    assert "002 damaged" in text
    assert "items.jsonl: not valid JSONL" in text
    assert "003 damaged" in text
    assert "trainable_parameters" in text
    rows = list(csv.DictReader((folder / "comparison/points.csv").open()))
    assert [row["state"] for row in rows] == ["failed", "pruned", "damaged", "damaged", "finished"]


def test_a_failed_seed_leaves_its_setting_with_the_others(tmp_path):
    folder = make_sweep(tmp_path / "s", {"lora.r": [4, 8, 16], "train.seed": [0, 1]}, generate=False)
    Point.load(folder / "003").end(State.failed, "nan")
    assert "3 settings, 1 to 2 seeds each" in compare(folder).text


def test_a_point_made_twice_counts_once(tmp_path):
    folder = make_sweep(tmp_path / "s", {"lora.r": [4, 4, 8]}, generate=False)
    text = compare(folder).text
    assert "2 settings" in text
    assert "001 repeated: the settings and the seed of point 000" in text
    (entry,) = settings_of(folder)["not_compared"]
    assert (entry["point"], entry["kind"], entry["state"]) == ("001", "repeated", "finished")


def test_points_on_other_rows_are_compared_among_themselves(tmp_path):
    folder = make_sweep(tmp_path / "s", {"lora.r": [1, 4, 8, 16]}, generate=False)
    path = folder / "000/reports/evaluate/items.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[1:]) + "\n")
    text = compare(folder).text
    found = settings_of(folder)
    assert "measured on 2 different sets of rows" in text
    assert [group["num_rows"]["test"] for group in found["groups"]] == [60, 59]
    assert [len(group["settings"]) for group in found["groups"]] == [3, 1]
    assert (folder / "comparison/score_1.png").exists()
    path.write_text("\n".join(lines) + "\n")  # negative control
    compare(folder)
    assert len(settings_of(folder)["groups"]) == 1
    assert not (folder / "comparison/score_1.png").exists()


def test_axes_of_any_kind_and_number(tmp_path):
    """As a search draws them: continuous values, lists, null, several axes, a number in place of wide settings."""
    rng = np.random.default_rng(0)
    folder = make_sweep(tmp_path / "s", {"lora.r": list(range(1, 13))}, generate=False)
    for i in range(12):
        point = Point.load(folder / f"{i:03d}")
        point.swept = {
            "train.learning_rate": float(10 ** rng.uniform(-4, -2)), "train.weight_decay": float(rng.uniform(0, 0.1)),
            "lora.target_modules": [["q_proj", "v_proj", "k_proj"], "mlp"][i % 2], "train.max_grad_norm": [None, 1.0][i // 6],
            "lora.lora_alpha": float(i), "train.adam_beta1": 0.9 + i / 1000, "train.adam_beta2": 0.99 + i / 1e4,
        }  # fmt: skip
        point.save()
    found = compare(folder)
    assert max(len(line) for line in found.text.partition("best:")[0].splitlines()) <= 120
    assert "q_proj+v_proj+k_proj" in found.text
    assert "no picture heat_map.png: it takes two swept axes" in found.text or "heat_map.png" in str(found.files)
    assert {"score.png", "loss_curves.png", "parallel_coordinates.png"} <= {path.name for path in found.files}


def test_a_picture_without_its_axes_is_left_out_and_said(tmp_path):
    found = compare(make_sweep(tmp_path / "s", {"lora.target_modules": ["attention", "mlp"]}, generate=False))
    assert [path.suffix for path in found.files].count(".png") == 2
    assert "no picture score.png: no axis of numbers was swept." in found.text
    assert "no picture heat_map.png" in found.text


def test_what_is_wrong_is_said_in_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_sweep(Path("multirun/here"), {"lora.r": [1, 8]}, generate=False)
    with pytest.raises(DataError, match=r"multirun/gone: no sweep there. There are: multirun/here"):
        compare(Path("multirun/gone"))
    with pytest.raises(ConfigError, match=r"--score: 'rouge_l' was not measured.*loss, perplexity, forgetting"):
        compare(Path("multirun/here"), "rouge_l")
    for name in ("000", "001"):
        Point.load(Path("multirun/here") / name).end(State.failed, "out of memory")
    with pytest.raises(SystemExit) as stopped:
        main(["multirun/here"])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("compare: error: multirun/here: none of its 2 points can be compared")
    assert "000 failed: out of memory" in error
    assert not Path("multirun/here/comparison").exists()


EDGES = {"lora.r": [2, 4, 8], "train.learning_rate": [1e-3, 2e-3, 5e-3]}


def make_edges(folder: Path, best: dict, command: str = "python -m stages.train -m lora.r=2,4,8", **axes) -> Path:
    """A grid whose best setting is this one."""

    def loss(swept: dict) -> float:
        return 0.5 + 0.1 * sum(swept[key] != value for key, value in best.items())

    make_sweep(folder, {**EDGES, **axes}, loss, noise=0.001)
    for path in folder.glob("*/point.json"):  # whole settings, as a real point has them
        point = Point.load(path.parent)
        point.settings = asdict(compose_config([f"{key}={value}" for key, value in point.swept.items()]))
        point.save()
    sweep = Sweep.load(folder)
    sweep.command = command
    sweep.save()
    return folder


def test_a_best_on_the_edge_of_the_grid_says_which_way_to_go_on(tmp_path):
    """The highest rank, the lowest learning rate; the axis of a file comes onto the command line."""
    folder = make_edges(
        tmp_path / "s",
        {"lora.r": 8, "train.learning_rate": 1e-3},
        "python -m stages.train -m experiment=x lora.r=2,4,8 hydra.sweep.dir=multirun/s",
    )
    found = compare(folder)
    wider = "python -m stages.train -m experiment=x {} hydra.sweep.dir=multirun/s_wider{}"
    commands = [
        wider.format("lora.r=2,4,8,16", ""),
        wider.format("lora.r=2,4,8", " train.learning_rate=0.001,0.002,0.005,0.0005"),
    ]
    assert [line for line in found.text.splitlines() if line.startswith("python")] == commands
    text = " ".join(found.text.split())
    assert "edge of the grid: r=8 is the highest of 2, 4, 8, and better ones may lie beyond. Only" in text
    assert "edge of the grid: learning_rate=0.001 is the lowest of 0.001, 0.002, 0.005, and" in text
    edges = settings_of(folder)["groups"][0]["edges"]
    assert [(edge["key"], edge["beyond"], edge["command"]) for edge in edges] == [
        ("lora.r", 16, commands[0]),
        ("train.learning_rate", 0.0005, commands[1]),
    ]
    markdown = (folder / "comparison/index.md").read_text()
    assert all(f"`{command}`" in markdown for command in commands)


def edges_of(folder: Path) -> list[Edge]:
    """Without the pictures, which take a second."""
    sweep = Sweep.load(folder)
    return find_edges(Judged(read_groups(sweep)[0][0], "loss"), sweep)


@pytest.mark.parametrize(
    ("best", "axes"),
    [
        ({"lora.r": 4, "train.learning_rate": 2e-3}, {}),  # inside
        ({"lora.r": 4}, {"train.learning_rate": [2e-3]}),  # one value is no grid
        ({"lora.r": 1}, {"lora.r": [1, 2, 4], "train.learning_rate": [2e-3]}),  # no rank lies below
        ({"lora.r": 4, "train.weight_decay": 0.0}, {"train.weight_decay": [0.0, 0.1], "train.learning_rate": [2e-3]}),
        ({"lora.r": 4, "lora.target_modules": "attention"}, {"lora.target_modules": ["attention", "mlp"]}),
    ],
)
def test_what_has_nothing_beyond_is_no_edge(tmp_path, best, axes):
    assert edges_of(make_edges(tmp_path / "s", {"train.learning_rate": 2e-3, **best}, **axes)) == []


def test_neither_a_value_that_failed_further_out_nor_a_search_is_an_edge(tmp_path):
    folder = make_edges(tmp_path / "s", {"lora.r": 8, "train.learning_rate": 2e-3})
    assert [edge.key for edge in edges_of(folder)] == ["lora.r"]
    (folder / "000/trial.json").write_text("{}")
    assert edges_of(folder) == []
    (folder / "000/trial.json").unlink()
    sweep = Sweep.load(folder)
    sweep.axes["lora.r"].append(500)
    sweep.save()
    assert edges_of(folder) == []


def test_an_edge_says_where_others_inside_are_as_good(tmp_path):
    for flat in (True, False):
        best = {"train.learning_rate": 2e-3} if flat else {"train.learning_rate": 2e-3, "lora.r": 8}
        (edge,) = edges_of(make_edges(tmp_path / str(flat), best, **{"lora.r": [4, 8]}))
        assert edge.key == "lora.r"
        assert edge.is_flat is flat
        assert ("not shown to be better" in str(edge)) is flat


def test_torch_is_not_imported(tmp_path):
    folder = make_sweep(tmp_path / "s", {"lora.r": [8]}, generate=False)
    code = f"import sys, pipeline.compare as c, pathlib; c.compare(pathlib.Path({str(folder)!r})); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]
