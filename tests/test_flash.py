"""FlashAttention, which computes on CUDA: what its libraries are given, through transformers, by functions of their signatures.

They take queries and keys of many sequences one after the other, are told where each begins, and mask from the bottom right.
"""

import functools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_generation import PROMPTS, generated, requests, small_model
from test_layouts import CPU, GROUPS, MODELS, PAD, UNPACKED, build, dense_sums, held_to_dense, spans_of
from torch import Tensor
from toys import toy_tokenizer

from sparring.actors.packed import Batch, Row, can_pack
from sparring.actors.slots import SlotBatch, cannot_slot
from sparring.config import ModelConfig
from sparring.data.packing import Segment
from sparring.methods.base import Sampling
from sparring.model import flash
from sparring.model.flash import Laid, check_flash, sequences
from sparring.model.flex import tiles
from sparring.model.logps import Scorer, checked
from sparring.run import train

KERNEL: Any = "flash_attention_2"


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest: tuple[int, int],
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """What the library makes of queries [T, H, D] and keys [L, G, D], with its checks; in float32 too, which it refuses."""
    assert q.dtype == k.dtype == v.dtype
    assert k.shape == v.shape
    assert q.shape[2] == k.shape[2]
    assert q.shape[2] % 8 == q.shape[1] % k.shape[1] == 0
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert all(isinstance(most, int) for most in longest)
    out = []
    own, seen_by = (zip(b[:-1].tolist(), b[1:].tolist(), strict=True) for b in (cu_seqlens_q, cu_seqlens_k))
    for (q_start, q_stop), (k_start, k_stop) in zip(own, seen_by, strict=True):
        queries = q[q_start:q_stop].transpose(0, 1)
        keys, values = (
            t[k_start:k_stop].transpose(0, 1).repeat_interleave(len(queries) // t.shape[1], 0) for t in (k, v)
        )
        scores = queries @ keys.transpose(1, 2) * (softmax_scale or q.shape[2] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        count, seen = q_stop - q_start, k_stop - k_start
        assert (count <= longest[0], seen <= longest[1]) == (True, True)
        away = torch.arange(count)[:, None] + seen - count - torch.arange(seen)  # how far before the query a key is
        hidden = (away < 0) if causal else torch.zeros_like(away, dtype=torch.bool)
        if window_size[0] >= 0:
            hidden = hidden | (away > window_size[0])
        out.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    assert (q_stop, k_stop) == (len(q), len(k))
    return torch.cat(out)


def version_2(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, alibi_slopes: None = None, deterministic: bool = False, return_attn_probs: bool = False,
    block_table: None = None,
) -> Tensor:  # fmt: skip
    """``flash_attn.flash_attn_varlen_func``."""
    assert dropout_p == 0
    longest = max_seqlen_q, max_seqlen_k
    return attended(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, causal, window_size, softcap)


def version_3(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_q: None = None, seqused_k: None = None, softmax_scale: float | None = None, causal: bool = False, qv: None = None,
    q_descale: None = None, k_descale: None = None, v_descale: None = None, window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1, pack_gqa: None = None, deterministic: bool = False,
    sm_margin: int = 0, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """``flash_attn_interface.flash_attn_varlen_func``."""
    longest = max_seqlen_q, max_seqlen_k
    return attended(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, causal, window_size, softcap)


def install(monkeypatch: pytest.MonkeyPatch, varlen: Any) -> None:
    """Let transformers find ``varlen`` in the libraries' packages."""

    def unused(*args: Any, **options: Any) -> Any:
        raise AssertionError("only packed rows are attended so here")

    two, three, padding = (
        types.ModuleType(name) for name in ("flash_attn", "flash_attn_interface", "flash_attn.bert_padding")
    )
    for module in (two, three):
        vars(module).update(flash_attn_func=unused, flash_attn_varlen_func=varlen, flash_attn_with_kvcache=unused)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(padding).update(pad_input=unused, unpad_input=unused)
    monkeypatch.setitem(sys.modules, padding.__name__, padding)
    for version in (2, 3):
        there = lambda *args, **options: True  # noqa: E731
        monkeypatch.setattr(transformers.modeling_flash_attention_utils, f"is_flash_attn_{version}_available", there)
    monkeypatch.setattr(transformers.modeling_flash_attention_utils, "_loaded_implementation", None)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 2 on the processor."""
    install(monkeypatch, version_2)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_by_flash_attention_are_the_dense_ones(name: str) -> None:
    model = build(name)
    scorer, words = checked(KERNEL, model, GROUPS, PAD, CPU, learns=True)
    assert scorer.kind == ("dense" if name in UNPACKED else KERNEL), words
    assert UNPACKED.get(name, "flash_attention_2, common prefixes once") in words
    held_to_dense(model, scorer)


def test_a_branch_sees_the_keys_of_its_trunk_and_its_own() -> None:
    trunk, others = Segment(0, 3), [Segment(3, 5, 0), Segment(5, 6, 0), Segment(6, 8)]
    found = sequences([trunk, *others], CPU)
    assert found.places is not None
    assert found.places.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    assert found.bounds.tolist() == [[0, 3, 5, 6, 8], [0, 3, 8, 12, 14]]
    assert found.longest == (3, 5)
    assert sequences([trunk, Segment(3, 5)], CPU).places is None  # nothing is shared, so nothing is laid out again


def test_gradients_of_a_key_that_many_see_are_added_up_in_float32() -> None:
    states = torch.ones(2, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    seen = torch.tensor([0, *[1] * 257], dtype=torch.int32)
    slope = 1 + 2**-7
    Laid.apply(states, seen).backward(torch.full((258, 1, 1), slope, dtype=torch.bfloat16))  # type: ignore[no-untyped-call]
    assert states.grad is not None
    assert states.grad.flatten().tolist() == [slope, 260]  # 259.01; one after the other in bfloat16 they stop at 256


@pytest.mark.usefixtures("library")
@torch.no_grad()
@pytest.mark.parametrize("batch", [Batch, SlotBatch])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_prompts_are_read_by_flash_attention_whatever_the_cache(family: str, batch: type[Batch]) -> None:
    model = small_model(family)
    assert can_pack(model, KERNEL)
    limits = [12, 3, 9, 12, 7]
    rows = [Row(request) for request in requests(limits)]
    batch(model, KERNEL, 3, Sampling(temperature=0), frozenset(), lambda count: None).write(rows)
    assert [row.ids for row in rows] == [generated(model, p, n) for p, n in zip(PROMPTS, limits, strict=True)]


@pytest.mark.usefixtures("library")
def test_a_static_cache_goes_with_it() -> None:
    assert cannot_slot(small_model("llama"), KERNEL) is None


def test_version_3_and_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, version_3)
    held_to_dense(build("gemma 2"), Scorer("flash_attention_3", PAD, CPU))
    model = build("llama").to(torch.bfloat16)
    spans, limit = spans_of(GROUPS), 1.5
    found, padded = (Scorer(kind, PAD, CPU).sums(model, GROUPS, spans) for kind in ("flash_attention_3", "dense"))  # type: ignore[arg-type]
    truth = dense_sums(build("llama"), GROUPS, spans).detach()
    away, as_far = ((each.double() - truth).square().mean().sqrt() for each in (found, padded))
    assert away < limit * as_far


@pytest.mark.usefixtures("library")
def test_values_of_another_depth_are_filled_up() -> None:
    query, key, value = (torch.randn(1, 2, 4, depth) for depth in (16, 16, 8))
    laid_out = sequences([Segment(0, 4)], CPU)
    found, _ = flash.flash_attention(None, query, key, value, None, kernel=KERNEL, sequences=laid_out)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "words"),
    [
        ("cpu", "bfloat16", True, "runs on CUDA alone, and this device is cpu: leave it at sdpa"),
        ("cuda", "float32", True, "cannot compute in float32: give --dtype bfloat16"),
        (
            "cuda",
            "bfloat16",
            False,
            "no package flash-attn-3 is installed that transformers takes: install it",
        ),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_read(
    device: str, dtype: Any, installed: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(flash.PACKAGES, "flash_attention_3", ("flash-attn-3", lambda: installed))
    config = ModelConfig(dtype=dtype, attn_implementation="flash_attention_3")
    with pytest.raises(ValueError, match=words):
        check_flash(config, small_model("llama").config, torch.device(device))
    check_flash(ModelConfig(), small_model("llama").config, torch.device(device))


def test_it_is_tried_over_heads_as_the_model_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[list[tuple[int, ...]]] = []

    @functools.wraps(version_2)
    def seen(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        heads.append([tuple(t.shape[1:]) for t in (q, k, v)])
        return version_2(q, k, v, *args, **options)

    @functools.wraps(version_2)
    def fails(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nAnd more lines.")

    install(monkeypatch, seen)
    monkeypatch.setitem(flash.PACKAGES, KERNEL, ("flash-attn", lambda: True))
    monkeypatch.setattr(flash, "HERE", {"cpu"})
    config, about = ModelConfig(dtype="bfloat16", attn_implementation=KERNEL), build("llama").config
    check_flash(config, about, CPU)
    assert heads == [[(4, 8), (2, 8), (2, 8)]]
    install(monkeypatch, fails)
    with pytest.raises(
        ValueError, match=r"fails on this device \(FlashAttention only supports Ampere GPUs or newer.\): leave"
    ):
        check_flash(config, about, CPU)


def test_a_run_says_it_before_it_reads(tmp_path: Path) -> None:
    model = small_model("llama")
    model.config._attn_implementation = "flash_attention_2"  # an object says itself how it attends
    keys = {"dataset_name": "unread", "output_dir": str(tmp_path / "run"), "device": "cpu"}
    with pytest.raises(ValueError, match="attn_implementation is flash_attention_2, which runs on CUDA alone"):
        train("sft", model=model, tokenizer=toy_tokenizer("chatml"), **keys)


def test_deep_heads_get_smaller_tiles_on_small_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    about, room = build("llama").config, types.SimpleNamespace(shared_memory_per_block_optin=101_376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: room)
    assert tiles(about, torch.device("cuda")) == tiles(about, CPU) == {}
    about.head_dim = 256
    assert tiles(about, torch.device("cuda"))["kernel_options"]["bwd_BLOCK_M1"] == 32
    room.shared_memory_per_block_optin = 232_448
    assert tiles(about, torch.device("cuda")) == {}
