"""A static cache for generation: every row has a slot of fixed size, so a step is one program, compiled once for all shapes.

On CUDA the compiled step is recorded as a graph for each size of the cache, and launched as a whole, where kernels one by one would
wait for Python. Slots whose rows have ended go to others, an eighth of them at a time: continuous batching, in which nothing that
stays is moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as shapes
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from sparring.actors.cache import Piece, Recorder
from sparring.actors.packed import GONE, Batch, Row, differs
from sparring.model.attention import Kind, implementing
from sparring.model.compiling import allow
from sparring.model.scores import refuse_others
from sparring.transfer import moved

NAME = "sparring_slots"
ROOM = 128  # columns that are there before they are needed
SMALLEST = 8  # slots, of which a batch never has fewer once rows have ended
PROGRAMS = 32  # that a step may be compiled to: for models, precisions and the like; sizes are free


class Slots(Cache):
    """Keys and values of the rows in a batch, [R, G, C, D] for each layer; row r's are in columns [0, length of r)."""

    def __init__(self, rows: int, capacity: int, like: Sequence[tuple[Tensor, ...]]) -> None:
        """``like`` are tensors of G groups and depth D, [..., G, *, D], two for each layer."""
        super().__init__(layers=[])
        self.kept = [tuple(_empty(t, rows, capacity) for t in both) for both in like]
        self._begin(rows, like[0][0].device)

    def _begin(self, rows: int, device: torch.device) -> None:
        """Memory for what a step is given, and nothing recorded that would use other memory."""
        self.given = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.ids, self.at = self.given  # each row's newest token, and the column that it belongs in
        self.run: Callable[[], Tensor] | None = None

    @property
    def capacity(self) -> int:
        """Columns."""
        return int(self.kept[0][0].shape[2])

    def put(self, pieces: Mapping[int, Piece]) -> None:
        """Let slots hold prompts that were read, in place of what they held."""
        by_packed: dict[int, tuple[Recorder, dict[int, Piece]]] = {}
        for slot, piece in pieces.items():
            by_packed.setdefault(id(piece.packed), (piece.packed, {}))[1][slot] = piece
        device = self.at.device
        for recorder, entering in by_packed.values():
            lengths = torch.tensor([piece.stop - piece.start for piece in entering.values()])
            into = torch.tensor(list(entering))
            rows = into.repeat_interleave(lengths)
            columns = torch.cat([torch.arange(piece.stop - piece.start) for piece in entering.values()])
            positions = torch.cat([torch.arange(piece.start, piece.stop) for piece in entering.values()])
            into, rows, columns, positions = moved(device, into, rows, columns, positions)
            for mine, read in zip(self.kept, recorder.pairs, strict=True):
                for slots, source in zip(mine, read, strict=True):
                    slots[into] = 0  # what was not finite there would be so with a weight of 0 too
                    slots[rows, :, columns] = source[:, positions].transpose(0, 1)

    def resized(self, rows: Sequence[int], capacity: int) -> None:
        """Become a cache of these ``rows`` alone, with ``capacity`` columns, layer by layer."""
        chosen = torch.tensor(rows, device=self.at.device)
        columns = min(capacity, self.capacity)
        for layer, both in enumerate(self.kept):
            new = tuple(_empty(t, len(rows), capacity) for t in both)
            for into, old in zip(new, both, strict=True):
                into[:, :, :columns] = old[chosen, :, :columns]
            self.kept[layer] = new
        self._begin(len(rows), self.at.device)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Write keys and values [R, G, 1, D] into each row's column; all of the layer's."""
        keys, values = self.kept[layer_idx]
        rows = torch.arange(keys.shape[0], device=keys.device)
        keys[rows, :, self.at] = key_states[:, :, 0]
        values[rows, :, self.at] = value_states[:, :, 0]
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are given, so this is asked in vain."""
        return 0


def _empty(like: Tensor, rows: int, capacity: int) -> Tensor:
    """Of zeros: a weight of 0 makes no number of a NaN. One program takes any number of rows and columns."""
    new = like.new_zeros(rows, like.shape[-3], capacity, like.shape[-1])
    for size in (0, 2):
        torch._dynamo.maybe_mark_dynamic(new, size)
    return new


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    slots: Slots,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling q k^T) v from each row's newest token; query [R, H, 1, D], key and value [R, G, C, D]; [R, 1, H, D].

    NotImplementedError for attention sinks and position biases.
    """
    refuse_others(others, dropout)
    rows, groups = key.shape[:2]
    heads = query.view(rows, groups, -1, query.shape[3])  # a group's heads share its keys, which are read once
    scores = torch.matmul(heads, key.transpose(2, 3)) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    columns, newest = torch.arange(key.shape[2], device=key.device), slots.at[:, None]
    unseen = columns > newest
    if sliding_window is not None:
        unseen = unseen | (columns <= newest - sliding_window)
    weights = scores.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1)
    return torch.matmul(weights, value).view(rows, 1, -1, value.shape[3]), None


AttentionInterface.register(NAME, slot_attention)


class SlotBatch(Batch):
    """Writes rows with a model, at most ``size`` at a time, each in its slot."""

    def write(self, rows: Sequence[Row]) -> None:
        """Write ``rows`` to their ends; long prompts come first, and equal ones together."""
        self.tick(sum(not row.going for row in rows))
        waiting = self.queue(rows)
        most = max((len(row.prompt) + row.limit for row in waiting), default=0)
        places = [waiting.popleft() for _ in range(min(self.size, len(waiting)))]
        slots: Slots | None = None
        entering = dict(enumerate(places))
        try:
            with implementing(self.model, NAME):
                while entering or any(row.going for row in places):
                    if entering:
                        slots = self._admit(slots, places, entering, most)
                    elif slots is not None:
                        if not waiting:
                            places = self._fewer(slots, places)
                        self._widen(slots, places, most)
                        at = [_newest(row) if row.going else 0 for row in places]
                        draws = self.draws(places)
                        self.choose(places, step(self.model, slots, [row.ids[-1] for row in places], at), draws)
                    free = [place for place, row in enumerate(places) if not row.going]
                    enough = len(free) * GONE >= len(places)
                    entering = {place: waiting.popleft() for place in free[: len(waiting)]} if enough else {}
                    places = [entering.get(place, row) for place, row in enumerate(places)]
        finally:
            if slots is not None:
                slots.run = None  # which holds the slots that hold it: their memory is wanted now

    def _admit(self, slots: Slots | None, places: Sequence[Row], entering: Mapping[int, Row], most: int) -> Slots:
        """Read the prompts of ``entering``, write a first token for each, and let their slots hold them."""
        pieces = self.enter(list(entering.values()))
        if slots is None:
            slots = Slots(len(places), self._capacity(places, most), next(iter(pieces.values())).packed.pairs)
        self._widen(slots, places, most)
        slots.put({place: pieces[row] for place, row in entering.items() if row.going})
        return slots

    def _fewer(self, slots: Slots, places: list[Row]) -> list[Row]:
        """The rows, without those that have ended where half of the slots would do."""
        going = [place for place, row in enumerate(places) if row.going]
        size = max(SMALLEST, 1 << (len(going) - 1).bit_length())
        if size >= len(places):
            return places
        kept = sorted(range(len(places)), key=lambda place: not places[place].going)[:size]
        slots.resized(kept, slots.capacity)
        return [places[place] for place in kept]

    def _capacity(self, places: Sequence[Row], most: int) -> int:
        """Columns for what ``places`` hold and some more: a power of two or one and a half, and no more than ``most`` needs."""
        needed = max((_newest(row) + 1 for row in places if row.going), default=1)
        return min(_rounded(needed + ROOM), -(-most // 8) * 8)

    def _widen(self, slots: Slots, places: Sequence[Row], most: int) -> None:
        longest = max((_newest(row) + 1 for row in places if row.going), default=0)
        if longest > slots.capacity:
            slots.resized(range(len(places)), self._capacity(places, most))


def _newest(row: Row) -> int:
    """The column of the last token that ``row`` has, which the next step puts into the cache."""
    return len(row.prompt) + len(row.ids) - 1


def _rounded(columns: int) -> int:
    """The next of 64, 96, 128, 192, 256 and so on: few sizes, since each is recorded anew."""
    power = 1 << max(6, (columns - 1).bit_length())
    return power * 3 // 4 if columns <= power * 3 // 4 and power > 64 else power


def step(model: Any, slots: Slots, ids: Sequence[int], at: Sequence[int]) -> Tensor:
    """Logits [R, V] of what comes after ``ids`` [R], which are put into columns ``at`` [R] of their rows.

    They may be overwritten by the next step. ``model`` is one that attends by this module's name.
    """
    slots.given.copy_(torch.tensor([ids, at]))
    if slots.run is None:
        run = partial(_program(), model, slots)
        # A number of rows that equals another size does so by chance. It is compiled here, if at all.
        with shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            slots.run = recorded(run, slots.given.device) if slots.given.is_cuda else run
            return slots.run()
    return slots.run()


def recorded(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """``run``, recorded as a CUDA graph: it reads and writes the memory that it has now.

    Raises RuntimeError for what cannot be recorded, since it waits for the device, before anything is.
    """
    with torch.cuda.device(device):
        side = _side(device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiled and warm before anything is recorded; to run twice changes nothing
            run()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device meanwhile
            found = run()

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """One stream for all: a library keeps memory for each that it met."""
    return torch.cuda.Stream(device)


def _logits(model: Any, slots: Slots) -> Any:
    words = {"past_key_values": slots, "use_cache": True, "slots": slots, "attention_mask": None}
    return model(input_ids=slots.ids[:, None], position_ids=slots.at[:, None], **words).logits[:, -1]


@functools.cache
def _program() -> Any:
    allow(PROGRAMS)
    return torch.compile(_logits, dynamic=True)


def cannot_slot(model: Any, kind: Kind) -> str | None:
    """Why compiled steps over a static cache do not give the logits of plain forward passes; None: they do.

    A slot that was another's, and slots that become wider and fewer, are tried too.
    """

    def follow(pieces: Sequence[Piece], more: Sequence[int]) -> list[Tensor]:
        slots = Slots(3, 64, pieces[0].packed.pairs)
        slots.put({0: pieces[1], 1: pieces[2], 2: pieces[0]})
        lengths = [piece.stop - piece.start for piece in pieces]
        with implementing(model, NAME):
            found = [step(model, slots, [more[0]] * 3, [lengths[1], lengths[2], lengths[0]]).clone()[[2, 1]]]
            slots.put({0: pieces[0]})
            step(model, slots, [more[0], 0, 0], [lengths[0], 0, 0])
            slots.resized([0, 1], 96)
            slots.put({1: pieces[2]})
            step(model, slots, [0, more[0]], [lengths[0] + 1, lengths[2]])
            found.append(step(model, slots, [more[1]] * 2, [lengths[0] + 1, lengths[2] + 1]).clone())
        slots.run = None
        return found

    return differs(model, kind, follow)
