"""Generation: the same tokens as transformers' own where there is no chance, the same distribution where there is."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import END, PAD, tiny_llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sparring.actors import cache, packed
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


@torch.no_grad()
def test_greedy_rows_of_different_limits_are_generate_s_own_with_those_limits() -> None:
    model, limits = tiny_llama(3).double(), [3, 9, 1, 12, 6]
    written = writer(model, batch_size=3).write(requests(limits), Sampling(temperature=0))
    for p, limit, mine in zip(PROMPTS, limits, written, strict=True):
        options = {"do_sample": False, "max_new_tokens": limit, "pad_token_id": PAD, "eos_token_id": END}
        theirs = model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), **options)[0, len(p) :]
        assert list(mine.token_ids) == theirs.tolist()


@torch.no_grad()
def test_a_row_draws_the_same_when_its_neighbours_leave_the_batch() -> None:
    model = tiny_llama().double()
    model.model.embed_tokens.weight[END] *= 2.0
    asked, sampling = requests([9, 2, 7, 9, 4], first_seed=70), Sampling(temperature=1.2, top_p=0.95, top_k=40)
    together = writer(model).write(asked, sampling)
    assert together == [writer(model).write([each], sampling)[0] for each in asked]
    assert together == writer(model).write(asked[::-1], sampling)[::-1]
    assert len({len(each.token_ids) for each in together}) > 2
    assert {each.finished for each in together} == {True, False}


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 99])
def test_the_tokens_that_can_be_drawn_are_those_that_transformers_keeps(
    temperature: float, top_p: float, top_k: int
) -> None:
    torch.manual_seed(1)
    logits = torch.randn(5, 8)
    kept = TemperatureLogitsWarper(temperature)(None, logits.clone())
    if top_k:
        kept = TopKLogitsWarper(top_k)(None, kept)
    if top_p < 1:
        kept = TopPLogitsWarper(top_p)(None, kept)
    draws = torch.arange(4000, dtype=torch.float64) / 4000
    for row in range(5):
        chosen = choose(logits[row].expand(4000, -1), draws, Sampling(temperature, top_p, top_k))
        assert chosen.unique().tolist() == kept[row].isfinite().nonzero().flatten().tolist()


def test_random_draws_pass_a_chi_square_test_against_the_exact_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    count, temperature = 20_000, 0.7
    weights = [math.exp(x / temperature) for x in logits[0].tolist()]
    draws = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = torch.bincount(choose(logits.expand(count, -1), draws, Sampling(temperature)), minlength=4).tolist()
    expected = [count * weight / sum(weights) for weight in weights]
    chi_square = sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True))
    assert chi_square < 16.3  # 3 degrees of freedom: exceeded once in a thousand


def test_the_first_and_the_last_draw_stay_inside_the_distribution() -> None:
    # 0.6, 0.3, 0.1 of which top_p 0.7 keeps two: below 2/3 the first, from there the second, never the third.
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    draws = torch.tensor([0.0, 0.66, 0.67, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits.expand(4, -1), draws, Sampling(1.0, 0.7)).tolist() == [0, 0, 1, 1]


def test_a_draw_of_0_takes_the_first_token_that_has_any_probability() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0]])
    assert choose(logits, torch.zeros(1, dtype=torch.float64), Sampling()).tolist() == [1]


def test_temperature_0_takes_the_likeliest_whatever_is_drawn_and_changes_no_argument() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
    draws = torch.tensor([0.999, 0.0], dtype=torch.float64)
    copies = logits.clone(), draws.clone()
    assert choose(logits, draws, Sampling(temperature=0, top_p=0.9, top_k=2)).tolist() == [1, 0]
    choose(logits, draws, Sampling(0.5, 0.6, 2))
    assert torch.equal(logits, copies[0])
    assert torch.equal(draws, copies[1])


@torch.no_grad()
def test_a_row_that_may_write_nothing_writes_nothing_whatever_stands_beside_it() -> None:
    asked = requests([0, 3, 3, 3, 3])
    alone = writer(tiny_llama()).write(asked[:1], Sampling())[0]
    assert list(alone.token_ids) == []
    assert writer(tiny_llama()).write(asked, Sampling())[0] == alone


def small_model(family: str, **changes: Any) -> Any:
    """A model of ``family`` about as small as ``tiny_llama``."""
    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "bos_token_id": None,
    }
    own: dict[str, dict[str, Any]] = {
        "gemma2": {"num_hidden_layers": 3, "sliding_window": 4, "layer_types": SLIDING},
        "gemma3_text": {
            "num_hidden_layers": 3,
            "sliding_window": 4,
            "layer_types": SLIDING,
            "query_pre_attn_scalar": 8,
        },
        "mistral": {"sliding_window": 4},
        "mixtral": {"num_local_experts": 4},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
        "phi": {"num_key_value_heads": 4},
    }
    torch.manual_seed(7)
    shape = {} if family == "gpt2" else common
    ends = {"vocab_size": 64, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": None, "initializer_range": 0.2}
    config = AutoConfig.for_model(family, **(shape | ends | own.get(family, {}) | changes))
    experts = {"experts_implementation": "eager"} if family == "mixtral" else {}  # the only one in float64
    return AutoModelForCausalLM.from_config(config, **experts).eval().double()


SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "mixtral", "gpt2", "phi"]


def generated(model: Any, prompt: Sequence[int], limit: int) -> list[int]:
    """What transformers writes by itself."""
    options = {"do_sample": False, "max_new_tokens": limit, "pad_token_id": PAD, "eos_token_id": END}
    written = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
    return list(written[0, len(prompt) :].tolist())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [3, 8])
def test_every_family_is_written_packed_and_writes_what_generate_writes(family: str, batch_size: int) -> None:
    model, limits = small_model(family), [12, 3, 9, 12, 7]
    mine = writer(model, batch_size)
    written = mine.write(requests(limits), Sampling(temperature=0))
    assert [list(w.token_ids) for w in written] == [
        generated(model, p, n) for p, n in zip(PROMPTS, limits, strict=True)
    ]
    assert set(mine.layouts.values()) == {"segments"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bloom", {"n_layer": 2, "n_head": 2, "hidden_size": 32}),  # position biases
        ("mamba", {"num_hidden_layers": 2, "state_size": 4, "expand": 1}),  # a state instead of keys
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2, "window_size": 4}),
    ],
)
def test_models_that_cannot_be_packed_are_written_padded(family: str, changes: dict[str, Any]) -> None:
    model = small_model(family, **changes)
    mine = writer(model)
    prompts = PROMPTS if family == "gpt_neo" else PROMPTS[:1]  # the others do not bear padding, in float64 or at all
    asked = [Request(tokens(p), 8, i) for i, p in enumerate(prompts)]
    written = mine.write(asked, Sampling(temperature=0))
    assert set(mine.layouts.values()) == {"dense"}
    assert [list(w.token_ids) for w in written] == [generated(model, p, 8) for p in prompts]


@torch.no_grad()
def test_samples_of_one_prompt_are_those_of_the_prompt_alone() -> None:
    model = tiny_llama().double()
    asked = [Request(tokens(PROMPTS[i % 2]), 5 + i, 40 + i) for i in range(12)]
    together = writer(model, batch_size=7).write(asked, Sampling(temperature=1.1))
    assert together == [writer(model).write([each], Sampling(temperature=1.1))[0] for each in asked]


@torch.no_grad()
def test_long_rows_outgrow_their_cache_without_a_change_in_what_they_write(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("qwen3", eos_token_id=None)
    asked = requests([40, 31, 40, 8, 22])
    whole = writer(model).write(asked, Sampling())
    monkeypatch.setattr(cache, "ROOM", 3)
    assert writer(model).write(asked, Sampling()) == whole
    assert writer(model, batch_size=2).write(asked, Sampling()) == whole
    monkeypatch.setattr(packed, "READ", 6)
    assert writer(model).write(asked, Sampling()) == whole


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_requests_are_written_the_same_and_leave_the_model_as_it_was(dtype: torch.dtype) -> None:
    model = tiny_llama(num_key_value_heads=1).to(dtype)
    asked, before = [Request(tokens(p), 30, i) for i, p in enumerate(PROMPTS * 4)], model.config._attn_implementation
    first = writer(model, batch_size=6).write(asked, Sampling(0.8, 0.9))
    assert writer(model, batch_size=6).write(asked, Sampling(0.8, 0.9)) == first
    assert model.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_float32_and_bfloat16_models_give_the_logits_of_plain_forward_passes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert packed.can_pack(tiny_llama(num_key_value_heads=1).to(dtype), "segments")


def test_adapters_are_written_with() -> None:
    model = tiny_llama().double()
    plain = writer(model).write(requests([9] * 5), Sampling(temperature=0))
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    written = writer(tuned.double()).write(requests([9] * 5), Sampling(temperature=0))
    assert written != plain
    assert [list(w.token_ids) for w in written] == [generated(tuned.get_base_model(), p, 9) for p in PROMPTS]


def test_finished_rows_are_told_once_each() -> None:
    told: list[int] = []
    mine = LocalWriter(
        lambda: contextlib.nullcontext(tiny_llama()),
        source=lambda: "policy@0",
        decode=str,
        end_ids=frozenset({END}),
        pad_id=PAD,
        batch_size=2,
        tick=told.append,
    )
    mine.write(requests([0, 3, 1, 7, 5]), Sampling())
    assert sum(told) == 5


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1.3), Sampling(1.0, 0.9), Sampling(1.0, 0.9999), Sampling(0.8, 0.9, 40)]
)
@pytest.mark.parametrize("size", [256, 1000, 5000])
def test_a_large_vocabulary_is_drawn_from_in_proportion_and_row_by_row(sampling: Sampling, size: int) -> None:
    torch.manual_seed(3)
    logits = torch.randn(1, size) * 3
    kept = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        kept = TopKLogitsWarper(sampling.top_k)(None, kept)
    if sampling.top_p < 1:
        kept = TopPLogitsWarper(sampling.top_p)(None, kept)
    count = 20_000
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = torch.cat([choose(logits.expand(2000, -1), part, sampling) for part in draws.split(2000)])
    found = torch.bincount(chosen, minlength=size).double()
    assert (found - kept.softmax(-1)[0].double() * count).abs().max() <= 1.6
    some = torch.tensor([0.0, 0.3, 0.9, 1 - 2**-53], dtype=torch.float64)
    many = torch.cat([logits, torch.randn(3, size) * torch.tensor([[0.01], [1.0], [9.0]])])
    apart = [choose(many[row : row + 1], some[row : row + 1], sampling) for row in range(4)]
    assert choose(many, some, sampling).tolist() == torch.cat(apart).tolist()


def test_tokens_without_probability_are_never_drawn_at_the_edges_of_blocks() -> None:
    logits = torch.full((2, 1024), -math.inf)
    logits[:, 300:310] = 0.0
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits, draws, Sampling()).tolist() == [300, 309]
