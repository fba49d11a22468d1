"""Generation in this process: packed where the model can be, padded where it cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from sparring.actors.packed import Batch, Row, can_pack
from sparring.actors.padded import write_padded
from sparring.actors.sampling import choose
from sparring.actors.slots import SlotBatch, can_slot
from sparring.methods.base import Request, Sampling, Writing
from sparring.model.attention import Kind, kind_for
from sparring.model.logps import unwrapped
from sparring.model.timing import fastest
from sparring.records import Tokens, tokens

__all__ = ["CacheKind", "LocalWriter", "choose"]

CacheKind = Literal["auto", "dynamic", "static"]
KINDS: dict[str, type[Batch]] = {"dynamic": Batch, "static": SlotBatch}
MEASURED = {"cuda"}  # elsewhere compiling takes longer than most runs write
TRIAL = 48  # tokens that rows write at most while the caches are compared


class LocalWriter:
    """Writes with a model of this process.

    Every row has its own random stream, so what it draws depends on its seed and its tokens' probabilities alone, not on the
    batch it stands in.
    """

    def __init__(
        self,
        playing: Callable[[], contextlib.AbstractContextManager[Any]],
        *,
        source: Callable[[], str],
        decode: Callable[[Sequence[int]], str],
        end_ids: frozenset[int],
        pad_id: int,
        batch_size: int,
        cache: CacheKind = "dynamic",
        tick: Callable[[int], None] = lambda rows: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """``playing`` gives the model; ``source`` its name at the time; ``tick`` is told of finished rows.

        ``cache``: one that grows with its rows (dynamic), or of fixed slots, with the step compiled (static); auto is what
        :meth:`settle` finds with the first requests. A model that cannot have a static one has a dynamic one, and ``say`` is told;
        one that cannot be packed has transformers' own.
        """
        self._playing, self._source, self._decode = playing, source, decode
        self.end_ids, self.pad_id, self.batch_size, self._tick = end_ids, pad_id, batch_size, tick
        self.cache, self._say = cache, say
        self.layouts: dict[tuple[type, torch.dtype], Kind] = {}  # that models turned out to be right in
        self.slotted: dict[tuple[type, torch.dtype], bool] = {}  # whether a static cache turned out to be right

    @property
    def source(self) -> str:
        """Who writes, as responses record it."""
        return self._source()

    def text(self, token_ids: Tokens) -> str:
        """Tokens as text, without special ones."""
        return self._decode(token_ids)

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Writing]:
        """One writing for each request, in order."""
        rows, cache = [Row(request) for request in requests], self.settle(requests, sampling)
        with self._playing() as playing, torch.no_grad():
            model = unwrapped(playing)
            kind = self._layout(model)
            if kind == "dense":
                write_padded(model, rows, self.batch_size, sampling, self.end_ids, self.pad_id, self._tick)
            else:
                static = cache == "static" and self._slots(model, kind)
                about = model, kind, self.batch_size, sampling, self.end_ids, self._tick
                KINDS["static" if static else "dynamic"](*about).write(rows)
        return [Writing(tokens(row.ids), finished=bool(row.ids) and row.ids[-1] in self.end_ids) for row in rows]

    def settle(self, requests: Sequence[Request], sampling: Sampling) -> CacheKind:
        """Which cache is faster with the first of ``requests``: on CUDA measured, elsewhere dynamic; where it is auto."""
        if self.cache != "auto" or not requests:
            return self.cache
        self.cache = "dynamic"
        with self._playing() as playing, torch.no_grad():
            model = unwrapped(playing)
            device = next(model.parameters()).device
            if device.type not in MEASURED or (kind := self._layout(model)) == "dense":
                return self.cache
            few = [replace(r, max_new_tokens=min(TRIAL, r.max_new_tokens)) for r in requests[: self.batch_size]]
            about = model, kind, self.batch_size, sampling, self.end_ids, lambda rows: None

            def way(cache: str) -> None:
                if cache == "static" and not self._slots(model, kind):
                    raise RuntimeError("its logits are not those of plain forward passes")
                KINDS[cache](*about).write([Row(request) for request in few])

            ways = {cache: partial(way, cache) for cache in KINDS}
            if fastest("cache that responses are written with", ways, device, self._say) == "static":
                self.cache = "static"
        return self.cache

    def _slots(self, model: Any, kind: Kind) -> bool:
        name = type(model), next(model.parameters()).dtype
        if name not in self.slotted:
            self.slotted[name] = can_slot(model, kind)
            if not self.slotted[name]:
                self._say(f"{name[0].__name__} cannot be written with a static cache: it has a dynamic one")
        return self.slotted[name]

    def _layout(self, model: Any) -> Kind:
        weight = next(model.parameters())
        name = type(model), weight.dtype
        if name not in self.layouts:
            # A model may be dense for lack of a kernel with soft-capped scores, which ours has.
            kinds: list[Kind] = [kind_for(weight.device, model.config._attn_implementation), "segments"]
            packable = (kind for kind in kinds if kind != "dense" and can_pack(model, kind))
            self.layouts[name] = next(packable, "dense")
        return self.layouts[name]
