"""Dealing samples to steps, ranks and forward passes: every sample once, the same steps in every layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.batches import StepBatchSampler


def make_lengths(num_samples, seed=0, longest=500):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, longest, (num_samples,), generator=generator).tolist()


def samplers(lengths, has_images=None, *, num_ranks=1, **options):
    """The sampler of each rank."""
    has_images = [True] * len(lengths) if has_images is None else has_images
    options = {"batch_size": 8, "micro_batch_size": 2, **options}
    return [StepBatchSampler(lengths, has_images, rank=rank, num_ranks=num_ranks, **options) for rank in range(num_ranks)]


def steps_of(ranks, batch_size=8, micro_batch_size=2):
    """Sorted samples of each step, over all ranks."""
    per_rank = [list(rank) for rank in ranks]
    assert len({len(passes) for passes in per_rank}) == 1, "a rank that has more forward passes would wait for ever"
    assert [len(passes) for passes in per_rank] == [len(rank) for rank in ranks]
    accumulation = batch_size // (micro_batch_size * len(ranks))
    passes = list(itertools.chain(*zip(*per_rank, strict=True)))
    steps = in_pieces(passes, accumulation * len(ranks))
    return [sorted(itertools.chain(*step)) for step in steps]


def in_pieces(values, size):
    return [values[start : start + size] for start in range(0, len(values), size)]


LAYOUTS = [
    {"packing": packing, "grouping": grouping} for packing in (False, True) for grouping in ("random", "modality_length")
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(max_examples=15, deadline=None)
@given(num_samples=st.integers(1, 70), num_ranks=st.sampled_from([1, 2, 4]), seed=st.integers(0, 5))
def test_every_sample_is_seen_once_in_an_epoch(layout, num_samples, num_ranks, seed):
    lengths = make_lengths(num_samples, seed)
    has_images = [length % 3 > 0 for length in lengths]
    ranks = samplers(lengths, has_images, num_ranks=num_ranks, seed=seed, **layout)
    seen = [sample for rank in ranks for batch in rank for sample in batch]
    assert all(batch for rank in ranks for batch in rank)
    assert set(seen) == set(range(num_samples))
    # Only the last step of an epoch may repeat a sample, where it has fewer than the ranks.
    assert len(seen) - num_samples <= max(0, num_ranks - 1)
    assert len({len(list(rank)) for rank in ranks}) == 1
    assert all(len(list(rank)) == len(rank) for rank in ranks)


@pytest.mark.parametrize("grouping", ["random", "modality_length"])
def test_neither_packing_nor_ranks_change_which_samples_share_a_step(grouping):
    lengths = make_lengths(50)
    has_images = [length % 4 > 0 for length in lengths]
    steps = [
        steps_of(samplers(lengths, has_images, packing=packing, num_ranks=num_ranks, grouping=grouping))
        for packing in (False, True)
        for num_ranks in (1, 2, 4)
    ]
    assert len(steps[0]) == 7
    # The last step has two samples, and more ranks than that: it may repeat some.
    assert all(other[:-1] == steps[0][:-1] for other in steps)
    assert all(set(other[-1]) >= set(steps[0][-1]) for other in steps)


def test_the_order_is_that_of_the_seed_and_the_epoch():
    lengths = make_lengths(40)
    (first,), (same,), (other,) = samplers(lengths), samplers(lengths), samplers(lengths, seed=1)
    assert list(first) == list(same)
    assert list(first) == list(first)
    assert list(first) != list(other)
    before = list(first)
    first.set_epoch(1)
    assert list(first) != before
    first.set_epoch(0)
    assert list(first) == before


def test_samples_with_and_without_images_do_not_share_a_step_until_the_rest():
    lengths = make_lengths(60)
    has_images = [sample >= 21 for sample in range(60)]
    (sampler,) = samplers(lengths, has_images)
    kinds = [{has_images[sample] for sample in step} for step in steps_of([sampler])]
    # Two steps without and four with images are whole; of 5 and 7 samples left over come a mixed step of 8 and one of 4.
    assert sorted(len(kind) for kind in kinds) == [1] * 7 + [2]
    (random,) = samplers(lengths, has_images, grouping="random")
    assert sum(len({has_images[sample] for sample in step}) == 2 for step in steps_of([random])) > 4


def padding_share(batches, lengths):
    padded = sum(len(batch) * max(lengths[sample] for sample in batch) for batch in batches)
    return 1 - sum(lengths[sample] for batch in batches for sample in batch) / padded


def test_neighbours_in_length_share_a_pass():
    lengths = make_lengths(400)
    options = {"batch_size": 64, "micro_batch_size": 8}
    (grouped,), (random,) = samplers(lengths, **options), samplers(lengths, grouping="random", **options)
    assert padding_share(list(grouped), lengths) < 0.15 < 0.35 < padding_share(list(random), lengths)


def test_packed_rows_differ_by_less_than_a_sample():
    lengths = make_lengths(640)
    (packed,) = samplers(lengths, packing=True, batch_size=64, micro_batch_size=8)
    for step in in_pieces(list(packed), 8):
        tokens = [sum(lengths[sample] for sample in row) for row in step]
        assert max(tokens) - min(tokens) < sum(lengths) / len(lengths)
        assert tokens == sorted(tokens, reverse=True)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), passes=st.integers(1, 5), size=st.integers(1, 6))
def test_no_packed_row_is_longer_than_a_padded_pass_may_be(lengths, passes, size):
    (packed,) = samplers(lengths, packing=True, batch_size=passes * size, micro_batch_size=size)
    assert all(sum(lengths[sample] for sample in row) <= size * max(lengths) for row in packed)


def test_ranks_that_wait_for_one_another_get_like_rows():
    lengths = make_lengths(256)
    for packing in (False, True):
        ranks = samplers(lengths, num_ranks=4, packing=packing, batch_size=64, micro_batch_size=4)
        for together in zip(*ranks, strict=True):
            cost = [sum(lengths[s] for s in b) if packing else max(lengths[s] for s in b) for b in together]
            assert max(cost) - min(cost) < 500 // 4


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="batch_size 8 is no multiple of 2 samples x 3 ranks"):
        samplers([1, 2], num_ranks=3)
    with pytest.raises(ValueError, match="one entry a sample, got 2 and 1"):
        samplers([1, 2], [True])
    with pytest.raises(ValueError, match="grouping must be one of modality_length, random, got 'length'"):
        samplers([1], grouping="length")
