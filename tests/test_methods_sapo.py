"""SAPO's rewriting, by hand: where the segment falls, what ends a response, what is scored, what is dropped."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from small import END, Script, context, prompt, response

from sparring import losses
from sparring.methods.base import LogProbs
from sparring.methods.sapo import SAPO
from sparring.records import tokens

HUMAN = [10, 11, 12, 13, 14, 15, 16, 17, 18, END]  # C = 10


def rewrite(method: SAPO, writing: list[int], start: int | None = None, human: list[int] = HUMAN):  # type: ignore[no-untyped-def]
    """The human side and the rewriting of one response, with the segment at ``start`` (by trying prompt numbers)."""
    for visit in range(1000):
        script = Script(writing)
        group = method.respond([prompt(0, [5, 6], human)], visit, context(script))[0]
        if start is None or group.responses[0].segment[0] == start:
            return group, script
    raise AssertionError(f"no segment starts at {start}")


def test_the_segment_starts_anywhere_from_0_to_c_minus_3_minus_n() -> None:
    method, draw = SAPO(segment_tokens=4), random.Random(0)
    spans = Counter(method.draw_segment(10, draw) for _ in range(4000))
    assert sorted(spans) == [(t, t + 4) for t in range(4)]  # 10 - 3 - 4 = 3
    assert all(abs(count - 1000) < 130 for count in spans.values())  # 4 sigma are 110


def test_a_response_of_n_plus_3_tokens_or_fewer_is_rewritten_from_its_first_token() -> None:
    method = SAPO(segment_tokens=4)
    for length, expected in ((7, (0, 4)), (4, (0, 4)), (3, (0, 3)), (1, (0, 1))):
        assert {method.draw_segment(length, random.Random(seed)) for seed in range(50)} == {expected}
    assert {method.draw_segment(8, random.Random(seed)) for seed in range(50)} == {(0, 4), (1, 5)}


def test_the_segment_of_a_response_that_was_cut_at_max_length_is_not_pinned_to_its_end() -> None:
    # The published collator moves every such segment to the last N tokens of the window.
    starts = {SAPO(segment_tokens=256).draw_segment(2048 - 1792, random.Random(s))[0] for s in range(20)}
    assert starts == {0}
    starts = {SAPO(segment_tokens=256).draw_segment(2000, random.Random(s))[0] for s in range(300)}
    assert len(starts) > 200
    assert max(starts) <= 2000 - 3 - 256


def test_the_writer_reads_prompt_and_a_and_writes_at_most_n_tokens() -> None:
    group, script = rewrite(SAPO(segment_tokens=4), [40, 41, 42, 43, 44, 45], start=2)
    assert list(script.asked[0].token_ids) == [5, 6, 10, 11]
    assert script.asked[0].max_new_tokens == 4
    human, rewritten = group.responses
    assert human.segment == (2, 6)
    assert list(rewritten.token_ids) == [10, 11, 40, 41, 42, 43, 16, 17, 18, END]  # A, B', the human tail
    assert rewritten.segment == (2, 6)
    assert rewritten.finished
    assert rewritten.source == "ema@7"


def test_an_end_of_turn_inside_b_ends_the_response_without_a_tail() -> None:
    group, _ = rewrite(SAPO(segment_tokens=4), [40, END], start=2)
    rewritten = group.responses[1]
    assert list(rewritten.token_ids) == [10, 11, 40, END]
    assert rewritten.segment == (2, 4)
    assert rewritten.finished


def test_a_short_response_rewritten_without_an_end_is_not_given_one() -> None:
    group, _ = rewrite(SAPO(segment_tokens=20), [40] * 30)
    assert list(group.responses[1].token_ids) == [40] * 10
    assert not group.responses[1].finished


def test_regenerate_rest_writes_to_the_end_and_keeps_no_tail() -> None:
    group, script = rewrite(SAPO(segment_tokens=4, regenerate="rest"), [40, 41, 42, 43, 44, END], start=2)
    assert script.asked[0].max_new_tokens == 100 - 4  # the room that max_length leaves after prompt and A
    assert list(group.responses[1].token_ids) == [10, 11, 40, 41, 42, 43, 44, END]
    assert group.responses[0].segment == (2, 10)


def test_regenerate_response_is_the_no_segment_ablation() -> None:
    group, script = rewrite(SAPO(segment_tokens=4, regenerate="response"), [40, END])
    assert list(script.asked[0].token_ids) == [5, 6]
    assert list(group.responses[1].token_ids) == [40, END]
    assert group.responses[0].segment == (0, 10)


@pytest.mark.parametrize(
    ("score", "chosen", "rejected"),
    [("response", (0, 10), (0, 4)), ("segment", (2, 6), (2, 4)), ("to_segment_end", (0, 6), (0, 4))],
)
def test_what_is_scored_is_a_choice(score: str, chosen: tuple[int, int], rejected: tuple[int, int]) -> None:
    method = SAPO(segment_tokens=4, score=score)  # type: ignore[arg-type]
    group, script = rewrite(method, [40, END], start=2)
    (made,) = method.pair([group], method.judge([group], context(script)), context(script)).pairs
    assert (made.chosen_scored, made.rejected_scored) == (chosen, rejected)


def test_a_rewriting_equal_to_the_human_text_is_dropped_and_counted() -> None:
    method = SAPO(segment_tokens=4)
    same, script = rewrite(method, [12, 13, 14, 15], start=2)
    other, _ = rewrite(method, [12, 13, 14, 40], start=2)
    made = method.pair([same, other], method.judge([same, other], context(script)), context(script))
    assert len(made.pairs) == 1
    assert made.dropped == {"equal": 1}


def test_segments_and_seeds_depend_on_the_visit_alone() -> None:
    method = SAPO(segment_tokens=4, responses_per_prompt=2)
    prompts = [prompt(n, [5, n], HUMAN) for n in range(6)]
    at_once, apart = Script(), Script()
    together = method.respond(prompts, 100, context(at_once))
    one_by_one = [g for n, p in enumerate(prompts) for g in method.respond([p], 100 + n, context(apart))]
    assert together == one_by_one
    assert at_once.asked == apart.asked
    assert len({request.seed for request in at_once.asked}) == 12


LOGPS = LogProbs(
    chosen=torch.tensor([-10.0]),
    rejected=torch.tensor([-14.0]),
    ref_chosen=torch.tensor([-11.0]),
    ref_rejected=torch.tensor([-12.0]),
    chosen_tokens=torch.tensor([10.0]),
    rejected_tokens=torch.tensor([7.0]),
    chosen_win_rate=torch.tensor([1.0]),
    rejected_win_rate=torch.tensor([0.0]),
    chosen_whole=torch.tensor([-20.0]),
    chosen_whole_tokens=torch.tensor([16.0]),
    mean_tokens=16.0,
    kl=torch.tensor(0.0),
)


def test_the_dpo_form_by_hand() -> None:
    # h = (-10 + 11) - (-14 + 12) = 3; beta 0.1: log(1 + e^-0.3) = 0.554355
    terms = SAPO().terms(LOGPS)
    assert terms.keys() == {"preference"}
    assert terms["preference"].item() == pytest.approx(0.554355, abs=1e-6)
    assert SAPO(loss_type="hinge").terms(LOGPS)["preference"].item() == pytest.approx(0.7)


def test_the_orpo_form_by_hand() -> None:
    # a = -1, b = -2: log odds ratio = (-1 + 2) - (log(1 - e^-1) - log(1 - e^-2)) = 1 + 0.458675 - 0.145413 = 1.313262;
    # 0.05 log(1 + e^-1.313262) = 0.05 * 0.238197; the NLL is of the whole response: 20 / 16
    terms = SAPO(loss_type="orpo").terms(LOGPS)
    assert terms["preference"].item() == pytest.approx(0.05 * 0.238197, abs=1e-6)
    assert terms["nll"].item() == pytest.approx(1.25)


def test_the_two_weights_scale_their_own_term() -> None:
    method = SAPO(preference_weight=0.5, nll_weight=2.0)
    terms = method.terms(LOGPS)
    expected = losses.dpo(LOGPS.chosen_ratio, LOGPS.rejected_ratio, beta=0.1)
    assert terms["preference"].item() == pytest.approx(0.5 * expected.item())
    assert terms["nll"].item() == pytest.approx(2.5)
    assert replace(method, preference_weight=0.0).terms(LOGPS).keys() == {"nll"}


def test_the_ablations_are_settings() -> None:
    on_policy = SAPO(ema_decay=0.0, buffer_size=0).cadence(8, 40)
    assert (on_policy.ema_decay, on_policy.buffer_size) == (0.0, 0)
    assert SAPO(loss_type="orpo").cadence(8, 40).reference == "none"
    assert SAPO().cadence(8, 40).reference_every == 5  # none: an epoch
    assert SAPO(reference_every=108).cadence(8, 40).reference_every == 108


@pytest.mark.parametrize("regenerate", ["segment", "rest", "response"])
def test_responses_cut_at_max_length_keep_a_random_segment_and_never_outgrow_it(regenerate: str) -> None:
    # The published code (L = 40, P = 10, N = 8) pins such a segment to the window's last 8 tokens: t = 40 - 10 - 8 = 22.
    method = SAPO(segment_tokens=8, regenerate=regenerate)  # type: ignore[arg-type]
    cut = replace(prompt(0, range(10, 20), range(20, 50)), human=response(range(20, 50), finished=False))
    starts = set()
    for visit in range(300):
        script = Script([60] * 99)
        human, rewritten = method.respond([cut], visit, context(script, max_length=40))[0].responses
        starts.add(human.segment[0])
        assert 10 + len(rewritten.token_ids) == 40  # a writer that never stops fills the room exactly
        assert not rewritten.finished
        if regenerate == "segment":
            assert list(rewritten.token_ids[human.segment[1] :]) == list(range(20 + human.segment[1], 50))
            assert 30 - human.segment[1] >= 3
    assert starts == ({0} if regenerate == "response" else set(range(20)))  # 30 - 3 - 8 = 19


def test_the_tail_has_at_least_3_tokens_wherever_there_is_one() -> None:
    method = SAPO(segment_tokens=4)
    for length in range(1, 20):
        for seed in range(40):
            start, stop = method.draw_segment(length, random.Random(seed))
            assert stop - start == min(4, length)
            assert length - stop >= 3 or (start == 0 and length <= 7)


def test_several_rewritings_of_a_prompt_are_each_paired_with_the_human_response() -> None:
    method = SAPO(segment_tokens=4, responses_per_prompt=3)
    script = Script([40], [41], [42])
    groups = method.respond([prompt(0, [5, 6], HUMAN)], 7, context(script))
    made = method.pair(groups, method.judge(groups, context(script)), context(script))
    assert [p.rejected.token_ids[p.rejected.segment[0]] for p in made.pairs if p.rejected] == [40, 41, 42]
    assert all(p.chosen.token_ids == tokens(HUMAN) for p in made.pairs)
    assert len({request.seed for request in script.asked}) == 3


@pytest.mark.parametrize("regenerate", ["segment", "rest", "response"])
@pytest.mark.parametrize("score", ["response", "segment", "to_segment_end"])
def test_the_scored_spans_of_every_form(regenerate: str, score: str) -> None:
    method = SAPO(segment_tokens=4, regenerate=regenerate, score=score)  # type: ignore[arg-type]
    start = 0 if regenerate == "response" else 2
    group, script = rewrite(method, [40, 41, END], start=start)  # an end of turn in B': no tail in any form
    (made,) = method.pair([group], method.judge([group], context(script)), context(script)).pairs
    stop = 6 if regenerate == "segment" else 10
    expected = {
        "response": ((0, 10), (0, start + 3)),
        "segment": ((start, stop), (start, start + 3)),
        "to_segment_end": ((0, stop), (0, start + 3)),
    }
    assert (made.chosen_scored, made.rejected_scored) == expected[score]


def test_a_segment_s_preference_ignores_the_tail_and_the_response_s_does_not() -> None:
    group, script = rewrite(SAPO(segment_tokens=4), [40, 41], start=2)
    spans = {}
    for score in ("response", "segment", "to_segment_end"):
        method = SAPO(segment_tokens=4, score=score)  # type: ignore[arg-type]
        (made,) = method.pair([group], method.judge([group], context(script)), context(script)).pairs
        spans[score] = made.rejected_scored
    assert spans == {"response": (0, 8), "segment": (2, 4), "to_segment_end": (0, 4)}  # 2 + 2 written + 4 of the tail
