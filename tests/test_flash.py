"""FlashAttention, which computes on CUDA: the sequences that it is given, by a function that keeps its library's contract.

The library takes queries and keys of many sequences one after the other, says where each begins, and masks from the bottom right.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generation import PROMPTS, generated, requests, small_model
from test_layouts import CPU, GROUPS, MODELS, PAD, UNPACKED, build, held_to_dense
from torch import Tensor
from toys import toy_tokenizer

from sparring.actors.packed import Batch, Row, can_pack
from sparring.actors.slots import SlotBatch, cannot_slot
from sparring.config import ModelConfig
from sparring.data.packing import Segment
from sparring.methods.base import Sampling
from sparring.model import flash
from sparring.model.flash import Laid, check_flash, sequences
from sparring.model.logps import checked
from sparring.model.policy import pick_device
from sparring.run import train

KERNEL: Any = "flash_attention_2"


def contract(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    softmax_scale: float,
    sliding_window: int | None,
    softcap: float | None,
    is_causal: bool,
    attn_implementation: str,
    query_length: int,
) -> Tensor:
    """Attention over [1, T, H, D] and [1, L, G, D] as the library has it: causal and windowed from the last query and key back."""
    assert is_causal
    assert attn_implementation == KERNEL
    assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
    (q_starts, q_counts), (k_starts, k_counts) = (
        (bounds[:-1].tolist(), bounds.diff().tolist()) for bounds in (cu_seq_lens_q, cu_seq_lens_k)
    )
    assert (max(q_counts), max(k_counts)) == (max_length_q, max_length_k)
    assert (sum(q_counts), sum(k_counts)) == (query.shape[1], key.shape[1])
    assert query.shape[1] == query_length
    out = []
    for q_start, q_count, k_start, k_count in zip(q_starts, q_counts, k_starts, k_counts, strict=True):
        q = query[0, q_start : q_start + q_count].transpose(0, 1)
        k, v = (
            t[0, k_start : k_start + k_count].transpose(0, 1).repeat_interleave(len(q) // t.shape[2], 0)
            for t in (key, value)
        )
        scores = q @ k.transpose(1, 2) * softmax_scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        away = torch.arange(q_count)[:, None] + k_count - q_count - torch.arange(k_count)
        seen = away >= 0 if sliding_window is None else (away >= 0) & (away < sliding_window)
        out.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)[None]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlashAttention on the processor."""
    monkeypatch.setattr(flash, "_flash_attention_forward", contract)
    return


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


def test_where_the_library_fails_rows_are_padded_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(flash, "_flash_attention_forward", fails)
    scorer, words = checked(KERNEL, build("llama"), GROUPS, PAD, CPU)
    assert scorer.kind == "dense"
    assert words.endswith("cannot be packed: FlashAttention only supports Ampere GPUs or newer.")


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "words"),
    [
        ("cpu", "bfloat16", True, "runs on CUDA alone, and this device is cpu: leave it at sdpa"),
        ("cuda", "float32", True, "cannot compute in float32: give --dtype bfloat16"),
        ("cuda", "bfloat16", False, "the package flash-attn-3 is not installed: install it, or leave it at sdpa"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_read(
    device: str, dtype: str, installed: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(flash.PACKAGES, "flash_attention_3", ("flash-attn-3", lambda: installed))
    with pytest.raises(ValueError, match=words):
        check_flash("flash_attention_3", torch.device(device), dtype)
    check_flash("sdpa", torch.device(device), dtype)
    monkeypatch.setitem(flash.PACKAGES, "flash_attention_3", ("flash-attn-3", lambda: True))
    check_flash("flash_attention_3", torch.device("cuda"), "bfloat16")


def test_a_run_says_it_before_it_reads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attn_implementation is flash_attention_2, which runs on CUDA alone"):
        pick_device(ModelConfig(attn_implementation="flash_attention_2", device="cpu"))
    model = small_model("llama")
    model.config._attn_implementation = "flash_attention_2"  # an object says itself how it attends
    keys = {"dataset_name": "unread", "output_dir": str(tmp_path / "run"), "device": "cpu"}
    with pytest.raises(ValueError, match="attn_implementation is flash_attention_2, which runs on CUDA alone"):
        train("sft", model=model, tokenizer=toy_tokenizer("chatml"), **keys)
