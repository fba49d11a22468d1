"""Groups of responses -> micro-batches under a token budget -> tensors, with what a group's sequences share laid out once.

A group is a prompt and the responses to it. In the packed layout it is a tree of two levels: a trunk (the prompt and the tokens
with which all its responses begin) and a branch for the rest of each response. A token attends to its own segment up to itself
and, from a branch, to the whole trunk. The last token of a sequence predicts nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparring.records import Tokens, tokens
from sparring.transfer import moved

ROOT = -1  # the parent of a segment that has none


class Group(NamedTuple):
    """A prompt and the responses to it, as tokens; the prompt has at least one."""

    prompt: Tokens
    responses: Sequence[Tokens]


class Segment(NamedTuple):
    """Positions [start, stop) of a packed row, and the position in the list of the segment that comes before it."""

    start: int
    stop: int
    parent: int = ROOT


@dataclass(frozen=True)
class Scored:
    """Where the N scored tokens of a layout are, group by group, and which of them make up each of the R responses.

    A response's tokens are ``shared`` ones, beginning at ``first_shared`` among the N, then its own, beginning at ``first_own``.
    """

    predictors: Tensor  # [N], the position (of the flattened [rows, T]) whose hidden state predicts the token
    targets: Tensor  # [N], the token
    shared: Tensor  # [R]
    first_shared: Tensor  # [R]
    first_own: Tensor  # [R]
    lengths: Tensor  # [R]
    token_bounds: list[int]  # group g's tokens are [token_bounds[g], token_bounds[g + 1]) of the N
    row_bounds: list[int]  # and its responses [row_bounds[g], row_bounds[g + 1]) of the R

    def sums(self, logps: Tensor, spans: Tensor, first: int = 0) -> Tensor:
        """Sums of ``logps`` over spans of response tokens, [len(spans)], added up in float64.

        ``logps`` [n] are the tokens from number ``token_bounds[first]`` on, ``spans`` [r, 2] belong to the responses from number
        ``row_bounds[first]`` on and count from a response's first token.
        """
        rows = slice(self.row_bounds[first], self.row_bounds[first] + len(spans))
        shared = self.shared[rows, None]
        totals = torch.nn.functional.pad(logps.double().cumsum(0), (1, 0))
        common = self.first_shared[rows, None] + spans.minimum(shared)
        own = self.first_own[rows, None] + (spans - shared).clamp(min=0)
        start = self.token_bounds[first]
        return (totals[common - start].diff(dim=1) + totals[own - start].diff(dim=1)).squeeze(1).float()


@dataclass(frozen=True)
class Packed:
    """Groups one after the other in one row without padding."""

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T], counted within each sequence
    segments: list[Segment]
    scored: Scored


@dataclass(frozen=True)
class Padded:
    """One row for each response, padded on the right."""

    input_ids: Tensor  # [R, T]
    attention_mask: Tensor  # [R, T]
    scored: Scored


def common_prefix(responses: Sequence[Tokens]) -> int:
    """How many tokens all ``responses`` begin with."""
    first, *others = responses
    length = min(map(len, responses))
    for other in others:
        if first[:length] != other[:length]:
            length = next(i for i in range(length) if first[i] != other[i])
    return length


def packed_size(group: Group) -> int:
    """Tokens that ``group`` takes in the packed layout."""
    shared = common_prefix(group.responses)
    own = sum(max(0, len(response) - shared - 1) for response in group.responses)
    ends = all(len(response) == shared for response in group.responses)
    return len(group.prompt) + shared - ends + own


def padded_size(group: Group) -> int:
    """Tokens that ``group`` takes in the padded layout when nothing longer stands beside it."""
    return len(group.responses) * (len(group.prompt) + max(map(len, group.responses)))


def pack(groups: Sequence[Group], device: torch.device, *, even: bool = False) -> Packed:
    """``groups`` in one row.

    ``even``: with a filler at the end that nothing looks at, so that rows come in few lengths, in whole blocks of 128: eight
    lengths in each octave, from 128 on.
    """
    ids: list[Tokens] = []
    positions: list[Tensor] = []
    segments: list[Segment] = []
    marks = _Marks()
    place = 0

    def put(piece: Tokens, first: int, parent: int) -> None:
        nonlocal place
        ids.append(piece)
        positions.append(torch.arange(first, first + len(piece)))
        segments.append(Segment(place, place + len(piece), parent))
        place += len(piece)

    for group in groups:
        shared = common_prefix(group.responses)
        trunk = group.prompt + group.responses[0][:shared]
        start = place
        last = all(len(response) == shared for response in group.responses)
        put(trunk[: len(trunk) - last], 0, ROOT)
        parent = len(segments) - 1
        first_shared = marks.tokens(start + len(group.prompt) - 1, group.responses[0][:shared])
        for response in group.responses:
            own = response[shared:]
            first_own = marks.tokens(place - 1, own)
            if own:
                marks.predictors[first_own] = start + len(trunk) - 1
            marks.response(shared, first_shared, first_own, len(response))
            if len(own) > 1:
                put(own[:-1], len(trunk), parent)
        marks.group()
    if even:
        step = max(128, (1 << (place.bit_length() - 1)) // 8)
        if filler := -place % step:
            put(tokens([0]) * filler, 0, ROOT)
            positions[-1].zero_()  # models with a table of positions have no more than their own
    row = torch.cat([torch.frombuffer(piece, dtype=torch.int32).long() for piece in ids])
    laid, at, scored = marks.placed(device, row[None], torch.cat(positions)[None])
    return Packed(laid, at, segments, scored)


def pad(groups: Sequence[Group], pad_id: int, device: torch.device) -> Padded:
    """``groups`` as rows of one response each."""
    rows = [group.prompt + response for group in groups for response in group.responses]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    marks = _Marks()
    place = 0
    for group in groups:
        for response in group.responses:
            row = group.prompt + response
            ids[place, : len(row)] = torch.frombuffer(row, dtype=torch.int32).long()
            mask[place, : len(row)] = 1
            first = marks.tokens(place * width + len(group.prompt) - 1, response)
            marks.response(0, first, first, len(response))
            place += 1
        marks.group()
    return Padded(*marks.placed(device, ids, mask))


def micro_batches(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Places of ``sizes`` in bins that hold at most ``budget`` together, by first fit in falling order.

    Each bin is in rising order, and the bins are by their first place. Raises ValueError where one size alone is above ``budget``.
    """
    bins: list[tuple[int, list[int]]] = []
    for place in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if sizes[place] > budget:
            raise ValueError(f"{sizes[place]} tokens do not fit into max_tokens_per_micro_batch {budget}: raise it")
        for number, (used, places) in enumerate(bins):
            if used + sizes[place] <= budget:
                bins[number] = (used + sizes[place], [*places, place])
                break
        else:
            bins.append((sizes[place], [place]))
    return sorted(sorted(places) for _, places in bins)


class _Marks:
    """Collects a layout's scored tokens."""

    def __init__(self) -> None:
        self.predictors: list[int] = []
        self.targets: list[int] = []
        self.rows: list[tuple[int, int, int, int]] = []
        self.token_bounds, self.row_bounds = [0], [0]

    def tokens(self, predictor: int, tokens: Tokens) -> int:
        """Score consecutive ``tokens``, of which ``predictor`` predicts the first; their place among the scored ones."""
        first = len(self.targets)
        self.targets += tokens
        self.predictors += range(predictor, predictor + len(tokens))
        return first

    def response(self, *row: int) -> None:
        self.rows.append(row)  # type: ignore[arg-type]

    def group(self) -> None:
        self.token_bounds.append(len(self.targets))
        self.row_bounds.append(len(self.rows))

    def placed(self, device: torch.device, ids: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Scored]:
        """A layout's two tensors and its scored tokens, on ``device``."""
        scored = torch.tensor([self.predictors, self.targets], dtype=torch.long)
        rows = torch.tensor(self.rows, dtype=torch.long).T.contiguous()
        ids, other, (predictors, targets), (shared, first_shared, first_own, lengths) = moved(
            device, ids, other, scored, rows
        )
        bounds = self.token_bounds, self.row_bounds
        return ids, other, Scored(predictors, targets, shared, first_shared, first_own, lengths, *bounds)
