"""The loss: one mask for numerator and denominator, padding without effect, plain transformers' figures."""

from dataclasses import replace

import pytest
import torch

from pipeline.batching import collate, first_supervised, rows_by_length
from pipeline.dataset import Example, load_split, write_split
from pipeline.errors import DataError
from pipeline.losses import measure_loss, supervised_logits, supervised_loss

UNEQUAL = [(5, 1), (3, 12), (9, 4), (1, 7)]


def plain_loss(model, split, rows) -> tuple[float, int]:
    """transformers' own loss with labels, a row at a time, without padding: sum and number of tokens."""
    total, count = 0.0, 0
    for row in rows:
        input_ids = torch.tensor(split.input_ids(row)[None].astype("int64"))
        labels = input_ids.masked_fill(torch.tensor(split.completion_mask(row)[None] == 0), -100)
        num_tokens = int((labels[:, 1:] != -100).sum())
        total += model(input_ids=input_ids, labels=labels).loss.item() * num_tokens
        count += num_tokens
    return total, count


def test_loss_of_a_batch_is_plain_transformers_loss_token_weighted(tiny_llama, make_split):
    split = make_split(UNEQUAL)
    with torch.no_grad():
        loss, num_tokens = supervised_loss(tiny_llama, collate(split, range(4), pad_token_id=0))
        expected, expected_tokens = plain_loss(tiny_llama, split, range(4))
        mean_of_rows = sum(t / n for t, n in (plain_loss(tiny_llama, split, [row]) for row in range(4))) / 4
    assert num_tokens == expected_tokens == 24
    assert loss.item() / num_tokens == pytest.approx(expected / num_tokens, abs=1e-5)
    # the mean of the rows' means is another number: what averaging micro-batches would report
    assert abs(mean_of_rows - expected / num_tokens) > 1e-2


def test_prompts_do_not_count(tiny_llama, make_split):
    """Negative control of the mask: with every token supervised the loss is another."""
    split = make_split(UNEQUAL)
    batch = collate(split, range(4), pad_token_id=0)
    everything = torch.zeros_like(batch.completion_mask)
    everything[:, 1:] = batch.attention_mask[:, 1:] == 1
    with torch.no_grad():
        loss, num_tokens = supervised_loss(tiny_llama, batch)
        all_loss, all_tokens = supervised_loss(tiny_llama, replace(batch, completion_mask=everything))
    assert all_tokens == 24 + 18 - 4  # prompt tokens join, the first of each row has no predecessor
    assert abs(all_loss.item() / all_tokens - loss.item() / num_tokens) > 1e-2


@pytest.mark.parametrize("pad_token_id", [0, 2, 50])
def test_padding_changes_nothing(tiny_llama, make_split, pad_token_id):
    split = make_split(UNEQUAL)
    with torch.no_grad():
        together, count = supervised_loss(tiny_llama, collate(split, range(4), pad_token_id))
        alone = [supervised_loss(tiny_llama, collate(split, [row], pad_token_id)) for row in range(4)]
    assert together.item() == pytest.approx(sum(loss.item() for loss, _ in alone), abs=1e-4 * count)
    assert together.item() / count == pytest.approx(sum(loss.item() for loss, _ in alone) / count, abs=1e-5)


def test_rows_in_a_batch_do_not_see_each_other(tiny_llama, make_split):
    split = make_split(UNEQUAL)
    with torch.no_grad():
        first = supervised_logits(tiny_llama, collate(split, [0, 1], 0))[0][:1]
        with_another = supervised_logits(tiny_llama, collate(split, [0, 2], 0))[0][:1]
    torch.testing.assert_close(first, with_another, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_token_weighted_mean(tiny_llama, make_split):
    split = make_split(UNEQUAL)
    loss, num_tokens = supervised_loss(tiny_llama, collate(split, range(4), 0))
    (loss / num_tokens).backward()
    weight = tiny_llama.model.layers[0].mlp.up_proj.weight
    ours = weight.grad.clone()
    tiny_llama.zero_grad()
    for row in range(4):
        input_ids = torch.tensor(split.input_ids(row)[None].astype("int64"))
        labels = input_ids.masked_fill(torch.tensor(split.completion_mask(row)[None] == 0), -100)
        share = int((labels[:, 1:] != -100).sum()) / num_tokens
        (tiny_llama(input_ids=input_ids, labels=labels).loss * share).backward()
    torch.testing.assert_close(ours, weight.grad, atol=1e-5, rtol=1e-4)
    assert ours.abs().max() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_measured_loss_is_the_same_in_every_batch_size(tiny_llama, make_split, batch_size):
    split = make_split(UNEQUAL * 3)
    measured = measure_loss(tiny_llama, split, batch_size, pad_token_id=0)
    with torch.no_grad():
        total, count = plain_loss(tiny_llama, split, range(len(split)))
    assert measured.num_tokens == count
    assert measured.loss == pytest.approx(total / count, abs=1e-5)
    assert measured.perplexity == pytest.approx(2.718281828459045 ** (total / count), rel=1e-4)


def test_measuring_uses_eval_mode_and_puts_the_mode_back(tiny_llama, make_split):
    split = make_split(UNEQUAL)
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    expected = measure_loss(tiny_llama, split, 4, 0).loss
    tiny_llama.train()
    with torch.no_grad():
        loss, num_tokens = supervised_loss(tiny_llama, collate(split, range(4), 0))
    assert abs(loss.item() / num_tokens - expected) > 1e-3  # dropout is really there
    assert measure_loss(tiny_llama, split, 4, 0).loss == expected
    assert tiny_llama.training


def test_the_first_token_of_a_row_is_never_predicted(tiny_llama, make_split):
    split = make_split([(0, 6), (0, 1)])
    batch = collate(split, [0, 1], 0)
    assert not batch.completion_mask[:, 0].any()
    with torch.no_grad():
        assert supervised_loss(tiny_llama, batch)[1] == 5
    assert split.num_supervised.tolist() == [5, 0]


def test_nothing_supervised_is_an_error(tiny_llama, make_split):
    with pytest.raises(DataError, match="no supervised token"):
        measure_loss(tiny_llama, make_split([(4, 0), (3, 0)]), 2, 0)


def test_rows_without_supervision_do_not_change_the_loss(tiny_llama, make_split, tmp_path):
    split = make_split(UNEQUAL)
    kept = [
        Example(str(i), split.input_ids(i).tolist(), split.completion_mask(i).tolist(), 0, "", []) for i in range(4)
    ]
    write_split(tmp_path / "more.arrow", [*kept, Example("x", [5, 6, 7], [0, 0, 0], 3, "", [])])
    more = load_split(tmp_path, "more")
    expected = measure_loss(tiny_llama, split, 1, 0)
    measured = measure_loss(tiny_llama, more, 1, 0)
    assert measured.num_tokens == expected.num_tokens == 24
    assert measured.loss == pytest.approx(expected.loss, abs=1e-6)


def test_batches_hold_every_row_once_the_longest_first(make_split):
    split = make_split(UNEQUAL * 2)
    batches = list(rows_by_length(split, 3))
    assert sorted(row for batch in batches for row in batch) == list(range(8))
    lengths = [int(split.lengths[row]) for batch in batches for row in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [3, 3, 2]


def test_collate_pads_on_the_right_with_nothing_attended_or_supervised(make_split):
    batch = collate(make_split([(2, 1), (4, 3)]), [0, 1], pad_token_id=77)
    assert batch.input_ids[0, 3:].tolist() == [77] * 4
    assert batch.attention_mask.tolist() == [[1] * 3 + [0] * 4, [1] * 7]
    assert batch.completion_mask.tolist() == [[False, False, True] + [False] * 4, [False] * 4 + [True] * 3]


def test_only_the_first_supervised_tokens_of_each_row_stay_so(make_split):
    batch = collate(make_split([(2, 5), (4, 1)]), [0, 1], 0)
    few = first_supervised(batch, 2)
    assert few.completion_mask.sum(dim=1).tolist() == [2, 1]
    assert few.completion_mask[0].nonzero().flatten().tolist() == [2, 3]
    assert batch.completion_mask.sum(dim=1).tolist() == [5, 1]
