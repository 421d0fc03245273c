"""Norms, SwiGLU and rotary embeddings in C against torch's own, and which architectures' layers they are."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama

from pipeline import native_layers as layers
from pipeline.losses import ForwardPlan, plan_forward, supervised_loss
from pipeline.packing import probe_batch

TINY = {
    "vocab_size": 96, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 0,
}  # fmt: skip
ROTATIONS = (modeling_llama.apply_rotary_pos_emb, modeling_gemma.apply_rotary_pos_emb)


def make(kind: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TINY, **changes}), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms as made multiply by 1
            parameter.mul_(4) if "norm" not in name else parameter.add_(torch.randn_like(parameter) / 4)
    return model.requires_grad_(False)


def logits_and_gradient(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    inputs = torch.randn(2, 9, TINY["hidden_size"], requires_grad=True)
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    return logits.detach(), torch.autograd.grad(logits.square().sum(), inputs)[0]


def made(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def check(ours, theirs, *inputs: torch.Tensor) -> None:
    """Outputs and gradients."""
    found, expected = ours(*inputs), theirs(*(tensor.double() for tensor in inputs))
    found, expected = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (found, expected))
    torch.manual_seed(2)
    to = [torch.randn(t.shape, dtype=torch.float64) for t in expected]
    mine = [*found, *torch.autograd.grad(found, inputs, [t.float() for t in to])]
    exact = [*expected, *torch.autograd.grad(expected, inputs, to)]
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("width", [1, 8, 16, 17, 64, 172])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_each_and_its_gradient(width: int, tokens: int) -> None:
    weight = torch.randn(width)
    check(
        lambda x: layers._Norm.apply(x, weight, 1e-3),
        lambda x: weight.double() * x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt(),
        made(2, tokens, width),
    )
    check(
        layers._Swiglu.apply,
        lambda gate, up: torch.nn.functional.silu(gate) * up,
        made(2, tokens, width), made(2, tokens, width),
    )  # fmt: skip


def test_inputs_and_gradients_of_any_layout() -> None:
    weight = torch.randn(20)
    turned, repeated = made(2, 20, 9).transpose(1, 2), made(1, 9, 20).expand(2, 9, 20)
    for x in (turned, repeated):
        check(
            lambda x: layers._Norm.apply(x, weight, 1e-3).transpose(1, 2),
            lambda x: (weight.double() * x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt()).transpose(1, 2),
            x,
        )
        for inputs in ((x, made(2, 9, 20)), (made(2, 9, 20), x)):
            check(
                lambda gate, up: layers._Swiglu.apply(gate, up).transpose(0, 2),
                lambda gate, up: (torch.nn.functional.silu(gate) * up).transpose(0, 2),
                *inputs,
            )


@pytest.mark.parametrize("width", [2, 8, 20, 64])
@pytest.mark.parametrize("angles", [1, 2])
def test_rotation_and_its_gradient(width: int, angles: int) -> None:
    cos, sin = torch.randn(2, angles, 7, width)
    heads = [made(2, 7, n, width).transpose(1, 2) for n in (4, 1)]
    heads[1] = heads[1].expand(2, 3, 7, width)  # a head repeated without memory
    for query, key in (heads, [made(2, 4, 7, 2 * width)[..., ::2] for _ in range(2)]):  # numbers not side by side
        check(
            lambda q, k: layers._Rotate.apply(q, k, cos, sin),
            lambda q, k: modeling_llama.apply_rotary_pos_emb(q, k, cos.double(), sin.double()),
            query, key,
        )  # fmt: skip


def test_numbers_at_the_edge() -> None:
    gate = torch.tensor([-200.0, -90.0, -1e-30, 0.0, 1e-30, 90.0, 200.0, torch.inf, torch.nan], requires_grad=True)
    up = torch.ones(9, requires_grad=True)
    found = layers._Swiglu.apply(gate, up)
    torch.testing.assert_close(found, torch.nn.functional.silu(gate), equal_nan=True)
    to_gate, to_up = torch.autograd.grad(found[:7].sum(), [gate, up])
    torch.testing.assert_close(to_gate[:7], torch.tensor([0, 0, 0.5, 0.5, 0.5, 1.0, 1.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(to_up[:7], found[:7].detach())
    assert layers._Norm.apply(torch.tensor([[1.0, torch.nan]]), torch.ones(2), 0.1).isnan().all()
    assert layers._Norm.apply(torch.zeros(1, 4), torch.ones(4), 1e-6).eq(0).all()


def test_the_number_of_threads_changes_no_bit() -> None:
    gate, up, weight = made(333, 40), made(333, 40), torch.randn(40)

    def computed() -> list[torch.Tensor]:
        y = layers._Norm.apply(layers._Swiglu.apply(gate, up), weight, 1e-6)
        return [y, *torch.autograd.grad(y.square().sum(), [gate, up])]

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(computed())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("kind", "number"),  # of both layers: two norms and an MLP each; with the last norm and the rotation
    [("llama", 8), ("mistral", 8), ("qwen2", 8), ("qwen3", 12), ("olmo", 3), ("phi3", 6), ("cohere", 2), ("gemma", 1)],
)
def test_whose_layers_are_known(kind: str, number: int) -> None:
    """Qwen 3 has two norms more a layer; the norms of OLMo, Cohere and Gemma, the MLP of Phi 3 and Gemma and the
    rotation of Cohere are others."""
    model = make(kind)
    expected = logits_and_gradient(model)
    with layers.native_layers(model) as found:
        assert found == number
        computed = logits_and_gradient(model)
    for a, b in zip(computed, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


class OnePlus(modeling_llama.LlamaRMSNorm):
    """As Gemma's, under the names of Llama's."""

    def forward(self, x):
        return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class Same(modeling_llama.LlamaRMSNorm):
    def forward(self, x, gate=None):
        y = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return y if gate is None else y * gate


class Pair(modeling_llama.LlamaRMSNorm):
    def forward(self, x):
        return x, x


class Doubled(modeling_llama.LlamaMLP):
    def forward(self, x):
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Swapped(modeling_llama.LlamaMLP):
    def forward(self, x):
        assert x.shape[-1] == 24
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Fragile(modeling_llama.LlamaMLP):
    def forward(self, x):
        assert x.dim() == 3, x.shape[5]
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Precise(modeling_llama.LlamaMLP):
    """As Beam's."""

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj((self.act_fn(gate.float()) * up.float()).to(gate.dtype))


def test_what_only_looks_like_them_is_left_alone(monkeypatch) -> None:
    model = make("llama")
    first, second = model.model.layers
    model.model.norm.__class__, first.mlp.__class__, second.mlp.__class__ = OnePlus, Doubled, Swapped
    rotate = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: rotate(q, k, cos, -sin)
    )  # the other way round
    expected = logits_and_gradient(model)
    with layers.native_layers(model) as number:
        assert number == 4  # the norms before attention and MLP
        computed = logits_and_gradient(model)
    torch.testing.assert_close(computed, expected)


def test_a_trial_that_fails_is_no_error() -> None:
    model = make("llama")
    model.model.layers[0].mlp.__class__, model.model.layers[0].input_layernorm.__class__ = Fragile, Pair
    with layers.native_layers(model) as number:
        assert number == 6


def test_a_norm_that_takes_more_gets_it(calls) -> None:
    model, (x, gate) = make("llama"), torch.randn(2, 2, 3, 24)
    model.model.norm.__class__ = Same
    expected = model.model.norm(x, gate)
    with layers.native_layers(model) as number:
        assert number == 8
        calls.clear()
        torch.testing.assert_close(model.model.norm(x, gate), expected)
        torch.testing.assert_close(model.model.norm(x=x, gate=gate), expected)
        assert not calls
        model.model.norm(x)
        assert calls == ["norm"]


def test_a_norm_of_another_shape_is_torchs(calls) -> None:
    model, x = make("llama"), torch.randn(2, 3, 24)
    with layers.native_layers(model):
        calls.clear()
        model.model.norm.weight = torch.nn.Parameter(torch.randn(3, 24), requires_grad=False)
        expected = modeling_llama.LlamaRMSNorm.forward(model.model.norm, x)
        torch.testing.assert_close(model.model.norm(x), expected)
        model.model.norm.weight = torch.nn.Parameter(torch.randn(8), requires_grad=False)
        with pytest.raises(RuntimeError, match="size"):
            model.model.norm(x)
    assert not calls


def test_an_mlp_that_computes_in_float32_does_so_below_it_too() -> None:
    model = make("llama").bfloat16()
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 9, 24).bfloat16()
    mlp.__class__ = Precise
    expected = mlp(x)
    with layers.native_layers(model):
        assert "forward" in vars(mlp)
        assert torch.equal(mlp(x), expected)


class Steeper(torch.nn.Module):
    def __init__(self, slope=1.0):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return x * torch.sigmoid(self.slope * x)


def test_another_activation_is_no_swiglu() -> None:
    with layers.native_layers(make("llama", hidden_act="gelu")) as number:
        assert number == 6
    model = make("llama")
    model.model.layers[0].mlp.act_fn, model.model.layers[1].mlp.act_fn = Steeper(1.7), Steeper()
    with layers.native_layers(model) as number:
        assert number == 7


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What C was asked for."""
    found: list[str] = []
    call = layers._call
    monkeypatch.setattr(layers, "_call", lambda name, *given: found.append(name) or call(name, *given))
    return found


def test_what_is_not_float32_is_torchs(calls) -> None:
    model = make("llama")
    with layers.native_layers(model):
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            logits_and_gradient(model)
        assert not calls
    low = make("llama").bfloat16()
    with layers.native_layers(low), torch.no_grad():
        calls.clear()
        low(input_ids=torch.ones(1, 4, dtype=torch.int64))
    assert not calls


def test_weights_of_norms_that_are_trained_get_their_gradients(calls) -> None:
    model = make("llama").requires_grad_(True)
    with layers.native_layers(model):
        calls.clear()
        model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
        assert "norm" not in calls
        assert "swiglu_backward" in calls
        with torch.no_grad():  # a validation
            model(input_ids=torch.ones(1, 4, dtype=torch.int64))
        assert calls.count("norm") == 5
    assert model.model.norm.weight.grad.abs().sum() > 0


ROTATED = {  # what `apply_rotary_pos_emb` is called with; heads [B, H, N, D]
    "unsqueezed": ([(1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 8), (1, 5, 8)], {"unsqueeze_dim": 2}),
    "of_all_rows": ([(3, 2, 5, 8), (1, 2, 5, 8), (3, 5, 8), (3, 5, 8)], {}),  # torch repeats the key's only row
    "few_angles": ([(2, 2, 5, 8), (2, 2, 5, 8), (2, 1, 8), (2, 1, 8)], {}),
}


@pytest.mark.parametrize("case", ROTATED)
def test_rotations_that_are_not_known_are_the_architectures_own(case: str, calls) -> None:
    shapes, options = ROTATED[case]
    inputs = [torch.randn(shape) for shape in shapes]
    expected = modeling_llama.apply_rotary_pos_emb(*inputs, **options)
    named = dict(zip(("q", "k", "cos", "sin"), inputs, strict=True))
    with layers.native_layers(make("llama")):
        calls.clear()
        for found in (
            modeling_llama.apply_rotary_pos_emb(*inputs, **options),
            modeling_llama.apply_rotary_pos_emb(**named, **options),
        ):
            torch.testing.assert_close(found, expected)
        with pytest.raises(TypeError, match="k"):  # the architecture's own answer
            modeling_llama.apply_rotary_pos_emb(q=inputs[0], cos=inputs[2], sin=inputs[3])
    assert not calls


def test_everything_is_as_before_after_it() -> None:
    model, other = make("llama"), make("llama")

    def fail_inside() -> None:
        with layers.native_layers(model):
            with layers.native_layers(model) as number:
                assert number == 1  # the rotation; the modules are taken
            with layers.native_layers(other) as number:
                assert number == 8
            assert "forward" in vars(model.model.norm)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail_inside()
    assert (modeling_llama.apply_rotary_pos_emb, modeling_gemma.apply_rotary_pos_emb) == ROTATIONS
    assert not any("forward" in vars(module) for module in [*model.modules(), *other.modules()])


def test_a_training_uses_them_and_gets_the_same_gradients(calls) -> None:
    plain, model = make("llama"), make("llama")
    for each in (plain, model):
        each.model.embed_tokens.weight.requires_grad_(True)
    batch = probe_batch(model, packed=False)
    loss, _ = supervised_loss(plain, batch, ForwardPlan())
    loss.backward()
    assert not calls
    with plan_forward(model) as plan:
        mine, _ = supervised_loss(model, probe_batch(model, plan.packed), plan)
        mine.backward()
    assert {"norm_backward", "swiglu_backward", "rotate"} <= set(calls)
    torch.testing.assert_close(mine, loss)
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, plain.model.embed_tokens.weight.grad)


def test_a_second_derivative_is_an_error_not_a_wrong_number() -> None:
    x = made(3, 16)
    (gradient,) = torch.autograd.grad(layers._Norm.apply(x, torch.ones(16), 1e-6).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_without_a_compiler_they_are_torchs(monkeypatch, caplog) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    layers._library.cache_clear()
    model = make("llama")
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                with layers.native_layers(model) as number:
                    assert number == 0
                    assert "forward" not in vars(model.model.norm)
    finally:
        layers._library.cache_clear()
    assert caplog.text.count("are torch's, which takes longer") == 1
    assert "/nowhere/cc" in caplog.text
