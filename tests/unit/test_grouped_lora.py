"""The deltas of all segments in one product. torch computes it on a CPU too, a group at a time; no GPU is at hand here."""

import logging

import pytest
import torch

from pipeline import grouped_lora
from pipeline.grouped_lora import TOLERANCE, GroupedDeltas, is_to_be_used, largest_difference
from tests.standins import CPU

CUDA = torch.device("cuda")


def test_outputs_and_gradients_are_those_of_plain_products() -> None:
    assert largest_difference(CPU) < TOLERANCE


@pytest.mark.parametrize("dimensions", [(2, 3), (2, 2)])  # those of outputs, and those of the matrices' gradients
def test_a_wrong_kernel_is_found(monkeypatch, dimensions: tuple[int, int]) -> None:
    right = grouped_lora.grouped_mm

    def wrong(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        result = right(a, b, offs=offs)
        if (a.dim(), b.dim()) == dimensions:
            result[:3] = 0  # of the first tokens, or the first groups
        return result

    monkeypatch.setattr(grouped_lora, "grouped_mm", wrong)
    assert largest_difference(CPU) > TOLERANCE


@pytest.mark.parametrize("tokens", [{128, 1008}, {128}, {1008}])  # of the trials
def test_a_kernel_that_carries_nan_into_other_segments_is_found(monkeypatch, tokens: set[int]) -> None:
    right = grouped_lora.grouped_mm

    def wrong(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        result = right(a, b, offs=offs)
        return result + 0 * b.sum() if b.dim() == 2 and len(b) in tokens else result

    monkeypatch.setattr(grouped_lora, "grouped_mm", wrong)
    assert not largest_difference(CPU) < TOLERANCE


def test_nan_stays_in_its_segment() -> None:
    lengths, made_up = [7, 20, 5], torch.Generator().manual_seed(0)
    x, y = (torch.randn(32, 16, generator=made_up).bfloat16().requires_grad_() for _ in range(2))
    with torch.no_grad():
        x[8] = torch.nan
    matrices = [torch.randn(shape, generator=made_up, requires_grad=True) for shape in [(8, 16), (16, 8)] * 3]
    ends = torch.tensor(lengths).cumsum(0, dtype=torch.int32)
    found = GroupedDeltas.apply(y.clone(), x, ends, torch.ones(3), [0, 1, 2], *matrices)
    first, second, third = found.split(lengths)
    assert [bool(part.isnan().any()) for part in (first, second, third)] == [False, True, False]
    to_x, *gradients = torch.autograd.grad(found, [x, *matrices], torch.ones_like(found))
    assert not to_x.isnan().any()
    assert [bool(gradient.isnan().any()) for gradient in gradients] == [False] * 2 + [True] * 2 + [False] * 2


@pytest.mark.parametrize(
    ("capability", "difference", "expected", "said"),
    [((9, 0), 0.001, True, ""), ((9, 0), 0.3, False, "by 0.3 of"), ((9, 0), float("nan"), False, "by nan of"),
     ((9, 0), RuntimeError("no kernel image"), False, "no kernel image"), ((8, 0), 0.001, False, "")],
)  # fmt: skip
def test_a_gpu_that_cannot_takes_a_product_a_segment(
    monkeypatch, caplog, capability, difference, expected: bool, said: str
) -> None:
    def measured(device: torch.device) -> float:
        if isinstance(difference, RuntimeError):
            raise difference
        return difference

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(grouped_lora, "largest_difference", measured)
    with caplog.at_level(logging.WARNING):
        assert is_to_be_used(CUDA) is expected
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


def test_a_cpu_takes_a_product_a_segment() -> None:
    assert not is_to_be_used(CPU)


@pytest.mark.parametrize(
    ("dtype", "features", "ranks", "expected"),
    [("bfloat16", 64, [4, 8], True), ("bfloat16", 12, [4, 8], False), ("float32", 64, [4, 8], False),
     ("bfloat16", 64, [8, 16, 32, 64] * 2, True), ("bfloat16", 64, [4, 4, 4, 256], False)],
)  # fmt: skip
def test_layers_that_the_kernel_does_not_take(dtype: str, features: int, ranks: list[int], expected: bool) -> None:
    x, y = torch.empty(5, features, dtype=getattr(torch, dtype)), torch.empty(5, 32, dtype=getattr(torch, dtype))
    assert grouped_lora.takes(x, y, ranks, len(ranks)) is grouped_lora.takes(y, x, ranks, len(ranks)) is expected
    assert not grouped_lora.takes(x, y.float(), ranks, len(ranks))


def test_gradients_keep_no_more_memory_than_their_own() -> None:
    matrices = [torch.randn(shape, requires_grad=True) for shape in [(2, 16), (24, 2), (16, 16), (24, 16)]]
    x, y = torch.randn(9, 16).bfloat16(), torch.randn(9, 24).bfloat16()
    ends = torch.tensor([4, 9], dtype=torch.int32)
    GroupedDeltas.apply(y.requires_grad_().clone(), x, ends, torch.ones(2), [0, 1], *matrices).sum().backward()
    for matrix in matrices:
        assert matrix.grad.untyped_storage().nbytes() == 4 * matrix.numel()


def test_a_frozen_matrix_has_no_gradient() -> None:
    matrices = [torch.randn(shape, requires_grad=shape[0] == 24) for shape in [(2, 16), (24, 2)]]
    x, ends = torch.randn(9, 16).bfloat16(), torch.tensor([9], dtype=torch.int32)
    GroupedDeltas.apply(torch.zeros(9, 24).bfloat16(), x, ends, torch.ones(1), [0], *matrices).sum().backward()
    assert matrices[0].grad is None
    assert matrices[1].grad.any()
