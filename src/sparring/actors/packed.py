"""Generation without padding: prompts are read packed, their rows written side by side; one that ends makes room for another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparring.actors.cache import NAME, Columns, Piece, Recorder
from sparring.actors.sampling import choose
from sparring.data.packing import Group, pack
from sparring.methods.base import Request, Sampling
from sparring.model.attention import Kind, attending, implementing, inputs
from sparring.model.compiling import first_line
from sparring.records import Tokens, tokens
from sparring.transfer import sent

READ = 8192  # tokens of prompts in one forward pass, unless one prompt has more
GONE = 8  # a batch is put together anew when one row in so many has ended
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the logits' spread, for their root mean square difference
UNPACKABLE = (NotImplementedError, TypeError, AttributeError, KeyError, ValueError, IndexError, RuntimeError)


class Row:
    """A request, its random stream, and what is written so far."""

    def __init__(self, request: Request) -> None:
        self.prompt, self.limit, self._seed = request.token_ids, request.max_new_tokens, request.seed
        self.ids: list[int] = []
        self.going = self.limit > 0
        self._draws = np.empty(0)

    def draw(self) -> float:
        """The number in [0, 1) that decides the next token."""
        if not self.going:
            return 0.0
        if not self.ids:  # not before it is its turn: many rows may wait
            self._draws = np.random.Generator(np.random.Philox(self._seed)).random(self.limit)
        return float(self._draws[len(self.ids)])

    def add(self, token: int, ends: frozenset[int]) -> None:
        """Take a token, unless the row has ended."""
        if self.going:
            self.ids.append(token)
            self.going = token not in ends and len(self.ids) < self.limit


class Batch:
    """Writes rows with a model, at most ``size`` at a time."""

    def __init__(
        self, model: Any, kind: Kind, size: int, sampling: Sampling, ends: frozenset[int], tick: Callable[[int], None]
    ) -> None:
        self.model, self.kind, self.size = model, kind, size
        self.sampling, self.ends, self.tick = sampling, ends, tick
        self.device = next(model.parameters()).device

    def write(self, rows: Sequence[Row]) -> None:
        """Write ``rows`` to their ends; long prompts come first, and equal ones together."""
        self.tick(sum(not row.going for row in rows))
        waiting = self.queue(rows)
        batch: list[Row] = []
        columns: Columns | None = None
        while batch or waiting:
            source: dict[Row, int | Piece] = {row: place for place, row in enumerate(batch) if row.going}
            source |= self.enter([waiting.popleft() for _ in range(min(self.size - len(source), len(waiting)))])
            batch = sorted((row for row in source if row.going), key=lambda row: -len(row.prompt) - len(row.ids))
            if batch:
                room = max(row.limit - len(row.ids) for row in batch)
                columns = Columns([source[row] for row in batch], columns, room)
                del source  # the packed prompts
                self._go_on(batch, columns)

    def queue(self, rows: Sequence[Row]) -> deque[Row]:
        """The order in which ``rows`` come to be written."""
        return deque(sorted((r for r in rows if r.going), key=lambda r: (-len(r.prompt), r.prompt.tobytes(), -r.limit)))

    def enter(self, rows: Sequence[Row]) -> dict[Row, Piece]:
        """Read the prompts of ``rows`` and write a first token for each."""
        by_prompt: dict[bytes, list[Row]] = {}
        for row in rows:
            by_prompt.setdefault(row.prompt.tobytes(), []).append(row)
        pieces: dict[Row, Piece] = {}
        for part in _parts(list(by_prompt.values())):
            every = [row for same in part for row in same]
            places = sent(self.device, [place for place, same in enumerate(part) for _ in same])
            draws = self.draws(every)
            logits, found = read(self.model, self.kind, [same[0].prompt for same in part], self.device)
            pieces |= {row: piece for same, piece in zip(part, found, strict=True) for row in same}
            self.choose(every, logits[places], draws)
        return pieces

    def _go_on(self, batch: Sequence[Row], columns: Columns) -> None:
        """Write on until it pays to put the batch together anew."""
        with implementing(self.model, NAME):
            going = len(batch)
            while going and not columns.full and (len(batch) - going) * GONE < len(batch):
                draws = self.draws(batch)
                logits = step(self.model, columns, [row.ids[-1] for row in batch], [row.going for row in batch])
                self.choose(batch, logits, draws)
                going = sum(row.going for row in batch)

    def draws(self, rows: Sequence[Row]) -> Tensor:
        """What decides the next tokens, on the device; asked for before a step, behind which it would wait."""
        return sent(self.device, [row.draw() for row in rows], torch.float64)

    def choose(self, rows: Sequence[Row], logits: Tensor, draws: Tensor) -> None:
        """Add to each of ``rows`` the token that its draw takes of ``logits`` [R, V]."""
        before = sum(row.going for row in rows)
        for row, token in zip(rows, choose(logits, draws, self.sampling).tolist(), strict=True):
            row.add(token, self.ends)
        self.tick(before - sum(row.going for row in rows))


def read(model: Any, kind: Kind, prompts: Sequence[Tokens], device: torch.device) -> tuple[Tensor, list[Piece]]:
    """Logits [P, V] of what comes after each of ``prompts``, and where their keys and values are."""
    groups = [Group(prompt, [prompt[:1]]) for prompt in prompts]  # of one token, which is not laid out
    packed = pack(groups, device, even=kind == "flex")
    words = inputs(model, packed, kind) | {"use_cache": True, "past_key_values": (recorder := Recorder())}
    with attending(model, kind):
        logits: Tensor = model(**words, logits_to_keep=packed.scored.predictors).logits[0]
    return logits, [Piece(recorder, segment.start, segment.stop) for segment in packed.segments[: len(prompts)]]


def step(model: Any, columns: Columns, ids: Sequence[int], going: Sequence[bool]) -> Tensor:
    """Logits [R, V] of what comes after ``ids``, which are put into the cache."""
    device = columns.kept[0][0].device
    # A row that has ended is written on into the void, where positions may have run out.
    at = [columns.length(row) if goes else 0 for row, goes in enumerate(going)]
    inputs, positions = torch.tensor([ids, at], device=device)[:, :, None]
    words = {"past_key_values": columns, "use_cache": True, "columns": columns}
    logits: Tensor = model(input_ids=inputs, position_ids=positions, attention_mask=None, **words).logits[:, -1]
    columns.end += 1
    return logits


def can_pack(model: Any, kind: Kind) -> bool:
    """Whether generation without padding gives the logits of plain forward passes; the same for the same model always."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - {"full_attention", "sliding_attention"}:
        return False
    windows: set[int | None] = set()

    def follow(pieces: Sequence[Piece], more: Sequence[int]) -> list[Tensor]:
        with implementing(model, NAME):
            columns = Columns([pieces[row] for row in (0, 2, 1)], None, 1)
            found = [step(model, columns, [more[0]] * 3, [True] * 3)[:2]]
            columns = Columns([0, 1], columns, 1)
            found.append(step(model, columns, [more[1]] * 2, [True] * 2))
        windows.update(columns.windows)
        return found

    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    expects = "sliding_attention" in layers if layers else bool(windowed)
    return differs(model, kind, follow) is None and (not expects or windows != {None})


@torch.no_grad()
def differs(model: Any, kind: Kind, follow: Callable[[Sequence[Piece], Sequence[int]], list[Tensor]]) -> str | None:
    """Why prompts read as ``kind``, and what ``follow`` makes of them, do not give plain forward passes' logits; None: they do.

    ``follow`` gets three pieces, and what comes after the first and the third: logits [2, V] after each of those tokens.
    """
    vocabulary, device = model.config.get_text_config().vocab_size, next(model.parameters()).device
    prompts, more = [[(7919 * i + 13 * n) % vocabulary for i in range(n)] for n in (11, 3, 6)], (1, 5)
    try:
        first, pieces = read(model, kind, [tokens(prompt) for prompt in prompts], device)
        found = [first[[0, 2]], *follow(pieces, more)]
        for row, prompt in enumerate((prompts[0], prompts[2])):
            ids = torch.tensor([[*prompt, *more]], device=device)
            expected = model(input_ids=ids, use_cache=False).logits[0, -3:].float()
            away = torch.stack([logits[row] for logits in found]).float() - expected
            if not away.square().mean().sqrt() <= TOLERANCE.get(found[0].dtype, 1e-3) * expected.std():
                return "its logits are not those of plain forward passes"
    except UNPACKABLE as problem:
        return first_line(problem)
    return None


def _parts(groups: Sequence[list[Row]]) -> Iterator[list[list[Row]]]:
    part: list[list[Row]] = []
    size = 0
    for group in groups:
        if part and size + len(group[0].prompt) > READ:
            yield part
            part, size = [], 0
        part.append(group)
        size += len(group[0].prompt)
    if part:
        yield part
