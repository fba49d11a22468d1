"""Muon in float32 takes PyTorch's own steps, but for their rounding, and is taken where bfloat16 is slow."""

import math

import pytest
import torch
from small import tiny_llama

from sparring.config import TrainingConfig
from sparring.model import optim
from sparring.model.muon import Float32Muon, orthogonal
from sparring.model.trace import Live

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al.
WORDS = {"lr": 0.05, "weight_decay": 0.1}
CONFIG = TrainingConfig(optim="muon", learning_rate=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("shape", [(6, 6), (9, 5), (5, 9)])
def test_singular_values_go_through_the_polynomial_and_singular_vectors_stay(
    shape: tuple[int, int], steps: int
) -> None:
    torch.manual_seed(0)
    update = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    values = values / update.norm()
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    found = orthogonal(update.clone(), COEFFICIENTS, steps, 1e-7)
    torch.testing.assert_close(found, left @ torch.diag(values) @ right, rtol=1e-10, atol=1e-10)


def test_a_step_by_hand() -> None:
    """One row: X = g / |g| stays parallel to g, and its length goes through the polynomial."""
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0]]))
    optimizer = Float32Muon([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer.step()
    length = 1.0
    for _ in range(5):
        length = 3.4445 * length - 4.7750 * length**3 + 2.0315 * length**5
    shift = 0.2 * 0.1 * math.sqrt(2) * length
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.95 - shift * 0.6, 1.90 - shift * 0.8]]))
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], torch.tensor([[0.15, 0.20]]))
    assert weight.grad.tolist() == [[3.0, 4.0]]


def test_steps_are_pytorch_s_to_the_bit_but_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    start = [torch.randn(12, 12), torch.randn(20, 8), torch.randn(8, 20)]

    def stepped(kind: type[torch.optim.Optimizer], **words: object) -> list[torch.Tensor]:
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        optimizer = kind(weights, **WORDS, **words)
        draw = torch.Generator().manual_seed(1)
        for step in range(4):
            for w in weights:
                w.grad = torch.randn(w.shape, generator=draw) * (step != 2)  # no gradient at all once
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)  # as a schedule sets it
            optimizer.step()
        return [w.detach() for w in weights]

    mine = stepped(Float32Muon)
    rounded = stepped(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    exact = stepped(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    for found, same, near, first in zip(mine, exact, rounded, start, strict=True):
        assert torch.equal(found, same)
        assert 0 < (found - near).norm() < 0.02 * (near - first).norm()


def test_a_gradient_of_nothing_moves_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3))
    weight.grad = torch.zeros(3, 3)
    Float32Muon([weight], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(weight.detach(), torch.ones(3, 3))


@pytest.mark.parametrize("slow", [False, True])
def test_it_is_taken_where_bfloat16_is_slow_and_a_step_s_memory_is_the_planned(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "slow_bfloat16", lambda device: slow)
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_key_value_heads=2)
    optimizers, largest = _stepped(model)
    assert type(optimizers[1]) is (Float32Muon if slow else torch.optim.Muon)
    assert largest == {64 * 64}
    kept = [state["momentum_buffer"] for state in optimizers[1].state.values()]
    with Live([*model.parameters(), *(p.grad for p in model.parameters()), *kept]) as live:
        optimizers[1].step()
    planned = optim.step_bytes(model, CONFIG, torch.device("cpu"))
    assert live.since() == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("before", [False, True])
def test_a_run_goes_on_with_it_wherever_it_began(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "slow_bfloat16", lambda device: before)
    whole, copy = tiny_llama(), tiny_llama()
    first, _ = _stepped(whole)
    copy.load_state_dict(whole.state_dict())
    monkeypatch.setattr(optim, "slow_bfloat16", lambda device: True)
    second = optim.make_optimizers(copy, CONFIG)
    state = {name: value.clone() for name, value in optim.state_tensors(whole, first).items()}
    optim.load_state_tensors(copy, second, state)
    ours = [second[1].state[p]["momentum_buffer"] for p in second[1].param_groups[0]["params"]]
    theirs = [first[1].state[p]["momentum_buffer"] for p in first[1].param_groups[0]["params"]]
    assert all(torch.equal(a, b) and a.any() for a, b in zip(ours, theirs, strict=True))
    for p, other in zip(whole.parameters(), copy.parameters(), strict=True):
        p.grad = torch.ones_like(p)
        other.grad = torch.ones_like(p)
    first[1].step()
    second[1].step()
    same = [torch.equal(a, b) for a, b in zip(whole.parameters(), copy.parameters(), strict=True)]
    assert all(same) == before  # in bfloat16 it steps a little otherwise


def _stepped(model: torch.nn.Module) -> tuple[list[torch.optim.Optimizer], set[int]]:
    """Muon and its AdamW after a step on ``model``, and the sizes of Muon's matrices."""
    optimizers = optim.make_optimizers(model, CONFIG)
    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()
    return optimizers, {p.numel() for p in optimizers[1].param_groups[0]["params"]}
