"""FlexAttention, which computes on CUDA: the masks and layout that it is given, by its own code on the processor.

Compiled it has no backward pass there. Its uncompiled form has one, which it refuses on a processor only for being slow.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_generation import PROMPTS, generated, requests, small_model, writer
from test_layouts import CPU, GROUPS, MODELS, PAD, UNPACKED, build, dense_sums, held_to_dense, spans_of

from sparring.actors import local
from sparring.data.packing import pack
from sparring.methods.base import Sampling
from sparring.model.logps import Scorer, checked

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its plain form, with its backward pass."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNPACKED])
def test_log_probs_and_gradients_by_flex_attention_are_the_dense_ones(name: str) -> None:
    held_to_dense(build(name), Scorer("flex", PAD, CPU))


@pytest.mark.parametrize("name", ["llama", "gemma 2"])
def test_what_its_compiler_makes_gives_the_dense_log_probs(name: str) -> None:
    model, spans = build(name), spans_of(GROUPS)
    found = Scorer("flex", PAD, CPU).sums(model, GROUPS, spans).double()
    torch.testing.assert_close(found, dense_sums(model, GROUPS, spans).detach(), rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNPACKED])
def test_where_it_is_chosen_to_learn_its_backward_pass_is_tried_and_leaves_nothing(name: str) -> None:
    model = build(name)
    assert checked("flex", model, GROUPS, PAD, CPU, learns=True)[0].kind == "flex"
    assert all(weight.grad is None for weight in model.parameters())


def test_without_a_backward_pass_it_scores_and_does_not_learn() -> None:
    model = build("llama")
    assert checked("flex", model, GROUPS, PAD, CPU)[0].kind == "flex"
    scorer, words = checked("flex", model, GROUPS, PAD, CPU, learns=True)
    assert scorer.kind == "dense"
    assert words.startswith("dense layout, since this model cannot be packed: ")


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_prompts_are_read_by_flex_attention_in_rows_of_few_lengths(
    family: str, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mine = small_model(family), writer(small_model(family), batch_size=3)
    widths: list[int] = []

    def evened(*given: Any, **options: Any) -> Any:
        widths.append((packed := pack(*given, **options)).input_ids.shape[1])
        return packed

    monkeypatch.setattr("sparring.actors.packed.pack", evened)
    monkeypatch.setattr(local, "kind_for", lambda device, implementation: "flex")
    written = mine.write(requests([12, 3, 9, 12, 7]), Sampling(temperature=0))
    assert set(mine.layouts.values()) == {"flex"}
    assert set(widths) == {128}
    limits = zip(PROMPTS, [12, 3, 9, 12, 7], strict=True)
    assert [list(w.token_ids) for w in written] == [generated(model, p, n) for p, n in limits]
