"""Combinations of adapters against the sum written out, peft's own, and a plain reading of TIES."""

import copy
import json

import peft
import pytest
import torch

from pipeline import combination
from pipeline.config import compose_config
from pipeline.errors import ParityError
from pipeline.files import read_json
from pipeline.lora import load_adapter
from tests.small_project import make_adapter, make_project, overrides


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("project"))
    make_adapter(folder / "runs/third", compose_config(overrides(folder)), 3, r=4)
    return folder


def adapters(project):
    return [project / "models/adapter", project / "runs/third"]


def arguments(project, target, *more: str) -> list[str]:
    settings = [x for override in overrides(project) for x in ("-S", override)]
    return [*map(str, adapters(project)), "--output", str(target), *settings, *more]


def test_the_command_saves_the_linear_sum_and_checks_it(project, tmp_path):
    combination.main(arguments(project, tmp_path / "sum", "--weights", "0.7", "-0.4"))
    assert read_json(tmp_path / "sum/adapter_config.json")["r"] == 6
    made = read_json(tmp_path / "sum/provenance.json")
    assert [each["weight"] for each in made["adapters"]] == [0.7, -0.4]


def test_a_wrong_sum_is_not_kept(project, tmp_path, monkeypatch, capsys):
    right = combination.combine

    def wrong(folders, weights, *others):
        return right(folders, [weights[0] * 1.05, *weights[1:]], *others)

    monkeypatch.setattr(combination, "combine", wrong)
    with pytest.raises(SystemExit):
        combination.main(arguments(project, tmp_path / "sum"))
    assert "not the adapter on its training base" in capsys.readouterr().err
    assert not (tmp_path / "sum").exists()
    config = compose_config(overrides(project))
    wrong(adapters(project), [0.5, 0.5], "linear", 0.5, None, 0, tmp_path / "again")
    with pytest.raises(ParityError):
        combination.check_combination(adapters(project), [0.5, 0.5], "linear", tmp_path / "again", config)


def updates(project, *folders) -> dict[str, list[torch.Tensor]]:
    """By layer, each adapter's update, as peft works it out."""
    found: dict[str, list[torch.Tensor]] = {}
    for folder in folders:
        model = load_adapter(combination._load_base(compose_config(overrides(project)), torch.device("cpu")), folder)
        for name, layer in model.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                found.setdefault(name, []).append(layer.get_delta_weight("default").detach())
    assert len(found) == 14
    return found


def test_ties_with_equal_weights_is_pefts_with_weights_of_1(project, tmp_path):
    """At full rank nothing is lost, and the updates are those of peft's add_weighted_adapter."""
    combination.combine(adapters(project), [0.5, 0.5], "ties", 0.5, 64, 0, tmp_path / "ours")
    model = combination._load_base(compose_config(overrides(project)), torch.device("cpu"))
    for name, folder in zip("ab", adapters(project), strict=True):
        model = load_adapter(model, folder, name)
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "peft", "ties_svd", svd_rank=64, density=0.5)
    for name, (found, first, second) in updates(project, tmp_path / "ours", *adapters(project)).items():
        if 32 in found.shape:  # peft's own fails where the rank is over the width
            continue
        expected = model.get_submodule(name).get_delta_weight("peft")
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert float((found - 0.5 * first - 0.5 * second).abs().max()) > 0.1


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_drops_and_rescales(project, tmp_path, how):
    """Each weight of each update is there twice as large, or not at all; of dare_ties what agrees is averaged."""
    combination.combine(adapters(project), [0.7, 0.3], how, 0.5, 64, 0, tmp_path / "ours")
    for found, first, second in updates(project, tmp_path / "ours", *adapters(project)).values():
        both = 1.4 * first + 0.6 * second
        one, other = (1.4 * first, 0.6 * second) if how == "dare_linear" else (2 * first, 2 * second)
        ways = torch.stack([torch.zeros_like(one), one, other, both])
        nearest = (found - ways).abs().min(dim=0)
        assert float(nearest.values.max()) < 1e-3
        counts = nearest.indices.flatten().bincount(minlength=4) / found.numel()
        assert counts.min() > 0.05
    combination.combine(adapters(project), [0.7, 0.3], how, 0.5, 64, 0, tmp_path / "again")
    combination.combine(adapters(project), [0.7, 0.3], how, 0.5, 64, 1, tmp_path / "other")
    names = [tmp_path / name / "adapter_model.safetensors" for name in ("ours", "again", "other")]
    ours, again, other = (name.read_bytes() for name in names)
    assert ours == again != other


def test_ties_by_hand():
    """Trimmed to the largest half, signs elected by the weighted sum of what is left, what agrees averaged."""
    first, second = torch.tensor([[4.0, -3, 1, 0.5]]), torch.tensor([[-5.0, -2, 0.1, 3]])
    # trimmed: [4, -3, 0, 0] and [-5, 0, 0, 3]
    assert ties([first, second], [1.0, 1.0], 0.5) == [[-5.0, -3.0, 0.0, 3.0]]  # elected -, -, ., +
    assert ties([first, second], [1.0, 0.5], 0.5) == [[4.0, -3.0, 0.0, 3.0]]  # elected +, -, ., +
    mixed = ties([first, torch.tensor([[2.0, -1, 0, 0]])], [3.0, 1.0], 0.5)  # both agree: their weighted mean
    assert mixed == [[3.5, -2.5, 0.0, 0.0]]


def ties(updates, weights, density):
    return combination._merge(updates, weights, "ties", density).tolist()


@pytest.mark.parametrize("how", ["ties", "dare_ties"])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 1.0], [0.9, 0.1]])
def test_equal_adapters_give_that_adapter(how, weights):
    """As the paper's mean of what agrees does; weights of 1 / N do not make it smaller."""
    same = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(combination._merge([same, same], weights, how, 1.0), same)
    assert not torch.allclose(combination._merge([same, -2 * same], weights, how, 1.0), same) or weights == [0.9, 0.1]


def test_what_a_low_rank_loses_is_told(project, tmp_path):
    most = combination.combine(adapters(project), [0.5, 0.5], "ties", 0.5, 2, 0, tmp_path / "2")
    less = combination.combine(adapters(project), [0.5, 0.5], "ties", 0.5, 16, 0, tmp_path / "16")
    none = combination.combine(adapters(project), [0.5, 0.5], "ties", 0.5, 64, 0, tmp_path / "64")
    assert all(most[name] > less[name] > 0 for name in most)
    assert max(none.values()) < 1e-5


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--weights", "1"], "one each"),
        (["--rank", "4"], "exact"),
        (["--density", "0", "--how", "ties"], "--density"),
        (["--weights", "1", "0", "--how", "ties"], "over 0"),
        (["--weights", "1", "-1", "--how", "dare_ties"], "over 0"),
    ],
)
def test_bad_options_are_named(project, tmp_path, capsys, more, said):
    with pytest.raises(SystemExit):
        combination.main(arguments(project, tmp_path / "x", *more))
    assert said in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused(project, tmp_path, capsys):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(SystemExit):
        combination.main(arguments(project, tmp_path / "x"))
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "x").read_text() == "mine"


def test_adapters_of_different_bases_are_refused(project, tmp_path, capsys):
    others = []
    for number, folder in enumerate(adapters(project)):
        copied = tmp_path / str(number)
        copied.mkdir()
        for file in folder.iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
        path = copied / "provenance.json"
        path.write_text(json.dumps({**read_json(path), "base_sha256": str(number)}))
        others.append(str(copied))
    settings = [x for override in overrides(project) for x in ("-S", override)]
    with pytest.raises(SystemExit):
        combination.main([*others, "--output", str(tmp_path / "sum"), *settings])
    assert "different bases" in capsys.readouterr().err


def test_copying_a_model_for_the_sum_leaves_the_base(project):
    config = compose_config(overrides(project))
    base = combination._load_base(config, torch.device("cpu"))
    before = copy.deepcopy(base.state_dict())
    combination._write_out(base, adapters(project), [1.0, -1.0])
    changed = [name for name, tensor in base.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed
    assert all("proj" in name for name in changed)
