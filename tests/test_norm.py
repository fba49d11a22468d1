"""Norms are PyTorch's own, with the gradients that autograd makes of the formula; only what is such a norm becomes one."""

from typing import Any

import pytest
import torch
from test_generation import small_model

from sparring.model.norm import BLOCK, RMSNorm, _forward, quicken, rms_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 7), (1, BLOCK // 2**12, 2**12), (3, BLOCK // 2**12 + 5, 2**12 - 1), (2, BLOCK + 1)]
)
@pytest.mark.parametrize("strided", [False, True])
def test_a_norm_has_the_output_and_the_gradients_of_its_formula(
    dtype: torch.dtype, shape: tuple[int, ...], strided: bool
) -> None:
    torch.manual_seed(0)
    hidden, slope = (3 * torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    if strided:
        hidden, slope = (t.transpose(0, -2).contiguous().transpose(0, -2) for t in (hidden, slope))
    weight = torch.rand(shape[-1], dtype=torch.float64).to(dtype)
    found: list[list[torch.Tensor]] = []
    for exact in (False, True):
        x, w = (t.double().requires_grad_() if exact else t.clone().requires_grad_() for t in (hidden, weight))
        if exact:
            out = w * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        else:
            out = rms_norm(x, w, 1e-3)
            assert type(out.grad_fn).__name__ == "RMSNormBackward"
        found.append([out, *torch.autograd.grad(out, (x, w), slope.to(out.dtype))])
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=near, atol=near * theirs.abs().max().item())


def test_its_gradient_is_no_further_from_the_truth_than_pytorchs_in_bfloat16() -> None:
    torch.manual_seed(0)
    hidden, slope, weight = torch.randn(400, 64), torch.randn(400, 64), torch.rand(64)

    def gradients(way: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        x, w = (t.bfloat16().to(dtype).requires_grad_() for t in (hidden, weight))
        return [g.double() for g in torch.autograd.grad(way(x, w), (x, w), slope.bfloat16().to(dtype))]

    def plain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, w.shape, w, 1e-5)

    truth = gradients(plain, torch.float64)
    theirs = gradients(plain, torch.bfloat16)
    mine = gradients(lambda x, w: rms_norm(x, w, 1e-5), torch.bfloat16)
    for a, b, true in zip(mine, theirs, truth, strict=True):
        assert (a - true).norm() <= 1.05 * (b - true).norm()


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.rand(8)
    (out,) = torch.autograd.grad(rms_norm(hidden, weight, 1e-5).sum(), hidden)
    assert out.shape == hidden.shape
    weight.requires_grad_()
    (found,) = torch.autograd.grad(rms_norm(hidden.detach(), weight, 1e-5).sum(), weight)
    expected = torch.nn.functional.rms_norm(hidden.detach(), (8,)).sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert rms_norm(hidden, weight, 1e-5).grad_fn is None


def test_it_keeps_its_input_and_one_number_a_row() -> None:
    hidden, weight = torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True), torch.rand(64).bfloat16()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        RMSNorm.apply(hidden, weight, 1e-5)  # type: ignore[no-untyped-call]
    assert sorted(t.numel() for t in kept) == [64, 100, 6400]
    assert next(t for t in kept if t.numel() == 6400).data_ptr() == hidden.data_ptr()


def test_only_norms_of_that_formula_are_quickened() -> None:
    def quickened(family: str) -> set[bool]:
        model = small_model(family)
        norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
        for module in model.modules():
            quicken(module)
        return {getattr(m.forward, "__func__", None) is _forward for m in norms}

    assert all(quickened(family) == {True} for family in ("llama", "qwen3", "mistral"))
    assert quickened("gemma2") == {False}, "its weight is 1 more"
    assert quickened("gpt2") == {False}, "it takes the mean off"
