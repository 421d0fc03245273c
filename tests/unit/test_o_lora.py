"""O-LoRA's penalty and overlap against its equation, and the sum of adapters against the sum of their updates."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.plain import plain_lora
from pipeline.errors import ModelError
from pipeline.lora import attach_adapter, load_adapter, save_adapter
from pipeline.o_lora import OverlapPenalty, attach_earlier, detach_earlier, overlap, sum_adapters


def save_random(base, folder: Path, seed: int, **changes):
    torch.manual_seed(seed)
    lora = plain_lora(changes.pop("r", 4), 8.0, changes.pop("targets", "attention"))
    for name, value in changes.items():
        setattr(lora, name, value)
    model = attach_adapter(copy.deepcopy(base), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir()
    save_adapter(model, folder)
    return folder


def beside(base, earlier: Path, seed: int):
    torch.manual_seed(seed)
    model = attach_adapter(copy.deepcopy(base), plain_lora(4, 8.0, "attention"))
    attach_earlier(model, earlier)
    return model


def test_the_penalty_is_the_papers(tiny_llama, tmp_path):
    """loss_orth = sum over layers of sum_jk (A_earlier A_new^T)_jk^2, and its gradient reaches A_new alone."""
    model = beside(tiny_llama, save_random(tiny_llama, tmp_path / "a", 1), 2)
    parameters = dict(model.named_parameters())
    expected = 0.0
    for name, new in parameters.items():
        if "lora_A.default" in name:
            earlier = parameters[name.replace("default", "earlier")]
            for j in range(4):
                for k in range(4):
                    expected += float(torch.dot(earlier[j], new[k]).detach()) ** 2
    found = OverlapPenalty(model, 0.5).penalty()
    assert float(found) == pytest.approx(0.5 * expected, rel=1e-5)
    assert expected > 0.1  # else the comparison would show nothing
    found.backward()
    with_gradient = {name for name, p in parameters.items() if p.grad is not None}
    assert with_gradient == {name for name in parameters if "lora_A.default" in name}
    assert OverlapPenalty(model, 0.0).penalty() is None


def test_both_adapters_answer_and_the_new_one_alone_trains(tiny_llama, tmp_path):
    folder = save_random(tiny_llama, tmp_path / "a", 1)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = tiny_llama(ids).logits
        expected = load_adapter(copy.deepcopy(tiny_llama), folder)(ids).logits
        model = beside(tiny_llama, folder, 2).eval()
        torch.testing.assert_close(model(ids).logits, expected)  # the new one's B is 0
    assert float((expected - before).abs().max()) > 0.1
    assert all("default" in name for name, p in model.named_parameters() if p.requires_grad)


def test_the_earlier_adapter_is_whole_and_leaves_what_trains_as_it_was(tiny_llama, tmp_path):
    model = attach_adapter(copy.deepcopy(tiny_llama), plain_lora(4, 8.0, "attention"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)  # as lora_fa has it
    folder = save_random(tiny_llama, tmp_path / "a", 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.5}))
    attach_earlier(model, folder)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits)  # no dropout in it
    detach_earlier(model)
    assert all("lora_B.default" in name for name, p in model.named_parameters() if p.requires_grad)
    assert any(p.requires_grad for p in model.parameters())


def test_a_sum_of_16_bit_adapters_is_not_rounded_again(tiny_llama, tmp_path):
    folder = save_random(tiny_llama, tmp_path / "a", 1)
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    sum_adapters([folder, folder], tmp_path / "sum", [0.7, 0.3])
    rank = load_file(path)
    for name, tensor in load_file(tmp_path / "sum/adapter_model.safetensors").items():
        if "lora_B" in name:
            torch.testing.assert_close(tensor, torch.cat([rank[name].float() * 1.4, rank[name].float() * 0.6], dim=1))
            assert not torch.equal(tensor, tensor.bfloat16().float())  # which would lose something


def test_overlap_is_1_in_one_subspace_and_0_in_the_orthogonal_one(tiny_llama, tmp_path):
    model = beside(tiny_llama, save_random(tiny_llama, tmp_path / "a", 1), 2)
    parameters = dict(model.named_parameters())
    assert overlap(model) == pytest.approx(4 / 64, rel=0.5)  # random: E / I
    mixing = torch.tensor([[1.0, 2, 0, 0], [0, 1, 0, 3], [0, 0, -1, 0], [1, 0, 0, 1]])
    for name, new in parameters.items():
        if "lora_A.default" in name:
            earlier = parameters[name.replace("default", "earlier")]
            new.data = mixing @ earlier.data  # another basis of the same subspace
    assert overlap(model) == pytest.approx(1.0)
    for name, new in parameters.items():
        if "lora_A.default" in name:
            earlier = parameters[name.replace("default", "earlier")].data
            q = torch.linalg.qr(earlier.T).Q
            noise = torch.randn_like(new)
            new.data = noise - noise @ q @ q.T
    assert overlap(model) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_sum_is_the_sum_of_the_updates(tiny_llama, tmp_path, rslora):
    folders = [
        save_random(tiny_llama, tmp_path / n, s, r=r, use_rslora=rslora) for n, s, r in [("a", 1, 4), ("b", 2, 2)]
    ]
    sum_adapters(folders, tmp_path / "sum", [0.5, -2.0])
    base = copy.deepcopy(tiny_llama)
    for folder, weight, r in zip(folders, (0.5, -2.0), (4, 2), strict=True):
        scaling = 8.0 / (r**0.5 if rslora else r)
        state = load_file(folder / "adapter_model.safetensors")
        for name in [name for name in state if "lora_A" in name]:
            layer = base.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            layer.weight.data += weight * scaling * state[name.replace("lora_A", "lora_B")] @ state[name]
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = base(ids).logits
        found = load_adapter(copy.deepcopy(tiny_llama), tmp_path / "sum")(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        one = load_adapter(copy.deepcopy(tiny_llama), folders[0])(ids).logits
    assert float((found - one).abs().max()) > 0.1


def test_what_is_no_plain_lora_is_refused(tiny_llama, tmp_path):
    plain = save_random(tiny_llama, tmp_path / "a", 1)
    with pytest.raises(ModelError, match="use_dora"):
        sum_adapters([plain, save_random(tiny_llama, tmp_path / "b", 1, use_dora=True)], tmp_path / "sum")
    with pytest.raises(ModelError, match="other layers"):
        sum_adapters([plain, save_random(tiny_llama, tmp_path / "c", 1, targets="mlp")], tmp_path / "sum")
