"""How good a run's policy is on held-out prompts while the run goes on: against the responses that its start gave to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sparring.config import Config, DataConfig
from sparring.data import parquet
from sparring.data.chat import Chat
from sparring.data.datasets import Loaded, digest, load
from sparring.data.packing import Group
from sparring.evaluate.held_out import GREEDY, interval
from sparring.learner import Learner
from sparring.methods.base import Comparison, Context, NoJudge, Request, Sampling
from sparring.probe import token_logps
from sparring.progress import Bars
from sparring.records import Candidate, Prompt, Response

LONGEST = 256  # tokens of a response, where neither evaluation nor method says
COLUMNS = ("", "_greedy")  # of a prompt's two responses: sampled at temperature 1, and greedy
Answers = list[tuple[Response, Response]]


class Evaluator:
    """Lets the policy answer held-out prompts, sampled and greedy, and the run's judge say what the answers are worth.

    eval/win_rate: mean of P(policy's response beats the start's) over what could be judged, a tie counting 1/2, with a 95%
    bootstrap interval over prompts from eval/win_rate_low to eval/win_rate_high; eval/score: mean score, where the judge scores;
    eval/nll: nats per token of given responses, end of turn included; eval/length: tokens; eval/finished: share that ended by
    themselves; eval/not_judged: comparisons, or scores, without an answer. Those of greedy responses end in ``_greedy``. The
    responses are kept in ``evaluation/000120.parquet``, after 120 updates.
    """

    def __init__(
        self, config: Config, chat: Chat, learner: Learner, context: Context, folder: Path, bars: Bars
    ) -> None:
        """Read the prompts; ValueError where there are none."""
        keys = config.evaluation
        self.config, self.learner, self.context, self.bars = config, learner, context, bars
        self.folder, self.every = folder / "evaluation", keys.eval_steps
        data = replace(
            config.data,
            dataset_name=keys.eval_dataset_name or "",
            dataset_train_split=keys.eval_split,
            max_samples=keys.eval_max_samples,
        )
        self.loaded = _loaded(data, chat)
        self.prompts: Sequence[Prompt] = self.loaded.prompts
        self.fingerprint = digest(self.prompts)
        own = getattr(config.method, "max_new_tokens", LONGEST)
        longest = own if keys.eval_max_new_tokens is None else keys.eval_max_new_tokens
        self.rooms = [max(0, min(longest, context.max_length - len(prompt.token_ids))) for prompt in self.prompts]

    def summary(self, prompts: Sequence[Prompt]) -> str:
        """What is held out, and whether some of it stands among ``prompts``, which are trained on."""
        trained = {prompt.text for prompt in prompts}
        shared = sum(prompt.text in trained for prompt in self.prompts)
        also = f"; {shared} of these prompts are trained on as well, and say nothing of others" if shared else ""
        return f"held out: {self.loaded.summary()}{also}"

    def due(self, step: int, last: bool) -> bool:
        """Whether it is to be measured after update ``step``, the ``last`` of a round or run."""
        return last or (self.every > 0 and step % self.every == 0)

    def measure(self, step: int) -> dict[str, float]:
        """The metrics of the policy after ``step`` updates; at 0 of the start, against whose responses others are held."""
        count = len(self.prompts) * len(COLUMNS)
        with self.bars.stage("evaluate writes", count, unit="responses"):
            answers = self._answers(step)
        metrics = self._nll()
        for side, ending in enumerate(COLUMNS):
            mine = [both[side] for both in answers]
            metrics[f"eval/length{ending}"] = sum(len(r.token_ids) for r in mine) / len(mine)
            metrics[f"eval/finished{ending}"] = sum(r.finished for r in mine) / len(mine)
        if isinstance(self.context.judge, NoJudge):
            return metrics
        start = answers if step == 0 else self._kept(0)
        with self.bars.stage("evaluate judges", None, unit="answers"):
            for side, ending in enumerate(COLUMNS):
                metrics |= self._judged([both[side] for both in answers], [both[side] for both in start], step, ending)
        return metrics

    def _judged(self, mine: Sequence[Response], start: Sequence[Response], step: int, ending: str) -> dict[str, float]:
        judge, found, missing = self.context.judge, {}, 0
        if judge.scores:
            scores = judge.score(list(zip(self.prompts, mine, strict=True)))
            known = [score for score in scores if score is not None]
            missing = len(scores) - len(known)
            found = {f"eval/score{ending}": sum(known) / len(known)} if known else {}
        if step > 0:
            sides = zip(self.prompts, mine, start, strict=True)
            verdicts = [verdict.probability for verdict in judge.compare([Comparison(*each) for each in sides])]
            missing = sum(p is None for p in verdicts)
            if wins := [p for p in verdicts if p is not None]:
                low, high = interval(wins)
                found |= {f"eval/win_rate{ending}": sum(wins) / len(wins)}
                found |= {f"eval/win_rate_low{ending}": low, f"eval/win_rate_high{ending}": high}
        return found | {f"eval/not_judged{ending}": float(missing)}

    def _answers(self, step: int) -> Answers:
        """The policy's responses, which are kept."""
        writer, seeds = self.context.writers["policy"], self.context.seeds
        columns = []
        for how in (Sampling(), GREEDY):
            asked = zip(self.prompts, self.rooms, strict=True)
            writings = writer.write([Request(p.token_ids, room, seeds("evaluate", p.id)) for p, room in asked], how)
            columns.append(
                [Response(writer.text(w.token_ids), w.token_ids, writer.source, w.finished) for w in writings]
            )
        if self.learner.roles.world.main:
            self.folder.mkdir(exist_ok=True)
            rows = (
                Candidate(prompt.id, prompt.text, place, column[number])
                for number, prompt in enumerate(self.prompts)
                for place, column in enumerate(columns)
            )
            parquet.write(self._file(step), Candidate, rows)
        self.learner.roles.world.wait()
        return list(zip(*columns, strict=True))

    def _kept(self, step: int) -> Answers:
        responses = [candidate.response for candidate in parquet.read(self._file(step), Candidate)]
        return list(zip(responses[::2], responses[1::2], strict=True))

    def _file(self, step: int) -> Path:
        return self.folder / f"{step:06d}.parquet"

    def _nll(self) -> dict[str, float]:
        given = [Group(p.token_ids, [p.human.token_ids]) for p in self.prompts if p.human]
        return {"eval/nll": -float(token_logps(self.learner, given).mean())} if given else {}


def in_words(metrics: Mapping[str, float]) -> str:
    """What was measured, sampled first and greedy in parentheses."""
    parts = []
    for ending, of in zip(COLUMNS, ("", "greedily "), strict=True):
        if f"eval/win_rate{ending}" in metrics:
            mean, low, high = (metrics[f"eval/win_rate{part}{ending}"] for part in ("", "_low", "_high"))
            parts.append(f"{of}beats the start {mean:.1%} [{low:.1%}, {high:.1%}]")
    for name in ("score", "length", "finished"):
        both = [metrics[f"eval/{name}{e}"] for e in COLUMNS if f"eval/{name}{e}" in metrics]
        if both:
            parts.append(f"{name} {both[0]:.4g}" + (f" ({both[1]:.4g})" if len(both) > 1 else ""))
    if "eval/nll" in metrics:
        parts.append(f"{metrics['eval/nll']:.4f} nats per token of given responses")
    return "held out: " + ", ".join(parts)


def _loaded(data: DataConfig, chat: Chat) -> Loaded:
    """Prompts with responses, where the data set has some; else alone."""
    try:
        return load(data, chat, need="responses")
    except ValueError:
        return load(data, chat, need="prompts")
