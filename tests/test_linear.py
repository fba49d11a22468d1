"""Products by oneDNN are PyTorch's own, with PyTorch's gradients, and step aside where they do not apply."""

import copy
from typing import Any

import pytest
import torch
from small import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from sparring.data.packing import ROOT, Segment
from sparring.model import gated, head, linear
from sparring.model.attention import Blocks
from sparring.model.head import Head
from sparring.model.linear import Linear, product, quicken
from sparring.model.policy import prepared

SHAPES = [(3, 5, 7), (1, 4, 1), (300, 33, 65)]  # rows, inputs, outputs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_a_quickened_layer_has_the_plain_one_s_output_and_gradients(
    rows: int, inputs: int, outputs: int, bias: bool
) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(inputs, outputs, bias=bias)
    fast = copy.deepcopy(plain)
    quicken(fast)
    weight = torch.randn(2, rows, outputs)
    found = []
    for layer in (plain, fast):
        hidden = torch.linspace(-2, 2, 2 * rows * inputs).view(2, rows, inputs).requires_grad_()
        out = layer(hidden)
        (out * weight).sum().backward()
        found.append([out, hidden.grad, *(p.grad for p in layer.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_strided_operands_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(6, 9), torch.randn(9, 4)
    torch.testing.assert_close(product(a, b.t()), a @ b)
    c = torch.randn(5, 12)[:, ::2]
    torch.testing.assert_close(product(a.t(), c), a.t() @ c.t())


def test_a_copy_computes_with_its_own_weights_in_its_own_precision() -> None:
    model = prepared(tiny_llama())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    ids = torch.tensor([[5, 6, 7]])
    assert other(ids).logits.abs().max() == 0
    assert model(ids).logits.abs().max() > 0
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16
    assert copy.deepcopy(model).double()(ids).logits.dtype == torch.float64


def test_where_the_operator_is_missing_pytorch_s_own_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(3, 2)
    quicken(layer)
    hidden = torch.ones(1, 3)
    expected = layer(hidden)
    monkeypatch.setattr(linear, "_there", lambda: False)
    torch.testing.assert_close(layer(hidden), expected)


class Given(TorchDispatchMode):
    """The weights that oneDNN's linear layer is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_linear_pointwise" in str(func):
            self.weights.append(args[1])
        return func(*args, **(kwargs or {}))


with_onednn = pytest.mark.skipif(not linear._there(), reason="PyTorch without oneDNN")


@with_onednn
@pytest.mark.parametrize(("avx2", "inputs", "by_onednn"), [(False, 40, True), (True, 40, False), (True, 8, True)])
@pytest.mark.parametrize("layer", ["linear", "gated"])
def test_a_weight_s_gradient_is_by_blas_where_that_is_faster(
    layer: str, avx2: bool, inputs: int, by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "AVX2", avx2)
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, inputs), torch.randn(24, inputs, requires_grad=True)
    slope, gate = torch.randn(30, 24), torch.ones(30, inputs)
    with Given() as given:
        if layer == "linear":
            out, operand = Linear.apply(hidden, weight, None), hidden  # type: ignore[no-untyped-call]
        else:
            out = gated.Down.apply(gate, hidden, weight, None, "silu", gated.PLAIN)  # type: ignore[no-untyped-call]
            operand = torch.nn.functional.silu(gate) * hidden
        out.backward(slope)
    torch.testing.assert_close(weight.grad, slope.t() @ operand, rtol=1e-4, atol=1e-4)
    assert (torch.Size([inputs, 30]) in [w.shape for w in given.weights]) == by_onednn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_weight_s_gradient_in_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    slope, hidden = torch.randn(30, 24).to(dtype), torch.randn(30, 20).to(dtype)
    exact = slope.double().t() @ hidden.double()
    found = linear.weight_gradient(slope, hidden)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=1e-2 if dtype.itemsize == 2 else 1e-12, atol=1e-2)


@with_onednn
def test_onednn_is_given_no_part_of_a_wider_matrix_and_whole_ones_as_they_lie() -> None:
    torch.manual_seed(0)
    hidden, wider = torch.randn(6, 4), torch.randn(9, 10)
    for weight in (wider[:, 3:7], wider.t()[2:6, 1:5], wider[2:5, :4]):
        with Given() as given:
            torch.testing.assert_close(product(hidden, weight), hidden @ weight.t())
        assert given.weights[0].is_contiguous()
    whole = torch.randn(5, 4)
    for weight in (whole, torch.randn(4, 5).t()):
        with Given() as given:
            product(hidden, weight)
        assert given.weights[0].data_ptr() == weight.data_ptr()


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A processor without bfloat16; the weights that oneDNN is given, of at most 200 elements at a time."""
    given: list[torch.Tensor] = []
    plain = linear._onednn
    monkeypatch.setattr(linear, "has_bfloat16", lambda: False)
    monkeypatch.setattr(linear, "WIDENED", 200)
    monkeypatch.setattr(linear, "_onednn", lambda h, w, b: given.append(w) or plain(h, w, b))
    return given


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(8, 5, 7), (40, 300, 33), (64, 33, 300)])
def test_where_bfloat16_is_slow_a_product_is_float32_s_rounded_once(
    rows: int, inputs: int, outputs: int, widened: list[torch.Tensor]
) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs).bfloat16()
    quicken(layer)
    hidden = torch.randn(2, rows, inputs).bfloat16().requires_grad_()
    slope = torch.randn(2, rows, outputs).bfloat16()
    found = layer(hidden)
    found.backward(slope)
    h, w, b, s = (t.detach().double() for t in (hidden.flatten(0, 1), layer.weight, layer.bias, slope.flatten(0, 1)))
    expected = {"output": h @ w.T + b, "hidden": s @ w, "weight": s.T @ h, "bias": s.sum(0)}
    got = {"output": found, "hidden": hidden.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    for name, exact in expected.items():
        mine = got[name]
        assert mine is not None
        assert mine.dtype == torch.bfloat16
        half_a_unit = exact.abs() * 2.0**-8 + 1e-4  # of the last place; the rest for float32's own sums
        assert ((mine.double().view_as(exact) - exact).abs() <= half_a_unit).all(), name
    assert len(widened) >= 3
    assert all(w.dtype == torch.float32 and (w.numel() <= 200 or 1 in w.shape) for w in widened)


@pytest.mark.parametrize(("rows", "parts"), [(1, 0), (7, 0), (8, 1)])
def test_few_rows_and_a_weight_as_it_lies_are_left_to_pytorch(
    rows: int, parts: int, widened: list[torch.Tensor]
) -> None:
    hidden, weight, across = (torch.randn(n, m).bfloat16() for n, m in ((rows, 8), (4, 8), (8, 4)))
    torch.testing.assert_close(product(hidden, weight), hidden @ weight.T)
    assert len(widened) == parts
    torch.testing.assert_close(product(hidden, across.T), hidden @ across)
    assert len(widened) == parts + 1


def test_the_head_s_gradients_are_float32_s_where_bfloat16_is_slow(
    widened: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "WIDE", 400)
    torch.manual_seed(0)
    model = tiny_llama(vocab_size=1500, tie_word_embeddings=False).bfloat16()
    hidden, targets = torch.randn(20, 32).bfloat16(), torch.randint(0, 1500, (20,))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        made = copy.deepcopy(model).to(dtype)
        slope = Head(made).backward(hidden.to(dtype), targets, [0, 20], lambda first, last, logps: -torch.ones(20))
        found.append((slope.float(), made.lm_head.weight.grad.float()))
        assert bool(widened) or dtype == torch.float32
    for mine, theirs in zip(*found, strict=True):
        assert torch.nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), 0) > 0.9999


@pytest.mark.parametrize(("base", "adapter"), [(False, True), (True, True), (True, False)])
def test_a_layer_keeps_only_what_its_gradients_need(base: bool, adapter: bool) -> None:
    layer = torch.nn.Linear(5, 3)
    quicken(layer)
    layer.weight.requires_grad_(base)
    hidden = torch.randn(2, 4, 5).requires_grad_(adapter)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(hidden)
    assert [t.shape for t in kept] == [hidden.shape] * base + [layer.weight.shape] * adapter


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, 20.0)])
def test_where_bfloat16_is_slow_attention_is_float32_s_rounded_once(window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    segments = [Segment(0, 7), Segment(7, 20, 0), Segment(20, 26)]
    assert segments[0].parent == ROOT
    given = [torch.randn(heads, 26, 8).bfloat16() for heads in (4, 2, 2)]
    slope, found = torch.randn(26, 4, 8).bfloat16(), []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [t.detach().to(dtype).requires_grad_() for t in given]
        out = Blocks.apply(*leaves, segments, 0.3, window, softcap)
        out.backward(slope.to(dtype))
        assert out.dtype == dtype
        found.append([out, *(t.grad for t in leaves)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs.bfloat16())
