"""An update's mathematics: log-probs, gradients, references, terms and schedules against dense computations by hand."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import learner, pair, tiny_llama

from sparring.config import TrainingConfig
from sparring.methods.offline import DPO, KTO, SFT, SimPO
from sparring.methods.sapo import SAPO
from sparring.model.optim import learning_rate, load_state_tensors, make_optimizers, state_tensors
from sparring.records import Pair

PAIRS = [
    pair([5, 6, 7], [10, 11, 12, 2], [10, 11, 40, 41, 2]),
    pair([8, 9], [20, 21, 2], [22, 2]),
    pair([5, 9, 9, 9, 9], [30, 31, 32, 33, 34, 2], [30, 50, 2]),
    pair([7], [13, 2], [14, 15, 16, 2]),
]


def dense_logps(model: Any, asked: Any, answer: Any) -> torch.Tensor:
    """Log-probs of an answer's tokens from full float64 logits, one sequence at a time, shifted here."""
    ids = torch.tensor([[*asked, *answer]])
    logps = model.double()(ids).logits[0].log_softmax(-1)
    first = len(asked)
    found = torch.stack([logps[first + i - 1, token] for i, token in enumerate(answer)])
    model.float()
    return found


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def capture(made: Any, pairs: Any) -> torch.Tensor:
    """The gradient that an update hands to its optimizer."""
    seen: list[torch.Tensor] = []
    made._step = lambda rate, norm: seen.append(gradients(made.roles.policy).clone())
    made.update(pairs, 0)
    return seen[0]


def test_the_gradient_is_that_of_the_mean_dpo_loss_however_it_is_cut_into_micro_batches() -> None:
    reference = tiny_llama(seed=1)
    by_size = {}
    for size in (12, 16, 24, 100):
        made = learner(DPO(), tiny_llama(), reference, max_tokens_per_micro_batch=size)
        by_size[size] = capture(made, PAIRS)
    model = tiny_llama()
    total = torch.zeros((), dtype=torch.float64)
    model.double(), reference.double()
    for each in PAIRS:
        assert each.rejected is not None
        sums = []
        for answer in (each.chosen.token_ids, each.rejected.token_ids):
            ids, first = torch.tensor([[*each.prompt_token_ids, *answer]]), len(each.prompt_token_ids)
            for m in (model, reference):
                logps = m(ids).logits[0].log_softmax(-1)[first - 1 : -1]
                sums.append(logps.gather(1, torch.tensor(list(answer))[:, None]).sum())
        h = (sums[0] - sums[1].detach()) - (sums[2] - sums[3].detach())
        total = total - torch.nn.functional.logsigmoid(0.1 * h) / len(PAIRS)
    total.backward()
    expected = gradients(model).float()
    for size, mine in by_size.items():
        error = (mine - expected).norm() / expected.norm()
        assert error < 1e-4, f"micro-batches of {size}: {error}"


def test_with_a_reference_equal_to_the_policy_dpo_starts_at_log_2_and_rewards_at_0() -> None:
    metrics = learner(DPO(), tiny_llama()).update(PAIRS, 0)
    assert metrics["loss"] == pytest.approx(math.log(2))
    assert metrics["rewards/margins"] == 0
    assert metrics["rewards/accuracies"] == 0


def test_rewards_are_beta_times_the_log_ratio_to_the_reference() -> None:
    model, reference = tiny_llama(), tiny_llama(seed=1)
    metrics = learner(DPO(beta=0.3), model, reference).update(PAIRS[:1], 0)
    model = tiny_llama()
    asked, chosen = PAIRS[0].prompt_token_ids, PAIRS[0].chosen.token_ids
    with torch.no_grad():
        ratio = dense_logps(model, asked, chosen).sum() - dense_logps(reference, asked, chosen).sum()
    assert metrics["rewards/chosen"] == pytest.approx(0.3 * float(ratio), rel=1e-4)


def test_only_the_scored_span_enters_the_preference_and_all_of_the_response_the_nll() -> None:
    scored = [replace(PAIRS[0], chosen_scored=(2, 3), rejected_scored=(2, 4))]
    model = tiny_llama()
    with torch.no_grad():
        chosen = dense_logps(model, scored[0].prompt_token_ids, scored[0].chosen.token_ids)
    metrics = learner(SAPO(loss_type="orpo"), tiny_llama()).update(scored, 0)
    assert metrics["logps/chosen"] == pytest.approx(float(chosen[2]), rel=1e-4)
    assert metrics["loss/nll"] == pytest.approx(-float(chosen.mean()), rel=1e-4)
    assert metrics["tokens/chosen"] == 1
    assert metrics["tokens/rejected"] == 2


def test_measuring_the_terms_gradients_changes_nothing_and_is_right() -> None:
    method = SAPO(preference_weight=0.5, nll_weight=1.0)
    apart = {}
    for name, changed in (
        ("preference", replace(method, nll_weight=0.0)),
        ("nll", replace(method, preference_weight=0.0)),
    ):
        apart[name] = float(capture(learner(changed, tiny_llama(), tiny_llama(seed=1)), PAIRS).norm())
    weights = []
    for every in (0, 1):
        made = learner(
            method, tiny_llama(), tiny_llama(seed=1), term_grad_norm_steps=every, max_tokens_per_micro_batch=20
        )
        metrics = made.update(PAIRS, 0)
        weights.append(torch.cat([p.detach().flatten() for p in made.roles.policy.parameters()]))
    assert torch.equal(*weights)
    for name, expected in apart.items():
        assert metrics[f"grad_norm/{name}"] == pytest.approx(expected, rel=1e-3)


def test_sft_s_loss_is_the_mean_over_all_tokens_of_the_update() -> None:
    shown = [replace(each, rejected=None) for each in PAIRS]
    metrics = learner(SFT(), tiny_llama(), max_tokens_per_micro_batch=24).update(shown, 0)
    model = tiny_llama()
    with torch.no_grad():
        all_tokens = torch.cat([dense_logps(model, p.prompt_token_ids, p.chosen.token_ids) for p in PAIRS])
    assert len(all_tokens) == 15
    assert metrics["loss"] == pytest.approx(-float(all_tokens.mean()), rel=1e-4)


def test_kto_s_baseline_is_the_log_ratio_on_the_next_pair_s_response() -> None:
    model, reference = tiny_llama(), tiny_llama(seed=1)
    mine = float(learner(KTO(), model, reference)._mismatched_kl(PAIRS))
    ratios = []
    with torch.no_grad():
        for each, following in zip(PAIRS, [*PAIRS[1:], PAIRS[0]], strict=True):
            row = each.prompt_token_ids, following.chosen.token_ids
            ratios.append(float(dense_logps(model, *row).sum() - dense_logps(reference, *row).sum()))
    assert mine == pytest.approx(sum(ratios) / 4, rel=1e-4)


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    before = [p.detach().clone() for p in model.parameters()]
    metrics = learner(DPO(), model).update(PAIRS, 0)
    assert metrics["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_activation_checkpointing_gives_the_same_gradient() -> None:
    plain = capture(learner(DPO(), tiny_llama(), tiny_llama(seed=1)), PAIRS)
    saved = capture(learner(DPO(), tiny_llama(), tiny_llama(seed=1), gradient_checkpointing=True), PAIRS)
    torch.testing.assert_close(plain, saved)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "rmsprop", "muon", "adamw_8bit"])
@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
def test_an_optimizer_s_state_put_back_takes_the_same_next_step_to_the_bit(optim: str, tmp_path: Path) -> None:
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")

    def step(model: Any, optimizers: Any, seed: int) -> None:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()

    config = TrainingConfig(optim=optim, learning_rate=1e-2, weight_decay=0.1)  # type: ignore[arg-type]
    whole, copy = (tiny_llama(hidden_size=128) for _ in range(2))  # 8-bit states begin at 4,096 weights
    first = make_optimizers(whole, config)
    step(whole, first, 1), step(whole, first, 2)
    copy.load_state_dict(whole.state_dict())
    second = make_optimizers(copy, config)
    save_file(state_tensors(whole, first), tmp_path / "state.safetensors")
    load_state_tensors(copy, second, load_file(tmp_path / "state.safetensors"))
    step(whole, first, 3), step(copy, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), copy.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "rates"),
    [  # warm-up of 2 updates in 10: 1/3, 2/3, then the shape from 1
        ("linear", {0: 1 / 3, 1: 2 / 3, 2: 1.0, 6: 0.5, 9: 0.125}),
        ("cosine", {1: 2 / 3, 2: 1.0, 6: 0.5, 4: 0.5 * (1 + math.cos(math.pi / 4))}),
        ("constant", {0: 1.0, 9: 1.0}),
        ("constant_with_warmup", {0: 1 / 3, 2: 1.0, 9: 1.0}),
        ("inverse_sqrt", {0: 1 / 3, 2: 1.0, 8: 0.5}),
    ],
)
def test_the_learning_rate_by_hand(kind: str, rates: dict[int, float]) -> None:
    config = TrainingConfig(learning_rate=1.0, lr_scheduler_type=kind, warmup_ratio=0.2)  # type: ignore[arg-type]
    for step, expected in rates.items():
        assert learning_rate(step, 10, config) == pytest.approx(expected), step


SEGMENTS = [  # as SAPO makes them: a shared start, a rewritten segment that is scored, a shared tail
    pair([5, 6, 7], [10, 11, 12, 13, 2], [10, 40, 41, 13, 2], (1, 3), (1, 3)),
    pair([8, 9], [20, 21, 22, 2], [20, 2], (1, 3), (1, 2)),
    pair([5, 9, 9, 9, 9], [30, 31, 32, 33, 34, 2], [50, 51, 32, 33, 34, 2], (0, 2), (0, 2)),
    pair([7], [13, 14, 2], [13, 15, 2], (1, 2), (1, 2)),
]


def span_sum(model: Any, each: Pair, side: str) -> torch.Tensor:
    """The log-prob, with gradient, of a side's scored span: full logits of one sequence, shifted here."""
    answer, (start, stop) = getattr(each, side).token_ids, getattr(each, f"{side}_scored")
    ids, first = torch.tensor([[*each.prompt_token_ids, *answer]]), len(each.prompt_token_ids)
    logps = model(ids).logits[0].log_softmax(-1)
    return sum((logps[first + i - 1, answer[i]] for i in range(start, stop)), torch.zeros(()))


def margin(model: Any, reference: Any, each: Pair) -> torch.Tensor:
    """DPO's h of a pair."""
    with torch.no_grad():
        base = span_sum(reference, each, "chosen") - span_sum(reference, each, "rejected")
    return span_sum(model, each, "chosen") - span_sum(model, each, "rejected") - base


def test_scored_segments_give_the_dense_gradient_however_they_are_cut() -> None:
    model, reference = tiny_llama().double(), tiny_llama(seed=1).double()
    losses = [-torch.nn.functional.logsigmoid(0.1 * margin(model, reference, each)) for each in SEGMENTS]
    torch.stack(losses).mean().backward()
    expected = gradients(model)
    for size in (15, 20, 100):
        made = learner(SAPO(), tiny_llama().double(), reference, max_tokens_per_micro_batch=size)
        error = (capture(made, SEGMENTS) - expected).norm() / expected.norm()
        assert error < 1e-5, f"micro-batches of {size}: {error}"


def test_the_reference_s_log_probs_are_the_reference_s_and_the_policy_s_the_policy_s() -> None:
    model, reference = tiny_llama(), tiny_llama(seed=1)
    logps = learner(DPO(), model, reference).log_probs(SEGMENTS)
    with torch.no_grad():
        for n, each in enumerate(SEGMENTS):
            for side in ("chosen", "rejected"):
                ours, theirs = getattr(logps, side)[n], getattr(logps, f"ref_{side}")[n]
                assert ours.item() == pytest.approx(span_sum(model, each, side).item(), rel=1e-4)
                assert theirs.item() == pytest.approx(span_sum(reference, each, side).item(), rel=1e-4)


def test_all_reward_metrics_by_hand_over_two_micro_batches() -> None:
    model, reference = tiny_llama(), tiny_llama(seed=1)
    with torch.no_grad():
        better, worse = (
            [(span_sum(model, p, side) - span_sum(reference, p, side)).item() for p in PAIRS]
            for side in ("chosen", "rejected")
        )
    metrics = learner(DPO(beta=0.3), model, reference, max_tokens_per_micro_batch=24).update(PAIRS, 0)
    wins = [a > b for a, b in zip(better, worse, strict=True)]
    assert 0 < sum(wins) < 4  # so that the share below is neither
    assert metrics["rewards/chosen"] == pytest.approx(0.3 * sum(better) / 4, rel=1e-4)
    assert metrics["rewards/rejected"] == pytest.approx(0.3 * sum(worse) / 4, rel=1e-4)
    assert metrics["rewards/margins"] == pytest.approx(0.3 * (sum(better) - sum(worse)) / 4, rel=1e-4)
    assert metrics["rewards/accuracies"] == sum(wins) / 4


def test_without_a_reference_rewards_are_beta_times_the_token_mean_log_prob() -> None:
    model = tiny_llama()
    with torch.no_grad():
        means = [(span_sum(model, p, "chosen") / len(p.chosen.token_ids)).item() for p in PAIRS]
    metrics = learner(SimPO(beta=2.0), model).update(PAIRS, 0)
    assert metrics["rewards/chosen"] == pytest.approx(2.0 * sum(means) / 4, rel=1e-4)


def test_kto_s_mismatched_responses_are_cut_to_the_update_s_longest_sequence() -> None:
    pairs = [pair([5] * 6, [10, 2], [11, 2]), pair([6], [12, 13, 14, 15, 2], [16, 2])]
    model, reference = tiny_llama(max_position_embeddings=8), tiny_llama(seed=1)
    mine = float(learner(KTO(), model, reference)._mismatched_kl(pairs))
    rows = [
        (pairs[0].prompt_token_ids, [12, 13]),
        (pairs[1].prompt_token_ids, [10, 2]),
    ]  # 6 + 5 would be 11, and 8 is longest
    with torch.no_grad():
        ratios = [float(dense_logps(model, *row).sum() - dense_logps(reference, *row).sum()) for row in rows]
    assert mine == pytest.approx(sum(ratios) / 2, rel=1e-4)


def test_kto_s_loss_by_hand_with_its_baseline() -> None:
    model, reference = tiny_llama(), tiny_llama(seed=1)
    with torch.no_grad():

        def ratio(each: Pair, side: str) -> float:
            return float(span_sum(model, each, side) - span_sum(reference, each, side))

        others = [replace(a, chosen=b.chosen, chosen_scored=b.chosen.whole) for a, b in pairwise([*PAIRS, PAIRS[0]])]
        baseline = 0.1 * max(0.0, sum(ratio(each, "chosen") for each in others) / 4)
        sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
        expected = sum(
            (1 - sigmoid(0.1 * ratio(p, "chosen") - baseline)) + (1 - sigmoid(baseline - 0.1 * ratio(p, "rejected")))
            for p in PAIRS
        )
    metrics = learner(KTO(beta=0.1), model, reference, max_tokens_per_micro_batch=20).update(PAIRS, 0)
    assert metrics["loss"] == pytest.approx(expected / 4, rel=1e-4)


def test_a_skipped_update_is_as_if_it_had_not_been() -> None:
    @dataclass(frozen=True)
    class Broken(DPO):
        """A loss that is not a number."""

        def preference(self, logps: Any) -> torch.Tensor:
            return super().preference(logps) * math.nan

    ends = []
    for bad in (False, True):
        made = learner(DPO(), tiny_llama(), tiny_llama(seed=1), optim="rmsprop")
        made.update(PAIRS, 0)
        if bad:
            made.method = Broken()
            assert made.update(PAIRS, 1)["skipped"] == 1
            made.method = DPO()
        assert made.update(PAIRS, 1)["skipped"] == 0
        ends.append(made.roles.policy)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in ends), strict=True))


def test_the_gradient_is_scaled_down_to_max_grad_norm_and_never_up() -> None:
    def handed_over(limit: float) -> tuple[torch.Tensor, float]:
        made = learner(DPO(), tiny_llama(), tiny_llama(seed=1), max_grad_norm=limit)
        seen: list[torch.Tensor] = []
        made.optimizers[0].step = lambda: seen.append(gradients(made.roles.policy).clone())  # type: ignore[assignment]
        return seen[0] if (metrics := made.update(PAIRS, 0)) and seen else torch.zeros(0), metrics["grad_norm"]

    whole, norm = handed_over(0.0)
    assert float(whole.norm()) == pytest.approx(norm, rel=1e-5)
    cut, reported = handed_over(norm / 4)
    assert reported == pytest.approx(norm)  # the metric is the norm before
    torch.testing.assert_close(cut, whole / 4, rtol=1e-4, atol=1e-8)
    assert torch.equal(handed_over(norm * 4)[0], whole)


def test_warmup_steps_override_the_ratio_and_a_rollback_s_scale_reaches_the_optimizer() -> None:
    config = TrainingConfig(learning_rate=1.0, warmup_ratio=0.5, warmup_steps=3)
    assert [learning_rate(step, 7, config) for step in range(7)] == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    made = learner(DPO(), tiny_llama(), learning_rate=0.5, warmup_ratio=0.0, lr_scheduler_type="constant")
    assert made.update(PAIRS, 0, rate_scale=0.25)["learning_rate"] == 0.125
    assert {group["lr"] for optimizer in made.optimizers for group in optimizer.param_groups} == {0.125}


def test_the_layout_of_another_kind_of_device_is_found_out_anew() -> None:
    for before, after in (("flex", "segments"), ("flash_attention_2", "segments"), ("dense", "dense")):
        made = learner(DPO(), tiny_llama())
        made.layout = before  # type: ignore[assignment]
        made.update([pair([5, 6], [7, 8, 9], [7, 10])], 0)
        assert made.layout == after
