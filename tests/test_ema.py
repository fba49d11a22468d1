"""The moving average of the weights: its numbers by hand, and why they are float32."""

from typing import Any

import pytest
import torch
from small import tiny_llama

from sparring.model import ema
from sparring.model.roles import Roles


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Any:
    """A model of one weight."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def test_three_steps_by_hand_with_a_policy_that_moves() -> None:
    average, policy = scalar(0.0), scalar(0.0)
    # 0.5 * 8 + 0.5 * 0 = 4;  0.5 * 2 + 0.5 * 4 = 3;  0.5 * -1 + 0.5 * 3 = 1
    for value, expected in ((8.0, 4.0), (2.0, 3.0), (-1.0, 1.0)):
        with torch.no_grad():
            policy.weight.fill_(value)
        ema.step(average, policy, 0.5)
        assert average.weight.item() == expected
        assert policy.weight.item() == value


def test_the_decay_is_the_share_of_the_old_average_and_not_of_the_policy() -> None:
    average, policy = scalar(0.0), scalar(8.0)
    ema.step(average, policy, 0.75)  # 0.25 * 8 + 0.75 * 0
    assert average.weight.item() == 2.0


def test_a_decay_of_0_copies_to_the_bit_and_shares_nothing() -> None:
    average, policy = tiny_llama(seed=1), tiny_llama()
    ema.step(average, policy, 0.0)
    for a, b in zip(average.parameters(), policy.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    before = average.model.norm.weight.detach().clone()
    with torch.no_grad():
        policy.model.norm.weight.add_(1.0)
    assert torch.equal(average.model.norm.weight, before)


def test_at_a_learning_rate_of_5e_7_a_float32_average_moves_and_a_bfloat16_one_does_not() -> None:
    # Ten RMSprop-sized updates of 5e-7 on a weight of 1: float32's spacing there is 1.2e-7, bfloat16's 7.8e-3.
    def moved(dtype: torch.dtype) -> float:
        average, policy = scalar(1.0, dtype), scalar(1.0, dtype)
        for _ in range(10):
            with torch.no_grad():
                policy.weight.add_(5e-7)
            ema.step(average, policy, 0.5)
        return average.weight.item() - 1.0

    # exactly: 5e-7 * sum over k = 1..10 of k 0.5^(11 - k) = 5e-7 * (9 + 0.5^10)
    assert moved(torch.float32) == pytest.approx(5e-7 * (9 + 0.5**10), rel=0.1)
    assert moved(torch.bfloat16) == 0.0


def test_roles_keep_float32_averages_that_take_no_gradient() -> None:
    roles = Roles(tiny_llama(), ema_decay=0.5, reference=True)
    for model in (roles.ema, roles.reference):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in roles.policy.parameters())


def test_tied_weights_stay_tied_and_are_averaged_once() -> None:
    policy = tiny_llama(tie_word_embeddings=True)
    roles = Roles(policy, ema_decay=0.5, reference=False)
    start = policy.get_input_embeddings().weight.detach().clone()
    with torch.no_grad():
        policy.get_input_embeddings().weight.add_(1.0)
    roles.step_ema()
    inputs, outputs = roles.ema.get_input_embeddings().weight, roles.ema.get_output_embeddings().weight
    assert inputs.data_ptr() == outputs.data_ptr()
    torch.testing.assert_close(inputs.detach(), start + 0.5)  # twice would be 0.75


def test_without_an_ema_the_policy_writes_and_a_refresh_from_the_ema_copies_the_policy() -> None:
    roles = Roles(tiny_llama(), ema_decay=0.0, reference=True)
    with torch.no_grad():
        roles.policy.model.norm.weight.fill_(3.0)
    roles.step_ema()
    with roles.playing("ema") as writer:
        assert writer is roles.policy
    roles.refresh_reference("ema")
    assert torch.equal(roles.reference.model.norm.weight, torch.full((32,), 3.0))
