"""Batches: what is one, how they are taken, and which tokens of an FFN's calls are padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_fusion.observe import batches
from peft_fusion.observe.batches import (
    Positions,
    batch_size,
    check_batch,
    padding_mask,
    shortened,
    single_sequences,
    take,
    unlabelled,
)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(4, 7),), "but got tuple"),
        ({}, "but got {}"),
        ({"text": ["a"] * 4}, "'text': 'list'"),
        ({"x": torch.tensor(1.0)}, r"'x': 'a tensor of shape \(\)'"),
    ],
)
def test_what_is_no_batch(batch: object, message: str):
    with pytest.raises(ValueError, match=f"mapping of argument names to tensors.*{message}"):
        check_batch(batch)


def test_a_number_in_front_does_not_count_sequences():
    batch = {"weight": torch.tensor(2.0), "input_ids": torch.arange(6).view(3, 2)}
    check_batch(batch)
    assert batch_size(batch) == 3
    singles = list(single_sequences(batch))
    assert [s["input_ids"].tolist() for s in singles] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert all(float(s["weight"]) == 2 for s in singles)


def test_so_many_sequences_and_no_more():
    def loader():
        for start in range(0, 100, 4):
            yield {"input_ids": torch.arange(start, start + 4).view(4, 1)}

    taken = take(loader(), 10)
    assert torch.cat([batch["input_ids"] for batch in taken]).flatten().tolist() == list(range(10))
    assert len(take(loader(), 1000)) == 25


def test_taken_sequences_do_not_hold_the_rest_of_their_batch():
    batch = {"input_ids": torch.zeros(1000, 3)}
    (taken,) = take([batch], 2)
    assert taken["input_ids"].untyped_storage().nbytes() == 2 * 3 * 4


def test_labels_stay_only_where_an_encoder_decoder_needs_them():
    batch = {"input_ids": torch.ones(1, 2), "labels": torch.ones(1, 2)}
    assert "labels" not in unlabelled(batch, False)
    assert "labels" in unlabelled(batch, True)
    assert "labels" not in unlabelled(batch | {"decoder_input_ids": torch.ones(1, 2)}, True)


def test_the_first_tokens_that_are_not_padding(monkeypatch):
    monkeypatch.setattr(batches, "MOST_LENGTH", 3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    short = shortened({"input_ids": torch.arange(7)[None], "attention_mask": mask, "labels": torch.ones(1)})
    assert short["input_ids"].tolist() == [[2, 3, 4]] and short["attention_mask"].tolist() == [[1, 1, 1]]
    assert short["labels"].shape == (1,)
    image = {"pixel_values": torch.ones(1, 3, 8, 8)}
    assert shortened(image) == image


MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])


@pytest.mark.parametrize("shape", [(2, 4, 5), (8, 5)])
def test_masks_of_both_shapes(shape):
    mask = padding_mask({"attention_mask": MASK}, torch.Size(shape), decoder=False)
    assert mask is not None and mask.shape == shape[:-1] and torch.equal(mask.flatten(), MASK.flatten().bool())
    assert padding_mask({"attention_mask": MASK}, torch.Size((3, 3, 5)), decoder=False) is None


def test_a_decoder_has_a_mask_of_its_own():
    batch = {"attention_mask": MASK, "labels": torch.tensor([[5, -100], [5, 5]])}
    mask = padding_mask(batch, torch.Size((2, 2, 3)), decoder=True)
    assert mask is not None and mask.tolist() == [[True, False], [True, True]]


def _called_with(chunks: list[Tensor], times: int = 1, name: str = "layer") -> tuple[list[bool], list[int]]:
    """The validity and the sequences that the calls of one forward pass are told, in their order."""
    positions = Positions({"attention_mask": MASK}, is_encoder_decoder=False)
    valid, sequences = [], []
    for _ in range(times):
        for chunk in chunks:
            v, s = positions.of(name, chunk)
            valid += v.tolist()
            sequences += s.tolist()
    return valid, sequences


def test_a_whole_batch():
    assert _called_with([torch.zeros(2, 4, 3)]) == (MASK.flatten().bool().tolist(), [0] * 4 + [1] * 4)
    assert _called_with([torch.zeros(8, 3)]) == (MASK.flatten().bool().tolist(), [0] * 4 + [1] * 4)


@pytest.mark.parametrize("times", [1, 3])  # a shared FFN gets the batch again and again
def test_padding_is_left_out_of_chunks(times: int):
    valid, sequences = _called_with([torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)], times)
    assert valid == ([True, True, False, True] + [True, False, True, True]) * times
    assert sequences == ([0, 0, 1, 1] * 2) * times


def test_without_a_mask_every_token_counts():
    valid, sequence = Positions({"x": torch.zeros(2, 4)}, False).of("layer", torch.zeros(2, 4, 3))
    assert valid.all() and sequence.tolist() == [0] * 4 + [1] * 4


def test_the_mask_of_an_encoder_decoder_follows_the_name():
    batch = {"attention_mask": MASK, "decoder_attention_mask": 1 - MASK}
    positions = Positions(batch, is_encoder_decoder=True)
    for name, mask in (("encoder.0", MASK), ("decoder.0", 1 - MASK)):
        assert torch.equal(positions.of(name, torch.zeros(2, 4, 3))[0], mask.flatten().bool())
