"""The budget for the chosen log-prob (BCR) and the dual clip: values and gradients by hand, and limits that are known losses."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring import bounds, losses
from sparring.methods.base import LogProbs
from sparring.methods.ipr import IPR
from sparring.methods.offline import DPO, DPOP, IPO, SimPO, SPPOOffline
from sparring.methods.preference import Preference
from sparring.methods.sapo import SAPO
from sparring.methods.spin import SPIN
from sparring.methods.sppo import SPPO
from sparring.methods.tso import TSO


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logps(**changes: Any) -> LogProbs:
    """Three pairs: the chosen log-prob rose by 2, fell by 1 and fell by 6, over 10, 5 and 4 tokens."""
    ref = column(-20.0, -12.0, -9.0)
    columns = {
        "chosen": ref - column(-2.0, 1.0, 6.0),
        "rejected": column(-16.0, -8.0, -30.0),
        "ref_chosen": ref,
        "ref_rejected": column(-15.0, -10.0, -22.0),
        "chosen_tokens": column(10.0, 5.0, 4.0),
        "rejected_tokens": column(7.0, 3.0, 8.0),
        "chosen_win_rate": column(0.9, 0.7, 0.6),
        "rejected_win_rate": column(0.2, 0.1, 0.4),
        "chosen_whole": ref - column(-1.0, 2.0, 7.0),
        "chosen_whole_tokens": column(12.0, 6.0, 4.0),
    }
    return LogProbs(**(columns | changes), mean_tokens=7.0, kl=torch.tensor(0.5, dtype=torch.float64))


def loss(method: Preference, of: LogProbs) -> Tensor:
    return sum(method.terms(of).values(), torch.zeros_like(of.chosen))


def gradients(method: Preference) -> tuple[Tensor, Tensor]:
    """Of the summed loss, with respect to the chosen and the rejected log-probs."""
    of = logps()
    of = replace(of, chosen=of.chosen.clone().requires_grad_(), rejected=of.rejected.clone().requires_grad_())
    found = torch.autograd.grad(loss(method, of).sum(), [of.chosen, of.rejected], allow_unused=True)
    return tuple(torch.zeros(3, dtype=torch.float64) if g is None else g for g in found)  # type: ignore[return-value]


BASES: list[Preference] = [
    DPO(),
    IPO(),
    IPO(token_mean=False),
    SimPO(),
    SPPOOffline(beta=0.1),
    SPPO(beta=0.1),
    SPPO(beta=0.1, loss_type="sppo_hard"),
    SPIN(),
    SPIN(loss_type="hinge"),
    SAPO(),
    SAPO(loss_type="hinge"),
    SAPO(loss_type="orpo"),
    TSO(),
    *(IPR(loss_type=kind, bcr_lambda=0.0) for kind in ("dpo", "simpo", "ipo", "hinge", "orpo", "sppo")),  # type: ignore[arg-type]
]


def named(method: Preference) -> str:
    return f"{method.name}-{getattr(method, 'loss_type', '')}"


def test_the_drop_is_what_the_chosen_log_prob_fell_a_token_or_in_all() -> None:
    of = logps()
    assert bounds.drop(of.chosen_ratio, of.chosen_tokens).tolist() == pytest.approx([-0.2, 0.2, 1.5])
    assert bounds.drop(of.chosen_ratio, of.chosen_tokens, on="sum").tolist() == pytest.approx([-2.0, 1.0, 6.0])


def test_the_penalty_by_hand() -> None:
    sides = logps().chosen_ratio, logps().chosen_tokens
    # Falls a token: -0.2, 0.2, 1.5; in all: -2, 1, 6.
    assert bounds.budget_penalty(*sides, delta=0.1).tolist() == pytest.approx([0.0, 0.1, 1.4])
    assert bounds.budget_penalty(*sides, delta=0.1, form="squared").tolist() == pytest.approx([0.0, 0.01, 1.96])
    assert bounds.budget_penalty(*sides, delta=0.5, on="sum").tolist() == pytest.approx([0.0, 0.5, 5.5])
    assert bounds.budget_penalty(*sides, delta=0.0, on="sum").tolist() == pytest.approx([0.0, 1.0, 6.0])
    assert bounds.budget_penalty(*sides, delta=math.inf).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("delta", [-0.1, math.nan])
def test_a_budget_below_zero_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match=r"delta=.*pass a delta >= 0"):
        bounds.budget_penalty(logps().chosen_ratio, logps().chosen_tokens, delta=delta)


@pytest.mark.parametrize("base", BASES, ids=named)
@pytest.mark.parametrize("form", ["hinge", "squared"])
@pytest.mark.parametrize("place", ["outside", "inside"])
def test_within_the_budget_value_and_gradients_are_the_base_loss_s(base: Preference, form: str, place: str) -> None:
    method = replace(base, bcr_lambda=3.0, bcr_delta=6.01, bcr_on="sum", bcr_form=form, bcr_place=place)  # type: ignore[arg-type]
    if place == "inside" and base.has_target():
        with pytest.raises(ValueError, match="use bcr_place outside"):
            loss(method, logps())
        return
    assert torch.equal(loss(method, logps()), loss(base, logps()))
    for mine, theirs in zip(gradients(method), gradients(base), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("base", BASES, ids=named)
@pytest.mark.parametrize("place", ["outside", "inside"])
@pytest.mark.parametrize("on", ["sum", "token_mean"])
def test_an_endless_budget_is_the_base_loss_to_the_bit(base: Preference, place: str, on: str) -> None:
    method = replace(base, bcr_lambda=3.0, bcr_delta=math.inf, bcr_place=place, bcr_on=on)  # type: ignore[arg-type]
    mine, theirs = method.terms(logps()), base.terms(logps())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert method.cadence(8, 40) == base.cadence(8, 40)  # and no reference is held for its sake


@pytest.mark.parametrize("base", BASES, ids=named)
@pytest.mark.parametrize(("on", "jumps"), [("sum", [0.0, 3.0, 3.0]), ("token_mean", [0.0, 3.0 / 5, 3.0 / 4])])
def test_past_the_budget_the_chosen_gradient_jumps_by_lambda_and_the_rejected_one_stays(
    base: Preference, on: str, jumps: list[float]
) -> None:
    method = replace(base, bcr_lambda=3.0, bcr_delta=0.1, bcr_on=on)  # type: ignore[arg-type]
    (chosen, rejected), (before, before_rejected) = gradients(method), gradients(base)
    assert (before - chosen).tolist() == pytest.approx(jumps, abs=1e-12)  # descent raises the chosen log-prob
    assert torch.equal(rejected, before_rejected)


def test_the_jump_is_at_the_budget() -> None:
    def slope(fall: float) -> float:
        ratio = column(-fall).requires_grad_()
        penalty = 2.0 * bounds.budget_penalty(ratio, column(4.0), delta=0.25)
        return float(torch.autograd.grad(penalty.sum(), ratio)[0])

    assert slope(0.999) == 0.0
    assert slope(1.001) == pytest.approx(-2.0 / 4)


def test_the_squared_form_s_slope_grows_from_zero() -> None:
    ratio = column(-0.4, -0.6, -1.5).requires_grad_()
    penalty = bounds.budget_penalty(ratio, column(1.0, 1.0, 2.0), delta=0.5, form="squared")
    (slope,) = torch.autograd.grad(penalty.sum(), ratio)
    assert slope.tolist() == pytest.approx([0.0, -2 * 0.1, -2 * 0.25 / 2])


@pytest.mark.parametrize("strength", [0.5, 5.0, 50.0])
def test_inside_without_a_budget_on_the_sum_it_is_dpo_positive(strength: float) -> None:
    method = DPO(bcr_lambda=strength, bcr_delta=0.0, bcr_on="sum", bcr_place="inside")
    of = logps()
    expected = losses.dpop(of.chosen_ratio, of.rejected_ratio, beta=0.1, dpop_lambda=strength)
    assert list(method.terms(of)) == ["preference"]
    torch.testing.assert_close(method.terms(of)["preference"], expected, rtol=1e-12, atol=0)
    for mine, theirs in zip(gradients(method), gradients(DPOP(dpop_lambda=strength)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def test_inside_on_the_token_mean_by_hand() -> None:
    # The third pair: the fall is 1.5 a token, 1.4 past the budget; 2 * 1.4 * 4 tokens are taken off its ratio of -6.
    method = DPO(bcr_lambda=2.0, bcr_delta=0.1, bcr_place="inside", beta=0.1)
    z = 0.1 * ((-6 - 2 * 1.4 * 4) - (-30 + 22))
    assert method.terms(logps())["preference"][2].item() == pytest.approx(math.log1p(math.exp(-z)))


def test_inside_leaves_the_nll_as_it_is() -> None:
    inside = DPO(bcr_lambda=2.0, bcr_delta=0.0, bcr_place="inside", nll_weight=1.0).terms(logps())
    assert inside["nll"].tolist() == pytest.approx([19.0 / 12, 14.0 / 6, 16.0 / 4])


def test_outside_it_is_a_term_of_its_own_beside_the_others() -> None:
    terms = DPO(bcr_lambda=2.0, bcr_delta=0.1, nll_weight=0.5).terms(logps())
    assert sorted(terms) == ["bcr", "nll", "preference"]
    assert terms["bcr"].tolist() == pytest.approx([0.0, 0.2, 2.8])


def test_a_budget_gives_a_reference_to_the_losses_that_have_none() -> None:
    for base in (SimPO(), SAPO(loss_type="orpo"), IPR(loss_type="simpo", bcr_lambda=0.0)):
        assert base.cadence(8, 40).reference == "none"
        assert replace(base, bcr_lambda=1.0).cadence(8, 40).reference != "none"  # type: ignore[arg-type]


def test_the_metrics_say_how_far_the_chosen_fell_and_how_many_are_past_the_budget() -> None:
    found = DPO(bcr_lambda=1.0, bcr_delta=0.1).metrics(logps())
    assert found["bcr/drop"].tolist() == pytest.approx([-0.2, 0.2, 1.5])
    assert found["bcr/over_budget"].tolist() == [0.0, 1.0, 1.0]
    found = DPO(bcr_lambda=1.0, bcr_delta=1.0, bcr_on="sum").metrics(logps())
    assert found["bcr/drop"].tolist() == pytest.approx([-2.0, 1.0, 6.0])
    assert found["bcr/over_budget"].tolist() == [0.0, 0.0, 1.0]
    assert DPO().metrics(logps()) == {}
    endless = DPO(bcr_lambda=1.0, bcr_delta=math.inf).metrics(logps())
    assert endless["bcr/over_budget"].tolist() == [0.0, 0.0, 0.0]


def test_no_fall_is_reported_where_there_is_no_reference_to_fall_below() -> None:
    assert SimPO(bcr_lambda=1.0, bcr_delta=math.inf).metrics(logps()) == {}
    assert "bcr/drop" in SimPO(bcr_lambda=1.0, bcr_delta=1.0).metrics(logps())


RATIOS = column(3.0, 80.0, -4.0, 90.0), column(-2.0, -1.0, -70.0, -95.0)
FORMS = ["rewards", "margin", "ratio"]


@pytest.mark.parametrize("form", FORMS)
def test_infinite_thresholds_are_dpo_to_the_bit(form: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        sides = [side.to(dtype) for side in RATIOS]
        assert torch.equal(bounds.dual_clip(*sides, form=form), losses.dpo(*sides, beta=0.1))
        ours = [side.clone().requires_grad_() for side in sides]
        theirs = [side.clone().requires_grad_() for side in sides]
        bounds.dual_clip(*ours, form=form).sum().backward()
        losses.dpo(*theirs, beta=0.1).sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))  # type: ignore[arg-type]


def log_sigmoid_loss(z: float) -> float:
    return math.log1p(math.exp(-z))


@pytest.mark.parametrize(
    ("form", "margins"),
    [
        # r_w = 0.3, 8, -0.4, 9 and r_l = -0.2, -0.1, -7, -9.5, with c_w = 2 and c_l = 3.
        ("rewards", [0.3 + 0.2, 2 + 0.1, -0.4 + 3, 2 + 3]),
        ("margin", [0.5, 2, 2, 2]),
        ("ratio", [0.3 + 0.2, 2 + 0.1, -0.4 + 3, 2 + 3]),
    ],
)
def test_the_three_forms_by_hand(form: Any, margins: list[float]) -> None:
    found = bounds.dual_clip(*RATIOS, beta=0.1, clip_chosen=2.0, clip_rejected=3.0, form=form)
    assert found.tolist() == pytest.approx([log_sigmoid_loss(z) for z in margins])


def test_where_the_forms_differ_by_hand() -> None:
    sides = column(-50.0), column(40.0)  # r_w = -5, r_l = 4: the pair is the wrong way round
    about = {"beta": 0.1, "clip_chosen": 2.0, "clip_rejected": 3.0}
    for form, margin in (("rewards", -9.0), ("margin", -3.0), ("ratio", -7.0)):
        found = bounds.dual_clip(*sides, form=form, **about)  # type: ignore[arg-type]
        assert found.item() == pytest.approx(log_sigmoid_loss(margin)), form


def test_a_clipped_side_has_no_gradient_and_the_other_keeps_its_own() -> None:
    chosen, rejected = (side.clone().requires_grad_() for side in RATIOS)
    bounds.dual_clip(chosen, rejected, beta=0.1, clip_chosen=2.0, clip_rejected=3.0).sum().backward()
    slope = [0.1 / (1 + math.exp(z)) for z in (0.5, 2.1, 2.6, 5.0)]
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-slope[0], 0.0, -slope[2], 0.0])
    assert rejected.grad.tolist() == pytest.approx([slope[0], slope[1], 0.0, 0.0])


def test_a_reward_that_went_the_wrong_way_is_never_let_go() -> None:
    # Clipping these would switch learning off where it is needed: chosen far below the reference, rejected far above.
    chosen, rejected = column(-500.0).requires_grad_(), column(500.0).requires_grad_()
    bounds.dual_clip(chosen, rejected, beta=0.1, clip_chosen=2.0, clip_rejected=2.0).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.1, 0.1))


@pytest.mark.parametrize("clips", [(2.0, math.inf), (math.inf, 3.0)])
def test_one_threshold_alone_clips_its_own_side(clips: tuple[float, float]) -> None:
    found = bounds.dual_clip(*RATIOS, beta=0.1, clip_chosen=clips[0], clip_rejected=clips[1])
    margins = [min(w, clips[0]) - max(x, -clips[1]) for w, x in ((0.3, -0.2), (8, -0.1), (-0.4, -7), (9, -9.5))]
    assert found.tolist() == pytest.approx([log_sigmoid_loss(z) for z in margins])


@pytest.mark.parametrize("form", FORMS)
def test_the_gradients_are_those_of_the_formula(form: Any) -> None:
    def of(chosen: Tensor, rejected: Tensor) -> Tensor:
        return bounds.dual_clip(chosen, rejected, beta=0.3, clip_chosen=1.0, clip_rejected=0.7, form=form)

    sides = [column(1.0, 5.0, -3.0, 0.2).requires_grad_(), column(0.4, -6.0, -1.0, 8.0).requires_grad_()]
    assert torch.autograd.gradcheck(of, sides)

    def penalty(chosen: Tensor, tokens: Tensor) -> Tensor:
        return bounds.budget_penalty(chosen, tokens, delta=0.3, form="squared")

    assert torch.autograd.gradcheck(penalty, [column(-1.0, -5.0, 3.0).requires_grad_(), column(2.0, 3.0, 4.0)])


def test_thresholds_and_beta_have_to_be_above_zero() -> None:
    for clips in ({"clip_chosen": 0.0}, {"clip_rejected": -1.0}, {"clip_chosen": math.nan}):
        with pytest.raises(ValueError, match=r"pass thresholds > 0"):
            bounds.dual_clip(*RATIOS, **clips)  # type: ignore[arg-type]
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"beta=.*pass a finite beta > 0"):
            bounds.dual_clip(*RATIOS, beta=beta)


def test_the_shares_that_are_clipped() -> None:
    past = bounds.clipped_rewards(*RATIOS, beta=0.1, clip_chosen=2.0, clip_rejected=3.0)
    assert [side.tolist() for side in past] == [[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]]


def test_tso_s_terms_are_the_dual_clip_with_its_own_thresholds() -> None:
    of = logps()
    method = TSO(clip_chosen=0.1, clip_rejected=0.3, beta=0.2, clip_form="margin")
    # h = (2 + 1, -1 - 2, -6 + 8) = 3, -3, 2; beta h = 0.6, -0.6, 0.4, clamped to [-0.3, 0.1].
    expected = [log_sigmoid_loss(z) for z in (0.1, -0.3, 0.1)]
    assert method.terms(of)["preference"].tolist() == pytest.approx(expected)
    found = replace(method, bcr_lambda=1.0).metrics(of)
    # r_w = 0.4, -0.2, -1.2; r_l = -0.2, 0.4, -1.6
    assert found["tso/clipped_chosen"].tolist() == [1.0, 0.0, 0.0]
    assert found["tso/clipped_rejected"].tolist() == [0.0, 0.0, 1.0]
    assert "bcr/drop" in found
