"""PairRM (arXiv 2306.02561) as judge: an encoder reads a prompt and two responses, and says how much better the first is.

The published classes are ``DebertaV2PairRM`` and ``CrossCompareReranker`` of the package llm-blender, the published weights
llm-blender/PairRM-hf and llm-blender/PairRM, both in safetensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Model, DebertaV2PreTrainedModel

from sparring.config import ModelConfig
from sparring.judges.base import Answers
from sparring.judges.batches import batches, identity, load_judge, padded, special_marks
from sparring.judges.blender import ADDED, FIRST, MARKS, SOURCE, read
from sparring.methods.base import Comparison
from sparring.model import policy
from sparring.ranking import bradley_terry


class PairRanker(DebertaV2PreTrainedModel):
    """DeBERTa with a head on the states of the three marks; its weights are named as the published class names them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.pretrained_model = DebertaV2Model(config)
        size = config.hidden_size
        self.head_layer = nn.Sequential(
            nn.Dropout(0.0), nn.Linear(2 * size, size), nn.Tanh(), nn.Dropout(0.0), nn.Linear(size, config.n_tasks)
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """L = mean over tasks of h(source, first) - h(source, second); ids and mask [B, T], each mark once a row; returns [B]."""
        states_BTH = self.pretrained_model(input_ids=ids, attention_mask=mask).last_hidden_state
        rows = torch.arange(len(ids), device=ids.device)
        places = [(ids == getattr(self.config, name)).int().argmax(1) for name in MARKS]
        source, first, second = (states_BTH[rows, place] for place in places)
        gap: Tensor = self.head_layer(torch.cat([source, first], -1)) - self.head_layer(torch.cat([source, second], -1))
        return gap.mean(-1)


class PairRM:
    """Compares by PairRM at ``name``, in either form, asked in both orders, ``batch_tokens`` at a time, padding included.

    P(a beats b) = sigmoid((L_ab - L_ba) / 2). The input is <|source|>, <|candidate1|> and <|candidate2|>, each with its text,
    between [CLS] and [SEP]; the prompt's is as a person reads it. They are cut as the authors cut: the prompt to
    ``source_max_length`` tokens, each response to half of what that leaves of ``source_max_length + 2 candidate_max_length``;
    comparisons that lost anything are counted under ``cut``. Without limits given they are 1224 and 412, in LLM-Blender's own
    form those of its config.json. Raises ValueError for what is no PairRM in safetensors, and where a part of it is missing.
    """

    symmetric = True
    everywhere: ClassVar[bool] = True
    texts_only: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_tokens: int,
        revision: str = "main",
        source_max_length: int | None = None,
        candidate_max_length: int | None = None,
    ) -> None:
        config = ModelConfig(model_name_or_path=name, model_revision=revision)
        published = read(config)
        self.name = f"pairrm:{name}"
        self.tally: Counter[str] = Counter()
        self.warnings: list[str] = []  # what a person should be told, once each
        self.tokenizer = published.tokenizer
        self.model = load_judge(PairRanker, config, device, dtype, about=published.about, strict=True)
        policy.check_vocabulary(self.tokenizer, self.model.pretrained_model)
        self.device, self.batch_tokens = device, batch_tokens
        source, candidate = published.limits
        self.source_max_length = source if source_max_length is None else source_max_length
        candidate = candidate if candidate_max_length is None else candidate_max_length
        self.room = self.source_max_length + 2 * candidate
        whole = f"{identity(self.name, config, self.model, self.tokenizer)}:{self.source_max_length}:{self.room}"
        self.identity = f"{whole}:{published.base}" if published.base else whole
        self._marks = special_marks(self.tokenizer, ADDED)
        self._ids = [getattr(published.about, key) for key in MARKS]

    @torch.no_grad()
    def compare(self, asked: Sequence[Comparison]) -> Answers:
        """The probability that ``a`` beats ``b``, the longest comparisons first."""
        self.tally["calls"] += len(asked)
        given = [self._rows(one) for one in asked]
        pad = self.tokenizer.pad_token_id
        for batch in batches([2 * len(one) for one, _ in given], self.batch_tokens):
            ids, mask = padded([given[n][order] for order in (0, 1) for n in batch], pad, self.device)
            gaps: list[float] = self.model(ids, mask).float().tolist()
            for n, ab, ba in zip(batch, gaps[: len(batch)], gaps[len(batch) :], strict=True):
                yield n, self._probability(ab, ba, asked[n])

    def _probability(self, ab: float, ba: float, one: Comparison) -> float | None:
        if not (math.isfinite(ab) and math.isfinite(ba)):
            self.tally["failures"] += 1
            if self.tally["failures"] == 1:
                self.warnings.append(
                    f"{self.name} gives row {one.prompt.id} no finite score. Such a pair is not judged"
                )
            return None
        self.tally["orders_asked"] += 1
        self.tally["orders_agreed"] += ab * ba < 0
        return bradley_terry((ab - ba) / 2)

    def _rows(self, one: Comparison) -> tuple[list[int], list[int]]:
        """The model's input for a against b, and for b against a."""
        texts = [SOURCE + self._plain(one.prompt.asked)]
        texts += [FIRST + self._plain(response.text) for response in (one.a, one.b)]
        source, *answers = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        source, cut = self._cut(source, self.source_max_length)
        limit = (self.room - len(source)) // 2
        (a, a_cut), (b, b_cut) = (self._cut(answer, limit) for answer in answers)
        self.tally["cut"] += cut or a_cut or b_cut
        return [*source, *a, *self._second(b)], [*source, *b, *self._second(a)]

    def _plain(self, text: str) -> str:
        """``text`` without what spells a special token: a space for each, as the authors have it for [SEP]."""
        return self._marks.sub(" ", text)

    def _cut(self, ids: list[int], limit: int) -> tuple[list[int], bool]:
        """At most ``limit`` ids with the last one, [SEP], kept; and whether that cut anything."""
        return (ids, False) if len(ids) <= limit else ([*ids[: limit - 1], ids[-1]], True)

    def _second(self, ids: list[int]) -> list[int]:
        _, first, second = self._ids
        return [second if i == first else i for i in ids]
