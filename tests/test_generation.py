"""Generation: the same tokens as transformers' own where there is no chance, the same distribution where there is."""

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small import END, PAD, tiny_llama
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sparring.actors.local import LocalWriter, choose
from sparring.methods.base import Request, Sampling
from sparring.records import tokens

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16], [20, 21, 22, 23]]


def writer(model: Any, batch_size: int = 8) -> LocalWriter:
    return LocalWriter(
        lambda: contextlib.nullcontext(model),
        source=lambda: "policy@0",
        decode=str,
        end_ids=frozenset({END}),
        pad_id=PAD,
        batch_size=batch_size,
    )


def requests(limits: Sequence[int], first_seed: int = 0) -> list[Request]:
    return [Request(tokens(p), n, first_seed + i) for i, (p, n) in enumerate(zip(PROMPTS, limits, strict=True))]


@torch.no_grad()
def test_greedy_is_generate_token_for_token_for_rows_that_end_at_different_times() -> None:
    ended = set()
    for seed in range(4):
        model = tiny_llama(seed).double()
        with torch.no_grad():
            model.model.embed_tokens.weight[END] *= 1.5  # the tied head then ends some rows early
        mine = writer(model).write(requests([12] * 5), Sampling(temperature=0))
        for p, written in zip(PROMPTS, mine, strict=True):
            options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": PAD, "eos_token_id": END}
            theirs = model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), **options)[0, len(p) :]
            assert list(written.token_ids) == theirs.tolist()
            assert written.finished == (theirs[-1].item() == END)
            ended.add(len(theirs))
    assert len(ended) >= 2  # some rows did end early


@torch.no_grad()
def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    model = tiny_llama().double()
    together = writer(model).write(requests([9] * 5), Sampling(temperature=0.9, top_p=0.95, top_k=20))
    apart = writer(model, batch_size=1).write(requests([9] * 5), Sampling(temperature=0.9, top_p=0.95, top_k=20))
    assert together == apart
    others = writer(model).write(requests([9] * 5, first_seed=50), Sampling(temperature=0.9, top_p=0.95, top_k=20))
    assert together != others


@torch.no_grad()
def test_each_row_stops_at_its_own_limit() -> None:
    limits = [3, 1, 7, 5, 2]
    written = writer(tiny_llama()).write(requests(limits), Sampling())
    for each, limit in zip(written, limits, strict=True):
        assert 1 <= len(each.token_ids) <= limit
        assert each.finished or len(each.token_ids) == limit
        assert END not in each.token_ids[:-1]


@torch.no_grad()
def test_writing_changes_neither_requests_nor_the_model_nor_the_global_random_state() -> None:
    model, asked = tiny_llama(), requests([4] * 5)
    copies, state = [list(r.token_ids) for r in asked], torch.random.get_rng_state()
    writer(model).write(asked, Sampling())
    assert [list(r.token_ids) for r in asked] == copies
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.95, 50), (0.5, 0.6, 0), (1.3, 1.0, 5)]
)
def test_choosing_follows_the_distribution_that_transformers_warpers_give(
    temperature: float, top_p: float, top_k: int
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 80) * 2
    kept = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        kept = TopKLogitsWarper(top_k)(None, kept)
    if top_p < 1:
        kept = TopPLogitsWarper(top_p)(None, kept)
    expected = kept.softmax(-1)[0].double()
    # Evenly spread draws: each token then comes up in proportion to its probability, to within one draw.
    count = 20_000
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = choose(logits.expand(count, -1), draws, Sampling(temperature, top_p, top_k))
    found = torch.bincount(chosen, minlength=80).double()
    assert (found - expected * count).abs().max() <= 1.5
    assert set(chosen.unique().tolist()) <= set(expected.nonzero().flatten().tolist())


def test_samples_of_a_model_follow_its_softmax() -> None:
    model = tiny_llama()
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
        asked = [Request(tokens([5, 6, 7]), 1, seed) for seed in range(4000)]
        first = [w.token_ids[0] for w in writer(model, batch_size=1000).write(asked, Sampling())]
    found = torch.bincount(torch.tensor(first), minlength=64)
    likely = expected * 4000 >= 5
    chi_square = ((found - expected * 4000) ** 2 / (expected * 4000))[likely].sum().item()
    freedom = int(likely.sum())
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5
