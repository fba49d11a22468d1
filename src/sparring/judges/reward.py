"""A reward model as judge: a sequence classifier with one label scores a prompt and a response to it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import torch
from transformers import AutoModelForSequenceClassification

from sparring.config import ModelConfig
from sparring.data.chat import Message
from sparring.data.datasets import question
from sparring.judges.base import Answers
from sparring.judges.batches import batches, identity, load_judge, padded, special_marks
from sparring.model import policy
from sparring.records import Prompt, Response

Encoded = dict[str, list[int]]


class RewardModel:
    """Scores by the sequence classifier at ``name``, ``batch_tokens`` at a time, padding included.

    Input is the conversation with the response as its last turn, by the model's own chat template; without one, the tokenizer's
    own form of a pair where it has a token between the two, else the response right after the prompt. What is too long for the
    model, spells one of its special tokens or is refused by its template is answered None and counted. Raises ValueError for a
    model that is no classifier with one label.
    """

    everywhere: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_tokens: int,
        trust_remote_code: bool = False,
        revision: str = "main",
    ) -> None:
        config = ModelConfig(model_name_or_path=name, model_revision=revision, trust_remote_code=trust_remote_code)
        about = policy.configuration(config)
        kinds = list(about.architectures or [])
        own = AutoModelForSequenceClassification.__name__ in (getattr(about, "auto_map", None) or {})
        if not (own or any(kind.endswith("ForSequenceClassification") for kind in kinds)):
            raise ValueError(
                f"{name} is a {', '.join(kinds) or about.model_type}, no reward model: give a sequence classifier with one "
                "label, as LlamaForSequenceClassification is"
            )
        if about.num_labels != 1:
            raise ValueError(f"{name} has {about.num_labels} labels, and a reward model has one: give another model")
        self.name = f"reward_model:{name}"
        self.tally: Counter[str] = Counter()
        self.warnings: list[str] = []  # what a person should be told, once each
        self.tokenizer: Any = policy.load_tokenizer(config)
        self.model = load_judge(
            AutoModelForSequenceClassification, config, device, dtype, trust_remote_code=trust_remote_code
        )
        policy.check_vocabulary(self.tokenizer, self.model)
        self.device, self.batch_tokens = device, batch_tokens
        self.identity = identity(self.name, config, self.model, self.tokenizer)
        self._marks = special_marks(self.tokenizer)
        room = getattr(about.get_text_config(), "max_position_embeddings", None) or math.inf
        self.longest = min(room, self.tokenizer.model_max_length)

    @torch.no_grad()
    def score(self, asked: Sequence[tuple[Prompt, Response]]) -> Answers:
        """Each response's score, the longest first."""
        self.tally["calls"] += len(asked)
        rows: dict[int, Encoded] = {}
        for place, (prompt, response) in enumerate(asked):
            encoded = self._encoded(prompt, response)
            if isinstance(encoded, str):
                self._fail(encoded, prompt)
                yield place, None
            else:
                rows[place] = encoded
        places = list(rows)
        for batch in batches([len(rows[place]["input_ids"]) for place in places], self.batch_tokens):
            found = self._scores([rows[places[n]] for n in batch])
            for n, score in zip(batch, found, strict=True):
                finite = math.isfinite(score)
                if not finite:
                    self._fail("what it gives no finite score", asked[places[n]][0])
                yield places[n], score if finite else None

    def _scores(self, rows: Sequence[Encoded]) -> list[float]:
        """The model's scores; a row's is the same whatever rows stand beside it."""
        about = self.model.config.get_text_config()
        given = about.pad_token_id
        known = isinstance(given, int) and 0 <= given < about.vocab_size
        # A classifier of the last token looks for the last one that is not padding. Where its configuration names none, it takes
        # the last of all: padding must then be an id that no row has.
        pad = given if known else _unused(rows)
        ids, mask = padded([row["input_ids"] for row in rows], pad, self.device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in rows[0]:
            inputs["token_type_ids"] = padded([row["token_type_ids"] for row in rows], 0, self.device)[0]
        try:
            about.pad_token_id = self.model.config.pad_token_id = pad
            logits = self.model(**inputs).logits
        finally:
            about.pad_token_id = self.model.config.pad_token_id = given
        found: list[float] = logits[:, 0].float().tolist()
        return found

    def _encoded(self, prompt: Prompt, response: Response) -> Encoded | str:
        """The model's input, or why there is none."""
        asked = conversation(prompt)
        texts = [response.text, *(text for turn in asked for text in turn.values() if isinstance(text, str))]
        if any(map(self._marks.search, texts)):
            return "a special token of the reward model in the text"
        if self.tokenizer.chat_template:
            turns: Any = [*asked, {"role": "assistant", "content": response.text}]
            try:
                text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            except (jinja2.TemplateError, TypeError) as problem:
                return f"a conversation that the reward model's chat template refuses ({problem})"
            encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)  # the template prints its own BOS
        else:
            plain = prompt.asked
            paired = self.tokenizer.sep_token is not None and self.tokenizer.cls_token is not None
            both = (plain, response.text) if paired else (plain + response.text,)
            encoded = self.tokenizer(*both, verbose=False)
        if len(encoded["input_ids"]) > self.longest:
            return "more tokens than the reward model reads"
        return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}

    def _fail(self, reason: str, prompt: Prompt) -> None:
        self.tally["failures"] += 1
        self.tally["too_long"] += reason.startswith("more tokens")
        kind = reason.partition("(")[0]
        if not any(kind in told for told in self.warnings):
            self.warnings.append(
                f"{self.name} was given {reason}; first in row {prompt.id}. Such a response is not judged"
            )


def conversation(prompt: Prompt) -> list[Message]:
    """The turns that ask for a response: the row's own messages where it has them, else one message with the question."""
    for value in prompt.row.values():
        if isinstance(value, list) and value and all(isinstance(turn, Mapping) and "role" in turn for turn in value):
            for turns in _prefixes(value):
                if turns and prompt.question and question(turns) == prompt.question:
                    return [{"role": turn["role"], "content": turn.get("content") or ""} for turn in turns]
    return [{"role": "user", "content": prompt.asked}]


def _prefixes(turns: list[Message]) -> Iterator[list[Message]]:
    """A conversation, and what comes before its last answer."""
    yield turns
    last = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    yield turns[:last]


def _unused(rows: Sequence[Encoded]) -> int:
    """The lowest id that is in no row."""
    used = {i for row in rows for i in row["input_ids"]}
    return next(n for n in range(len(used) + 1) if n not in used)
