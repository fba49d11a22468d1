"""A whole SAPO update, generation included: ours against the organisation of the released code, turn by turn.

    python benchmarks/sapo_loop.py [--shapes S,M] [--dtypes fp32,bf16] [--losses dpo,orpo] [--updates N] [--json FILE] [--quick]

As released (yinyueqin/SAPO at 5d7a210): each update steps the EMA weight by weight, lets it ``generate`` for the batch's eight
prompts, padded on the left, to the longest segment of the batch, draws eight pairs from the buffer, and computes the loss from
whole logits of padded rows. It is written anew here, without the released code's defects: both sides draw segments alike and
have the same loss, and their losses on the same pairs are compared. Ours is the loop that `sparring sapo` plays.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from _meters import QUICK_DTYPE, Clock, asked_dtypes
from _report import Report, parser, ratios, spread
from _side_by_side import BATCH, DTYPES, END, PAD, RATE, SHAPES, Shape, llama, make_pairs, our_writer, pair_of
from generation import by_generate
from torch import Tensor
from torch.nn.functional import logsigmoid

from sparring.buffer import Buffer
from sparring.checkpoint import TrainState
from sparring.config import TrainingConfig
from sparring.learner import Learner
from sparring.loop import Round, play
from sparring.methods.base import Context, Request, Sampling
from sparring.methods.sapo import SAPO
from sparring.model.optim import make_optimizers
from sparring.model.policy import prepared
from sparring.model.roles import Roles
from sparring.records import Pair, Prompt, Response, tokens
from sparring.seeds import Seeds

COLUMNS = (
    "shape",
    "dtype",
    "loss",
    "updates",
    "as released, s",
    "ours, s",
    "times as released",
    "generation alone",
    "the rest alone",
    "tokens written: released",
    "ours",
    "loss of equal pairs: ours less released",
)
NOTE = """Eight prompts and eight pairs an update; SAPO's published sampling and segments of up to 256 tokens. Median (least-
most) of paired ratios after a warm-up update; seconds and tokens are medians of an update's. bf16 as released: an EMA held in
bfloat16, as its code has it, and autocast over float32 weights in the loss; ours: a bfloat16 working copy of float32 weights.
Where ours draws a pair that it has drawn before, it knows the reference's log-probs; as released they are computed at every
draw."""


def make_prompts(count: int, shape: Shape) -> list[Prompt]:
    """Random prompts with random human responses that end their turn."""
    found = []
    for number, pair in enumerate(make_pairs("dpo", count, shape)):
        ids = pair.chosen.token_ids[:-1] + tokens([END])
        found.append(Prompt(number, "", pair.prompt_token_ids, Response("", ids, "human")))
    return found


def settings(method: SAPO) -> TrainingConfig:
    """One optimizer for both sides: the method's published one, at a rate that moves nothing far."""
    optim: Any = "adamw_torch_fused" if method.loss_type == "orpo" else "rmsprop"
    keys: dict[str, Any] = {"learning_rate": RATE, "lr_scheduler_type": "constant", "term_grad_norm_steps": 0}
    return TrainingConfig(**keys, optim=optim, per_device_train_batch_size=BATCH)


class Released:
    """The released code's organisation."""

    def __init__(self, method: SAPO, shape: Shape, dtype: str, device: torch.device) -> None:
        self.method, self.dtype, self.device = method, DTYPES[dtype], device
        self.policy = llama(shape, device).train()
        self.ema = copy.deepcopy(self.policy).requires_grad_(False).eval().to(self.dtype)
        self.reference = llama(shape, device, 1).requires_grad_(False)
        self.optimizers = make_optimizers(self.policy, settings(method))
        self.buffer: list[Pair] = []
        self.drawn: list[int] = []
        self.rng = random.Random(0)

    @torch.no_grad()
    def step_ema(self) -> None:
        """ema <- (1 - b) policy + b ema, weight by weight."""
        b = self.method.ema_decay
        for mine, theirs in zip(self.ema.parameters(), self.policy.parameters(), strict=True):
            mine.data.mul_(b).add_(theirs.data.to(mine.dtype), alpha=1 - b)

    def write(self, prompts: Sequence[Prompt]) -> int:
        """Put each prompt's pair into the buffer; the number of tokens written."""
        requests, spans = [], []
        for prompt in prompts:
            assert prompt.human is not None
            start, stop = self.method.draw_segment(len(prompt.human.token_ids), self.rng)
            spans.append((start, stop))
            requests.append(Request(prompt.token_ids + prompt.human.token_ids[:start], stop - start, 0))
        sampling = Sampling(self.method.temperature, self.method.top_p, self.method.top_k)
        written = by_generate(self.ema, requests, sampling)
        for prompt, (start, stop), ids in zip(prompts, spans, written, strict=True):
            assert prompt.human is not None
            human = prompt.human.token_ids
            tail = human[:0] if END in ids else human[stop:]
            self.buffer.append(pair_of(prompt.token_ids, human, human[:start] + tokens(ids) + tail))
            self.drawn.append(0)
        return sum(map(len, written))

    def draw(self) -> list[Pair]:
        """With replacement, weight 1 / (times drawn + 1)."""
        places = self.rng.choices(range(len(self.buffer)), [1 / (n + 1) for n in self.drawn], k=BATCH)
        for place in places:
            self.drawn[place] += 1
        return [self.buffer[place] for place in places]

    def log_probs(self, model: Any, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Summed log-probs, and numbers of tokens, of all chosen and then all rejected responses, from whole logits, [2B]."""
        sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs if pair.rejected]
        rows = [[*p.prompt_token_ids, *side.token_ids] for p, side in zip([*pairs, *pairs], sides, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        scored = mask.clone()
        for row, pair in zip(scored, [*pairs, *pairs], strict=True):
            row[: len(pair.prompt_token_ids)] = 0
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        found = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2) * scored[:, 1:]
        return found.sum(1), scored[:, 1:].sum(1)

    def loss(self, pairs: Sequence[Pair]) -> Tensor:
        """SAPO-DPO's or SAPO-ORPO's mean loss."""
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        with half:
            sums, lengths = self.log_probs(self.policy, pairs)
        if self.method.loss_type == "orpo":
            means = sums / lengths
            odds = means - torch.log(-torch.expm1(means))
            chosen, rejected = odds.chunk(2)
            return (-self.method.strength * logsigmoid(chosen - rejected) - means.chunk(2)[0]).mean()
        with torch.no_grad(), half:
            known, _ = self.log_probs(self.reference, pairs)
        chosen, rejected = (sums - known).chunk(2)
        return -logsigmoid(self.method.strength * (chosen - rejected)).mean()

    def learn(self) -> None:
        """An optimizer step on a draw."""
        self.loss(self.draw()).backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


class Ours:
    """The loop of `sparring sapo`, without its journal."""

    def __init__(self, method: SAPO, shape: Shape, dtype: str, device: torch.device, prompts: list[Prompt]) -> None:
        self.method = method
        self.cadence = replace(method.cadence(BATCH, 10**6), ema_every=1)
        compares = self.cadence.reference != "none"
        roles = Roles(
            prepared(llama(shape, device)), ema_decay=method.ema_decay, reference=compares, dtype=DTYPES[dtype]
        )
        if compares:
            roles.reference = prepared(llama(shape, device, 1)).requires_grad_(False).to(DTYPES[dtype])
        self.learner = Learner(roles, method, settings(method), pad_id=PAD, total_steps=10**6)
        state = TrainState(roles, self.learner.optimizers, Buffer(self.cadence.buffer_size or None, self.cadence.draw))
        writers = {"ema": our_writer(lambda: roles.playing("ema"), BATCH)}
        context = Context(writers, Seeds(0), 10**6)
        self.events = play(state, method, self.cadence, self.learner, context, prompts, 10**6)

    def loss(self, pairs: Sequence[Pair]) -> float:
        """The mean loss of ``pairs``."""
        return float(sum(self.method.terms(self.learner.log_probs(pairs)).values()).mean())  # type: ignore[union-attr]


def compared(method: SAPO, shape: Shape, dtype: str, updates: int, device: torch.device) -> dict[str, Any]:
    """Seconds of both sides' generation and learning, update by update."""
    prompts = make_prompts(BATCH * (updates + 1), shape)
    theirs, ours = Released(method, shape, dtype, device), Ours(method, shape, dtype, device, prompts)
    pairs = make_pairs("sapo", BATCH, shape, seed=1)
    with torch.no_grad():
        losses = {"released": float(theirs.loss(pairs)), "ours": ours.loss(pairs)}
    clock = Clock(device)
    seconds: dict[str, list[float]] = {}
    written: dict[str, list[int]] = {"released": [], "ours": []}
    for turn in range(updates + 1):
        found: dict[str, float] = {}
        clock.start()
        theirs.step_ema()
        count = theirs.write(prompts[turn * BATCH : (turn + 1) * BATCH])
        found["released, generation"] = clock.stop()
        clock.start()
        theirs.learn()
        found["released, the rest"] = clock.stop()
        clock.start()
        event = next(ours.events)
        found["ours, generation"] = clock.stop()
        assert isinstance(event, Round)
        clock.start()
        next(ours.events)
        found["ours, the rest"] = clock.stop()
        if turn:
            for name, value in found.items():
                seconds.setdefault(name, []).append(value)
            written["released"].append(count)
            segments = (r.segment for group in event.groups for r in group.responses[1:])
            written["ours"].append(sum(stop - start for start, stop in segments))
    for side in ("released", "ours"):
        both = zip(seconds[f"{side}, generation"], seconds[f"{side}, the rest"], strict=True)
        seconds[side] = [a + b for a, b in both]
    return {
        "shape": shape.name,
        "dtype": dtype,
        "loss": method.loss_type,
        "times_released": ratios(seconds["released"], seconds["ours"]),
        "times_generation": ratios(seconds["released, generation"], seconds["ours, generation"]),
        "times_rest": ratios(seconds["released, the rest"], seconds["ours, the rest"]),
        "losses": losses,
        "loss_difference": losses["ours"] - losses["released"],
        "seconds": seconds,
        "tokens": written,
    }


def main() -> None:
    """Compare cell by cell; print and write the table."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--shapes", help="of S, M, L, toy, with commas; default S,M, S with --quick")
    arguments.add_argument("--dtypes", help=f"of fp32, bf16; default both, {QUICK_DTYPE}")
    arguments.add_argument("--losses", help="of dpo, orpo; default both, dpo with --quick")
    arguments.add_argument("--updates", type=int, help="measured updates of each cell")
    given = arguments.parse_args()
    updates = given.updates or (1 if given.quick else 5)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report("sapo_loop", "A SAPO update against the released code's organisation", given)
    for shape in (given.shapes or ("S" if given.quick else "S,M")).split(","):
        for dtype in asked_dtypes(given, "fp32,bf16", device):
            for loss in (given.losses or ("dpo" if given.quick else "dpo,orpo")).split(","):
                found = compared(SAPO(loss_type=loss), SHAPES[shape], dtype, updates, device)
                report.figures.append(found)
                names = (shape, dtype, loss, str(updates))
                medians = (f"{torch.tensor(found['seconds'][side]).median():.2f}" for side in ("released", "ours"))
                times = (spread(found[key]) for key in ("times_released", "times_generation", "times_rest"))
                counts = (f"{torch.tensor(found['tokens'][side]).median()}" for side in ("released", "ours"))
                cells = (*names, *medians, *times, *counts, f"{found['loss_difference']:+.1e}")
                report.row("An update", COLUMNS, cells)
    report.note(NOTE)
    report.finish()


if __name__ == "__main__":
    main()
