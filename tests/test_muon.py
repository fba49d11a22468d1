"""Muon in float32 takes PyTorch's own steps, but for their rounding, and is taken where bfloat16 is slow."""

import math

import pytest
import torch
from small import tiny_llama

from sparring.config import TrainingConfig
from sparring.model import optim
from sparring.model.muon import WideMuon, orthogonal

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan et al.


@pytest.mark.parametrize("shape", [(6, 6), (9, 5), (5, 9)])
def test_singular_values_go_through_the_polynomial_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    update = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    values = values / update.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    found = orthogonal(update.clone(), COEFFICIENTS, 5, 1e-7)
    torch.testing.assert_close(found, left @ torch.diag(values) @ right, rtol=1e-10, atol=1e-10)


def test_a_step_by_hand() -> None:
    """One row: X = g / |g| stays parallel to g, and its length s goes through the polynomial."""
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0]]))
    optimizer = WideMuon([weight], lr=0.1, weight_decay=0.5, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer.step()
    length = 1.0
    for _ in range(5):
        length = 3.4445 * length - 4.7750 * length**3 + 2.0315 * length**5
    shift = 0.2 * 0.1 * math.sqrt(2) * length
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.95 - shift * 0.6, 1.90 - shift * 0.8]]))
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], torch.tensor([[0.3, 0.4]]))


def test_several_steps_are_those_of_pytorch_but_for_its_rounding() -> None:
    torch.manual_seed(0)
    start = [torch.randn(12, 12), torch.randn(20, 8), torch.randn(8, 20)]
    ways = []
    for kind in (torch.optim.Muon, WideMuon):
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        optimizer = kind(weights, lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        draw = torch.Generator().manual_seed(1)
        for _ in range(4):
            for w in weights:
                w.grad = torch.randn(w.shape, generator=draw)
            optimizer.step()
        ways.append(weights)
    for plain, wide, first in zip(*ways, start, strict=True):
        moved, apart = (plain - first).norm(), (plain - wide).norm()
        assert moved > 0.2
        assert apart < 0.02 * moved


@pytest.mark.parametrize("slow", [False, True])
def test_it_is_taken_where_bfloat16_is_slow_and_its_memory_planned(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "slow_bfloat16", lambda device: slow)
    model, config = tiny_llama(), TrainingConfig(optim="muon", learning_rate=1e-2, weight_decay=0.1)
    _, muon = optim.make_optimizers(model, config)
    assert type(muon) is (WideMuon if slow else torch.optim.Muon)
    largest = max(p.numel() for p in muon.param_groups[0]["params"])
    assert optim.step_bytes(model, config, torch.device("cpu")) == (16 if slow else 12) * largest


def test_its_state_put_back_takes_the_same_next_step_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "slow_bfloat16", lambda device: True)
    config = TrainingConfig(optim="muon", learning_rate=1e-2, weight_decay=0.1)
    whole, copy = tiny_llama(), tiny_llama()
    first = optim.make_optimizers(whole, config)
    _step(whole, first, 1)
    copy.load_state_dict(whole.state_dict())
    second = optim.make_optimizers(copy, config)
    state = {name: value.clone() for name, value in optim.state_tensors(whole, first).items()}
    assert sum(name.endswith("/momentum_buffer") for name in state) == len(first[1].param_groups[0]["params"])
    optim.load_state_tensors(copy, second, state)
    _step(whole, first, 2), _step(copy, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), copy.parameters(), strict=True))


def _step(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()
