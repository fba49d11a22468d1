"""Gated MLPs keep less and compute the same, to the bit where nothing is added up in another order."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import tiny_llama
from test_generation import FAMILIES, small_model

from sparring.model import gated


def mlp_of(model: Any) -> Any:
    return next(m for m in model.modules() if gated.kind_of(m))


def results(mlp: Any, hidden: torch.Tensor, slope: torch.Tensor) -> list[torch.Tensor]:
    """Output, the input's gradient and the weights'."""
    x = hidden.clone().requires_grad_()
    out = mlp(x)
    weights = [p for p in mlp.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad(out, (x, *weights), slope)]


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_gated_mlp_has_the_output_and_gradients_of_the_plain_one(act: str, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    plain = mlp_of(tiny_llama(hidden_act=act, mlp_bias=bias)).to(dtype)
    quick = copy.deepcopy(plain)
    gated.quicken(quick)
    assert "forward" in vars(quick)
    hidden, slope = torch.randn(2, 3, 40, 32).to(dtype)
    for mine, theirs in zip(results(quick, hidden, slope), results(plain, hidden, slope), strict=True):
        assert torch.equal(mine, theirs) or dtype == torch.float32  # whose products may be another kernel's
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("adapted", [("down_proj",), ("gate_proj", "up_proj"), ("gate_proj", "up_proj", "down_proj")])
def test_adapters_in_it_learn_the_same(adapted: tuple[str, ...]) -> None:
    model = tiny_llama().double()
    plain = get_peft_model(model, LoraConfig(r=2, target_modules=list(adapted), init_lora_weights=False)).double()
    quick = copy.deepcopy(plain)
    for module in quick.modules():
        gated.quicken(module)
    hidden, slope = torch.randn(2, 1, 9, 32, dtype=torch.float64)
    found = zip(results(mlp_of(quick), hidden, slope), results(mlp_of(plain), hidden, slope), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in found)


def test_between_the_products_two_tensors_are_kept() -> None:
    def kept(mlp: Any) -> int:
        seen: dict[int, int] = {}
        hidden = torch.randn(1, 50, 32, requires_grad=True)
        own = {p.data_ptr() for p in mlp.parameters()} | {hidden.data_ptr()}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                seen[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = mlp(hidden)
        assert out.requires_grad
        return sum(seen.values())

    plain = mlp_of(tiny_llama())
    quick = copy.deepcopy(plain)
    gated.quicken(quick)
    assert (kept(quick), kept(plain)) == (2 * 50 * 48, 4 * 50 * 48)


def test_frozen_weights_get_no_gradient_and_frozen_inputs_none() -> None:
    mlp = mlp_of(tiny_llama())
    gated.quicken(mlp)
    mlp.down_proj.weight.requires_grad_(False)
    mlp(torch.randn(1, 4, 32)).sum().backward()
    assert mlp.down_proj.weight.grad is None
    assert mlp.gate_proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert mlp(torch.randn(1, 4, 32)).grad_fn is None


def test_they_are_known_by_code_and_activation() -> None:
    known = {family: {gated.kind_of(m) for m in small_model(family).modules()} - {None} for family in FAMILIES}
    assert known == {family: {"silu"} for family in ("llama", "qwen2", "qwen3", "mistral")} | {
        family: {"tanh"} for family in ("gemma2", "gemma3_text")
    } | {family: set() for family in ("mixtral", "gpt2", "phi")}
    assert not [m for m in tiny_llama(hidden_act="relu").modules() if gated.kind_of(m)]
