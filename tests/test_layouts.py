"""Every layout gives the numbers of a dense, padded, full-logit computation: models, dtypes, attention, head, packing."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from small import PAD, tiny_llama
from torch import Tensor

from sparring.data.packing import Group, Segment, micro_batches, pack, packed_size, pad
from sparring.model import attention, head
from sparring.model.attention import Blocks, segment_attention
from sparring.model.head import Head
from sparring.model.logps import Scorer, checked
from sparring.model.policy import prepared
from sparring.records import tokens

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "llama, tied": ("Llama", GROUPED | {"tie_word_embeddings": True}),
    "qwen 2": ("Qwen2", GROUPED),
    "qwen 3": ("Qwen3", GROUPED | {"head_dim": 16}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": None}),
    "mistral, window": ("Mistral", GROUPED | {"sliding_window": 6}),
    "gemma 2": ("Gemma2", GROUPED | LAYERS | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma 3": ("Gemma3Text", GROUPED | LAYERS),
    "phi": ("Phi", SMALL),
    "phi 3": ("Phi3", GROUPED),
    "gpt 2": ("GPT2", GPT2 | {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 2}),
    "mixtral": ("Mixtral", GROUPED | EXPERTS),
    "granite": ("Granite", GROUPED | {"logits_scaling": 0.5, "attention_multiplier": 0.4}),
    "cohere": ("Cohere", GROUPED | {"logit_scale": 0.3}),
    "gpt-oss": ("GptOss", GROUPED | LAYERS | EXPERTS),
}
UNPACKED = {"gpt-oss": "sinks"}

GROUPS = [
    Group(tokens([5, 6, 7]), [tokens([10, 11, 12, 13, 2]), tokens([10, 11, 40, 41, 13, 2])]),  # a shared beginning
    Group(
        tokens([8]), [tokens([20, 21, 2]), tokens([22, 2]), tokens([20, 21, 23, 24, 2])]
    ),  # three, of which two agree
    Group(tokens([5, 9, 9, 9, 9, 4, 3, 3]), [tokens([30, 31, 32, 33, 34, 35, 36, 2])]),  # one, longer than the windows
    Group(tokens([7, 7]), [tokens([13, 2]), tokens([13, 2])]),  # the same twice
    Group(tokens([7, 6]), [tokens([14, 15]), tokens([14, 15, 16, 2])]),  # one begins with the other
    Group(tokens([9]), [tokens([17]), tokens([18])]),  # single tokens
]
COUNT = sum(len(group.responses) for group in GROUPS)


def build(name: str, seed: int = 0) -> Any:
    """A small model of a family, with random weights and no dropout."""
    family, keys = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**keys)
    made: Any = transformers.AutoModelForCausalLM.from_config(config)
    for p in made.parameters():  # norms and biases start at 1 and 0, which would hide a mistake in them
        if p.ndim < 2:
            torch.nn.init.normal_(p, float(p.data.float().mean()), 0.3)
    return prepared(made).eval()


def dense_token_logps(model: Any, group: Group, response: Any) -> Tensor:
    """One sequence, whole logits, shifted here, with gradient."""
    row = torch.tensor([[*group.prompt, *response]])
    logps = model(row, use_cache=False).logits[0].double().log_softmax(-1)
    first = len(group.prompt) - 1
    return logps[first : first + len(response)].gather(1, torch.tensor(list(response))[:, None]).squeeze(1)


def dense_sums(model: Any, groups: list[Group], spans: Tensor) -> Tensor:
    rows = [(group, response) for group in groups for response in group.responses]
    found = [dense_token_logps(model, *row) for row in rows]
    return torch.stack([torch.stack([f[a:b].sum(), f.sum()]) for f, (a, b) in zip(found, spans.tolist(), strict=True)])


def spans_of(groups: list[Group]) -> Tensor:
    """Some inside, some whole, some empty."""
    lengths = [len(response) for group in groups for response in group.responses]
    return torch.tensor([(i % 2, n - (i % 3 == 0) * (n > 2)) for i, n in enumerate(lengths)])


def gradients(model: Any) -> Tensor:
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def held_to_dense(model: Any, scorer: Scorer) -> None:
    """Sums and gradients of ``scorer`` are those of whole logits, one sequence at a time."""
    weights, spans = torch.linspace(-1.0, 2.0, 2 * COUNT).view(COUNT, 2), spans_of(GROUPS)

    def loss(sums: Tensor, rows: slice = slice(None)) -> Tensor:
        return (torch.nn.functional.softplus(sums / 5) * weights[rows]).sum()

    expected = dense_sums(model, GROUPS, spans)
    torch.testing.assert_close(scorer.sums(model, GROUPS, spans).double(), expected.detach(), rtol=1e-5, atol=2e-5)
    loss(expected).backward()
    dense = gradients(model)
    model.zero_grad()
    bounds = [0, *torch.tensor([len(g.responses) for g in GROUPS]).cumsum(0).tolist()]
    scorer.backward(model, GROUPS, spans, lambda a, b, sums: loss(sums, slice(bounds[a], bounds[b])))
    error = (gradients(model) - dense).norm() / dense.norm()
    assert error < 1e-4, f"{error}"


@pytest.mark.parametrize("name", MODELS)
def test_packed_log_probs_and_gradients_are_the_dense_ones(name: str) -> None:
    model = build(name)
    scorer, words = checked("segments", model, GROUPS, PAD, CPU)
    assert scorer.kind == ("dense" if name in UNPACKED else "segments"), words
    assert UNPACKED.get(name, "common prefixes once") in words
    held_to_dense(model, scorer)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNPACKED])
def test_in_bfloat16_packed_is_no_further_from_the_truth_than_padded(name: str) -> None:
    spans = spans_of(GROUPS)
    truth = dense_sums(build(name), GROUPS, spans).detach()
    model = build(name).to(torch.bfloat16)
    packed, padded = (Scorer(kind, PAD, CPU).sums(model, GROUPS, spans).double() for kind in ("segments", "dense"))  # type: ignore[arg-type]
    lengths = (spans[:, 1] - spans[:, 0]).clamp(min=1)
    errors = [float(((found - truth)[:, 0] / lengths).square().mean().sqrt()) for found in (packed, padded)]
    assert errors[0] < 1.5 * errors[1] + 0.01, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["segments", "dense"])
def test_micro_batches_change_nothing(kind: Any, dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    scorer, spans = Scorer(kind, PAD, CPU), spans_of(GROUPS)
    bounds = [0, *torch.tensor([len(g.responses) for g in GROUPS]).cumsum(0).tolist()]
    whole = scorer.sums(model, GROUPS, spans)
    batches = scorer.cut(GROUPS, max(map(scorer.size, GROUPS)))
    assert len(batches) > 1
    assert sorted(i for places in batches for i in places) == list(range(len(GROUPS)))
    for places in batches:
        rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in places])
        mine = scorer.sums(model, [GROUPS[i] for i in places], spans[rows])
        torch.testing.assert_close(mine, whole[rows], rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-4)


def test_what_a_group_shares_is_laid_out_once() -> None:
    packed = pack(GROUPS[:2], CPU)
    assert packed.input_ids[0].tolist() == [5, 6, 7, 10, 11, 12, 13, 40, 41, 13, 8, 20, 21, 22, 20, 21, 23, 24]
    assert packed.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 0, 1, 2, 1, 1, 2, 3, 4]
    trunk = Segment(0, 5), Segment(5, 7, 0), Segment(7, 10, 0)
    assert packed.segments == [*trunk, Segment(10, 11), Segment(11, 13, 3), Segment(13, 14, 3), Segment(14, 18, 3)]
    # the shared 10 and 11 are scored once; the last token before a branch predicts the first of each
    assert packed.scored.targets.tolist()[:9] == [10, 11, 12, 13, 2, 40, 41, 13, 2]
    assert packed.scored.predictors.tolist()[:9] == [2, 3, 4, 5, 6, 4, 7, 8, 9]
    for group in GROUPS:
        assert packed_size(group) == pack([group], CPU).input_ids.shape[1]
    even = pack(GROUPS, CPU, even=True)
    assert even.input_ids.shape == (1, 128)
    assert even.segments[-1] == Segment(packed_total := sum(map(packed_size, GROUPS)), 128)
    assert even.scored.predictors.max() < packed_total
    assert not even.position_ids[0, packed_total:].any()  # within any model's table of positions
    assert pad(GROUPS[:1], PAD, CPU).input_ids.tolist()[0] == [5, 6, 7, 10, 11, 12, 13, 2, PAD]


def test_micro_batches_by_hand_and_a_size_that_does_not_fit() -> None:
    assert micro_batches([5, 3, 9, 4, 1], 10) == [[0, 3], [1], [2, 4]]  # 9, 5 beside 4, 3 alone, 1 beside 9
    with pytest.raises(ValueError, match="11 tokens do not fit into max_tokens_per_micro_batch 10"):
        micro_batches([5, 11], 10)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("rows", [2, 256])
def test_blocks_are_masked_attention_with_its_gradients(
    window: int | None, softcap: float | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "ROWS", rows)
    packed = pack(GROUPS, CPU)
    length = packed.input_ids.shape[1]
    torch.manual_seed(0)
    q, k, v = (torch.randn(heads, length, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    own, before = torch.zeros(2, length, dtype=torch.long)
    for place, (start, stop, parent) in enumerate(packed.segments):
        own[start:stop], before[start:stop] = place, parent
    at, order = packed.position_ids[0], torch.arange(length)
    seen = ((own[:, None] == own) & (order <= order[:, None])) | (before[:, None] == own)
    if window is not None:
        seen &= at[:, None] - at < window
    scores = 0.3 * q @ k.repeat_interleave(2, 0).transpose(1, 2)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 0)
    weight = torch.randn(length, 4, 8, dtype=torch.float64)
    (expected.transpose(0, 1) * weight).sum().backward()
    theirs = [t.grad for t in (q, k, v)]
    q.grad = k.grad = v.grad = None
    mine = Blocks.apply(q, k, v, packed.segments, 0.3, window, softcap)  # type: ignore[no-untyped-call]
    (mine * weight).sum().backward()
    torch.testing.assert_close(mine, expected.transpose(0, 1))
    for ours, other in zip((q, k, v), theirs, strict=True):
        torch.testing.assert_close(ours.grad, other, rtol=1e-6, atol=1e-6)  # added up in float32


def test_the_fast_kernel_and_the_blocks_agree() -> None:
    packed = pack(GROUPS, CPU)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, packed.input_ids.shape[1], 8) for heads in (4, 2, 2))
    fast, _ = segment_attention(None, q, k, v, None, segments=packed.segments)
    slow = Blocks.apply(q[0], k[0], v[0], packed.segments, 8**-0.5, None, None)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(fast[0], slow)


@pytest.mark.parametrize("longest", [attention.LONGEST, 8])
def test_branches_share_one_mask_which_is_kept_once(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONGEST", longest)
    model, packed = prepared(tiny_llama()), pack(GROUPS, CPU)
    words = attention.inputs(model, packed, "segments")
    kept: list[Tensor] = []
    found = []
    for seen in (None, words["seen"]):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, packed.input_ids.shape[1], 16, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
            out, _ = segment_attention(None, q, k, v, None, segments=packed.segments, seen=seen)
        out.square().sum().backward()
        found.append([out, q.grad, k.grad, v.grad])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    masks = [t for t in kept if t.isinf().any()]
    branches = sum(s.parent >= 0 and s.stop - s.start > 1 for s in packed.segments)  # one token sees everything
    assert len(masks) == 2 * branches > 4
    own = {t.untyped_storage().data_ptr() for t in masks[branches:]}
    assert len(own) == (1 if longest > 8 else branches)
    assert attention.inputs(model.bfloat16(), packed, "segments")["seen"] is None  # whose scores take no mask


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kept", [2**27, 64 * 4 * 3])  # everything at once; three tokens at a time, groups twice
def test_the_head_s_gradients_are_autograd_s(
    cap: float | None, bias: bool, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "KEPT", {"cpu": kept})
    monkeypatch.setattr(head, "CACHED", {"cpu": 64 * 4 * 2})
    model = tiny_llama(tie_word_embeddings=False, hidden_size=16)
    layer = torch.nn.Linear(16, 64, bias=bias)
    model.lm_head = layer
    model.config.final_logit_softcapping, model.config.logit_scale = cap, 0.7
    torch.manual_seed(1)
    hidden, targets = torch.randn(9, 16, requires_grad=True), torch.randint(0, 64, (9,))
    bounds = [0, 2, 7, 9]

    def slopes(first: int, last: int, logps: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = logps.detach().requires_grad_()
            parts = leaf.split([bounds[i + 1] - bounds[i] for i in range(first, last)])
            (slope,) = torch.autograd.grad(sum(part.sum().square() for part in parts), leaf)  # type: ignore[arg-type]
        return slope

    logits = 0.7 * layer(hidden)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    logps = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    sum(part.sum().square() for part in logps.split([2, 5, 2])).backward()  # type: ignore[union-attr]
    expected = [hidden.grad, layer.weight.grad, *([layer.bias.grad] if bias else [])]
    layer.weight.grad = None
    if bias:
        layer.bias.grad = None
    made = Head(model)
    with torch.no_grad():
        torch.testing.assert_close(made.logps(hidden, targets), logps)
        mine = made.backward(hidden.detach(), targets, bounds, slopes)
    found = [mine, layer.weight.grad, *([layer.bias.grad] if bias else [])]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, None])
def test_a_head_s_gradient_has_the_precision_that_its_weight_asks_for(kept: torch.dtype | None) -> None:
    model = tiny_llama(tie_word_embeddings=False).bfloat16()
    model.lm_head.weight.grad_dtype = kept  # as FSDP2 asks for float32
    made, hidden = Head(model), torch.randn(2, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        made.backward(hidden, torch.tensor([3, 4]), [0, 2], lambda first, last, logps: torch.ones_like(logps))
    grad = model.lm_head.weight.grad
    expected = torch.autograd.functional.jacobian(
        lambda weight: (hidden.float() @ weight.T).log_softmax(-1)[[0, 1], [3, 4]].sum(), model.lm_head.weight.float()
    )
    assert grad.dtype == (kept or torch.bfloat16)
    torch.testing.assert_close(grad.float(), expected, rtol=5e-2, atol=5e-2)


def test_a_model_that_packs_wrongly_is_found_out_and_laid_out_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(*args: Any, segments: Any, **words: Any) -> Any:
        """Attention that sees across sequences, as a packing that is not understood does."""
        return segment_attention(*args, segments=[Segment(0, segments[-1].stop)], **words)

    transformers.AttentionInterface.register("leaking", leaking)
    monkeypatch.setitem(attention.FUNCTIONS, "segments", "leaking")
    scorer, words = checked("segments", build("llama"), GROUPS, PAD, CPU)
    assert scorer.kind == "dense"
    assert "nats per token" in words


def test_the_mask_for_flex_attention_is_the_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Callable[..., Tensor]] = []
    monkeypatch.setattr(
        "torch.nn.attention.flex_attention.create_block_mask",
        lambda sees, *shape, **words: seen.append(sees) or SimpleNamespace(),
    )
    packed = pack(GROUPS, CPU)
    masks = attention.inputs(build("gemma 3"), packed, "flex")["attention_mask"]
    assert set(masks) == {"sliding_attention", "full_attention"}
    length, at = packed.input_ids.shape[1], packed.position_ids[0].tolist()
    chain = {place: {place, segment.parent} for place, segment in enumerate(packed.segments)}
    owner = [place for place, s in enumerate(packed.segments) for _ in range(s.start, s.stop)]
    results = []
    for sees in seen:
        results.append(
            [[bool(sees(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(length)] for q in range(length)]
        )
    for q in range(length):
        for k in range(length):
            whole = owner[k] in chain[owner[q]] and k <= q
            assert {whole, whole and at[q] - at[k] < 6} == {found[q][k] for found in results}
