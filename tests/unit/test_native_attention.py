"""Attention in C against torch's own."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline import native_attention
from pipeline.native_attention import attend, takes
from pipeline.packing import packed_sdpa

SCALE = 0.3


def make_heads(
    batch: int, length: int, heads: tuple[int, int], width: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Query, key and value as transformers has them: [B, heads, N, D] over memory of [B, N, heads, D]."""
    torch.manual_seed(0)
    made = [torch.randn(batch, length, n, width).to(dtype) for n in (heads[0], heads[1], heads[1])]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]


def torchs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE, enable_gqa=True)
    return output.transpose(1, 2)


def with_gradients(output: torch.Tensor, heads: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    gradient = torch.randn(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, heads, gradient)]


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("width", [8, 20, 64])
@pytest.mark.parametrize("length", [1, 7, 64, 65, 333])  # a block of keys is 64
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradients(heads: tuple[int, int], width: int, length: int, dtype: torch.dtype) -> None:
    check(heads, width, length, dtype)


@pytest.mark.parametrize("width", [72, 128])
@pytest.mark.parametrize("length", [3, 191])
def test_short_rows_of_wide_heads_in_bfloat16(width: int, length: int) -> None:
    check((4, 2), width, length, torch.bfloat16)


def check(heads: tuple[int, int], width: int, length: int, dtype: torch.dtype) -> None:
    ours = make_heads(2, length, heads, width, dtype)
    assert takes(*ours)
    found = with_gradients(attend(*ours, None, SCALE), ours)
    exact = [tensor.detach().float().requires_grad_() for tensor in ours]
    expected = with_gradients(torchs(*exact), exact)
    assert all(tensor.dtype is dtype for tensor in found)
    tolerance = (
        {"rtol": 1e-5, "atol": 3e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1e-3 * max(50, width)}
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.float(), theirs, **tolerance)


def test_rows_end_to_end_see_themselves_alone() -> None:
    lengths = [5, 1, 70, 16]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    heads = make_heads(1, sum(lengths), (4, 2), 8)
    found = with_gradients(attend(*heads, ends, SCALE), heads)
    rows = [
        [tensor.detach().requires_grad_() for tensor in row]
        for row in zip(*(t.split(lengths, 2) for t in heads), strict=True)
    ]
    together = torch.cat([torchs(*row) for row in rows], dim=1)
    expected = with_gradients(together, [tensor for row in rows for tensor in row])
    torch.testing.assert_close(found[0], expected[0])
    for i in range(3):
        torch.testing.assert_close(found[1 + i], torch.cat(expected[1 + i :: 3], dim=2), rtol=1e-5, atol=1e-5)

    moved = attend(*heads, ends + torch.tensor([0, 1, 0, 0, 0]).int(), SCALE)
    assert not torch.allclose(moved[:, 5], found[0][:, 5]), "a row that begins elsewhere is another row"


def test_the_number_of_threads_changes_no_bit(monkeypatch) -> None:
    heads = make_heads(3, 100, (4, 2), 8)
    results = []
    for number in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        results.append(with_gradients(attend(*heads, None, SCALE), heads))
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


def test_scores_of_any_size_and_what_is_no_number() -> None:
    query, key, value = make_heads(1, 100, (2, 2), 8)
    torch.testing.assert_close(attend(1e4 * query, key, value, None, SCALE), torchs(1e4 * query, key, value))
    with torch.no_grad():
        query[0, 1, 50, 3] = torch.nan
    output = attend(query, key, value, None, SCALE)
    assert output[0, 50, 1].isnan().all()
    assert output.isnan().sum() == 8
    assert with_gradients(output, [key])[1][0, 1, :51].isnan().all()


def test_gradients_of_large_scores() -> None:
    heads = make_heads(1, 100, (2, 2), 8)
    large = [(1e2 * heads[0]).detach().requires_grad_(), *heads[1:]]
    exact = [tensor.detach().double().requires_grad_() for tensor in large]
    found = with_gradients(attend(*large, None, SCALE), large)
    expected = with_gradients(torchs(*exact), exact)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 1e-3


def test_it_is_an_operator_as_torch_wants_one() -> None:
    ends = torch.tensor([0, 4, 9]).int()
    heads = make_heads(1, 9, (4, 2), 8)
    torch.library.opcheck(native_attention._forward, (*heads, ends, SCALE))
    detached = [tensor.detach() for tensor in heads]
    for inputs in (detached, [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in detached]):
        output, logs = native_attention._forward(*inputs, ends, SCALE)
        torch.library.opcheck(native_attention._backward, (*inputs, ends, SCALE, output, logs, torch.ones_like(output)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # the plan's
        fake = [mode.from_tensor(tensor) for tensor in heads]
        output = attend(*fake, None, SCALE)
        assert output.shape == (1, 9, 4, 8)
        assert [g.shape for g in torch.autograd.grad(output.sum(), fake)] == [tensor.shape for tensor in heads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_and_gradients_of_any_layout(dtype: torch.dtype) -> None:
    """One key head repeated without memory, values with the width outermost, a gradient that is one number."""
    query, key, value = make_heads(2, 20, (4, 1), 8, dtype)
    inputs = [query, key.expand(2, 2, 20, 8), value.transpose(2, 3).contiguous().transpose(2, 3).expand(2, 2, 20, 8)]
    found = torch.autograd.grad(attend(*inputs, None, SCALE).sum(), [query, key, value])
    expected = torch.autograd.grad(torchs(*(tensor.float() for tensor in inputs)).sum(), [query, key, value])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **({} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}))


def test_rows_without_tokens() -> None:
    heads = make_heads(1, 9, (2, 2), 8)
    expected = attend(*heads, torch.tensor([0, 4, 9]).int(), SCALE)
    assert torch.equal(attend(*heads, torch.tensor([0, 0, 4, 4, 9, 9]), SCALE), expected)
    assert attend(*make_heads(0, 5, (2, 2), 8), None, SCALE).shape == (0, 5, 2, 8)


def test_weights_that_would_make_subnormal_products_are_0() -> None:
    """The last query's weight of the first key is 2^-80 (then 2^-40) of that of the second."""
    for bits, is_kept in ((40, True), (80, False)):
        query, key, value = (torch.ones(1, 1, 2, 8) for _ in range(3))
        key[0, 0, 0] = 1 - bits * math.log(2) / 8
        heads = [tensor.requires_grad_() for tensor in (query, key, value)]
        to_last = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
        to_value, exact = (
            torch.autograd.grad((output * to_last).sum(), heads[2])[0][0, 0, 0]
            for output in (
                attend(*heads, None, 1.0),
                F.scaled_dot_product_attention(*heads, is_causal=True, scale=1.0).transpose(1, 2),
            )
        )
        assert bool(exact.all())
        assert bool(to_value.any()) is is_kept


def test_what_would_be_read_beyond_its_end_is_refused() -> None:
    query, key, value = make_heads(2, 6, (4, 2), 8)
    assert takes(query, key, value)
    assert not takes(query, key[:1], value[:1])
    assert not takes(query, key[:, :, :3], value[:, :, :3])
    assert not takes(query[:, :3], key, value)
    assert not takes(query, key[..., :4], value[..., :4])
    assert not takes(*(tensor[..., :0] for tensor in (query, key, value)))
    with pytest.raises(ValueError, match=r"rows from 0 to 5, and the batch is \[1, 6\]"):
        attend(query[:1], key[:1], value[:1], torch.tensor([0, 5]).int(), SCALE)
    with pytest.raises(ValueError, match="rows from 0 to 6"):
        attend(query, key, value, torch.tensor([0, 6]).int(), SCALE)


@pytest.mark.parametrize(
    ("width", "dtype", "length", "longest", "expected"),
    [(72, torch.float32, 5, 5, False), (128, torch.bfloat16, 191, 191, True), (129, torch.bfloat16, 191, 191, False),
     (72, torch.bfloat16, 192, 192, False), (72, torch.bfloat16, 300, 150, True), (72, torch.bfloat16, 300, None, False),
     (64, torch.bfloat16, 300, 300, True)],
)  # fmt: skip
def test_wide_heads(width: int, dtype: torch.dtype, length: int, longest: int | None, expected: bool) -> None:
    assert takes(*make_heads(1, length, (2, 2), width, dtype), longest) is expected


@pytest.mark.parametrize("change", ["float16", "dtypes", "autocast"])
def test_what_is_left_to_torch(change: str) -> None:
    heads = make_heads(1, 5, (2, 2), 8)
    if change == "float16":
        heads = [tensor.half() for tensor in heads]
    if change == "dtypes":
        heads[0] = heads[0].bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert not takes(*heads)
    assert takes(*make_heads(1, 5, (2, 2), 8))


def test_a_window_shorter_than_the_row_is_left_to_torch() -> None:
    heads = make_heads(1, 20, (2, 2), 8)
    module = torch.nn.Module()
    whole, _ = packed_sdpa(module, *heads, None, scaling=SCALE, sliding_window=20)
    assert torch.equal(whole, attend(*heads, None, SCALE))
    windowed, _ = packed_sdpa(module, *heads, None, scaling=SCALE, sliding_window=4)
    torch.testing.assert_close(windowed[:, :4], whole[:, :4])
    assert not torch.allclose(windowed[:, 4:], whole[:, 4:])


@pytest.mark.parametrize(
    ("compiler", "said"),
    [("/nowhere/cc", "/nowhere/cc"), ("false", "exit status 1"), ("cc -include no.h", "no.h"), ('cc "', "No closing")],
)
def test_without_a_compiler_attention_is_torchs(compiler: str, said: str, monkeypatch, caplog) -> None:
    monkeypatch.setenv("CC", compiler)
    native_attention._library.cache_clear()
    native_attention.compile_kernel.cache_clear()
    heads = make_heads(1, 9, (4, 2), 8)
    try:
        with caplog.at_level(logging.WARNING):
            found, _ = packed_sdpa(torch.nn.Module(), *heads, None, scaling=SCALE)
            packed_sdpa(torch.nn.Module(), *heads, None, scaling=SCALE)
    finally:
        native_attention._library.cache_clear()
    torch.testing.assert_close(found, torchs(*heads))
    assert caplog.text.count("attention on the CPU is torch's") == 1
    assert said in caplog.text
