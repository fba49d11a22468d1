"""The model of this process as judge of responses, its own among them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from sparring.data.chat import BadRow, Chat
from sparring.data.packing import Group
from sparring.judges.base import Answers
from sparring.judges.verdicts import Instruction, letter, parse
from sparring.methods.base import Comparison, Request, Sampling, Writer
from sparring.model.attention import kind_for
from sparring.model.logps import Scorer, checked, unwrapped
from sparring.model.parallel import ALONE, World
from sparring.records import Tokens, tokens

Playing = Callable[[], contextlib.AbstractContextManager[Any]]
SPELLINGS = ("", "▁", "Ġ")  # of the space before a letter, in vocabularies
GREEDY = Sampling(temperature=0.0)


class PolicyJudge:
    """Asks a model of this process which of two responses is better, ``a`` shown first; the instruction is a user's message.

    With ``verdict`` the writer answers greedily, and P(a beats b) is 1, 0 or 0.5 as the last line says. With ``logprobs`` one
    forward pass gives P(A) / (P(A) + P(B)) of the next token, each letter with and without the space before it. ``tally`` has
    calls, prompt_tokens, completion_tokens, seconds, failures, and failures by kind.

    With several processes each judges its share by its own whole model, and all of them have to call :meth:`compare` equally
    often, with nothing asked where there is nothing to ask: a sharded model's weights are gathered together.
    """

    symmetric = False
    everywhere: ClassVar[bool] = True
    texts_only: ClassVar[bool] = True

    def __init__(
        self,
        chat: Chat,
        instruction: Instruction,
        *,
        writer: Writer,
        playing: Playing,
        whose: Callable[[], str],
        max_length: int,
        max_new_tokens: int,
        rows: int = 64,
        batch_tokens: int = 16384,
        world: World = ALONE,
    ) -> None:
        """Judge as ``writer`` writes, or, with an instruction by logprobs, by the log-probs of the model that ``playing`` gives.

        ``whose`` says whose weights they are, in words that change with them. What is longer than ``max_length`` tokens, the
        verdict included, is not judged. ``rows`` comparisons are asked together, ``batch_tokens`` of them in one forward pass.
        Raises ValueError where the vocabulary has no token for a letter, or nothing fits into ``max_length``.
        """
        self._chat, self._instruction, self._writer, self._playing = chat, instruction, writer, playing
        self._whose, self._rows, self._batch_tokens, self._world = whose, rows, batch_tokens, world
        self._new_tokens = max_new_tokens if instruction.by == "verdict" else 1
        self._room = max_length - self._new_tokens
        self._letters = letters(chat) if instruction.by == "logprobs" else {}
        self._scorer: Scorer | None = None
        self.tally: Counter[str] = Counter()
        asked = chat.prompts([instruction.render("?", "a", "b")])[0]
        if isinstance(asked, BadRow):
            raise ValueError(f"the policy cannot be asked for a verdict ({asked}): give another judge_template")
        if len(asked[1]) > self._room:
            raise ValueError(
                f"the policy cannot judge: its instruction alone has {len(asked[1])} tokens, and max_length {max_length} leaves "
                f"{self._room} beside {self._new_tokens} for the verdict: raise max_length, or lower judge_max_new_tokens"
            )

    @property
    def name(self) -> str:
        """Who judges, as judgments record it: ``policy:policy@120``."""
        return f"policy:{self._writer.source}"

    @property
    def identity(self) -> str:
        """All that answers depend on besides what is asked: the weights first of all."""
        parts = self._whose(), self._instruction.digest, self._instruction.by, self._new_tokens, self._room
        return " ".join(map(str, ("policy", *parts)))

    def compare(self, asked: Sequence[Comparison]) -> Answers:
        """The probability that ``a`` beats ``b``, for each comparison, ``rows`` at a time; None: a failure, counted."""
        parts = [range(first, min(first + self._rows, len(asked))) for first in range(0, len(asked), self._rows)]
        rounds = -self._world.least(-len(parts))  # the most that any process has
        for places in [*parts, *[range(0)] * (rounds - len(parts))]:
            answers = self._some([asked[place] for place in places])
            yield from zip(places, answers, strict=True)

    def _some(self, asked: Sequence[Comparison]) -> list[float | None]:
        answers: list[float | None] = [None] * len(asked)
        prompts: dict[int, Tokens] = {}
        texts = [(each.prompt.asked, each.a.text, each.b.text) for each in asked]
        rendered = [self._instruction.render(*text) for text in texts]
        for place, prompt in enumerate(self._chat.prompts(rendered)):
            if isinstance(prompt, BadRow):
                self._fail(prompt.reason.replace(" ", "_"))
            elif len(prompt[1]) > self._room:
                self._fail("too_long")
            else:
                prompts[place] = prompt[1]
        self.tally["calls"] += len(prompts)
        self.tally["prompt_tokens"] += sum(map(len, prompts.values()))
        judged = self._written if self._instruction.by == "verdict" else self._compared
        for place, answer in zip(prompts, judged(list(prompts.values())), strict=True):
            answers[place] = answer
        return answers

    def _written(self, prompts: Sequence[Tokens]) -> list[float | None]:
        answers = []
        for writing in self._writer.write([Request(ids, self._new_tokens, 0) for ids in prompts], GREEDY):
            self.tally["completion_tokens"] += len(writing.token_ids)
            answers.append(parse(self._writer.text(writing.token_ids)))
            if answers[-1] is None:
                self._fail("unparsable" if writing.finished else "cut")
        return answers

    def _compared(self, prompts: Sequence[Tokens]) -> list[float | None]:
        forms = [tokens([token]) for both in self._letters.values() for token in both]
        groups = [Group(prompt, forms) for prompt in prompts]
        logps = torch.empty(len(groups), len(forms), dtype=torch.float64)
        with self._playing() as playing, torch.no_grad():
            if not groups:
                return []
            scorer = self._fitting(playing, groups)
            budget = max(self._batch_tokens, *map(scorer.size, groups))
            for places in scorer.cut(groups, budget):
                spans = torch.zeros(len(places) * len(forms), 2, dtype=torch.long, device=scorer.device)
                whole = scorer.sums(playing, [groups[place] for place in places], spans)[:, 1]
                logps[places] = whole.view(len(places), len(forms)).double().cpu()
        a, b = logps.split([len(both) for both in self._letters.values()], 1)
        return torch.sigmoid(a.logsumexp(1) - b.logsumexp(1)).tolist()

    def _fitting(self, playing: Any, groups: Sequence[Group]) -> Scorer:
        if self._scorer is None:
            weight = next(unwrapped(playing).parameters())
            kind = kind_for(weight.device, unwrapped(playing).config._attn_implementation)
            self._scorer, _ = checked(kind, playing, groups, self._chat.pad_id, weight.device, weight.dtype)
        return self._scorer

    def _fail(self, kind: str) -> None:
        self.tally["failures"] += 1
        self.tally[f"failures/{kind}"] += 1


def letters(chat: Chat) -> dict[str, list[int]]:
    """The tokens that are A, and those that are B, with or without a space before; ValueError where there are none."""
    vocabulary = chat.tokenizer.get_vocab()
    found = {which: [vocabulary[s + which] for s in SPELLINGS if s + which in vocabulary] for which in ("A", "B")}
    assert all(letter(s + which) == which for s in SPELLINGS for which in found)
    missing = [which for which, ids in found.items() if not ids]
    if missing:
        raise ValueError(
            f"judge_by is logprobs, but the vocabulary has no token for {' and '.join(missing)}: use judge_by verdict"
        )
    return found
