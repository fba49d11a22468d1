"""Products by oneDNN are PyTorch's own, with PyTorch's gradients, and step aside where they do not apply."""

import copy

import pytest
import torch
from small import tiny_llama

from sparring.model import linear
from sparring.model.linear import product, quicken
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
