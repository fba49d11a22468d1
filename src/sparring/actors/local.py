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
from sparring.actors.slots import SlotBatch, cannot_slot
from sparring.methods.base import Request, Sampling, Writing
from sparring.model import compiling
from sparring.model.attention import Kind, kind_for
from sparring.model.logps import unwrapped
from sparring.records import Tokens, tokens

__all__ = ["CacheKind", "LocalWriter", "choose"]

CacheKind = Literal["auto", "dynamic", "static"]
CACHES: dict[str, type[Batch]] = {"dynamic": Batch, "static": SlotBatch}
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
        :meth:`settle` finds with the first requests, which ``say`` is told. A model that cannot be packed has transformers' own,
        whichever was asked for.
        """
        self._playing, self._source, self._decode = playing, source, decode
        self.end_ids, self.pad_id, self.batch_size, self._tick = end_ids, pad_id, batch_size, tick
        self.cache, self._say = cache, say
        self.layouts: dict[tuple[type, torch.dtype], Kind] = {}  # that models turned out to be right in
        # Why models cannot have a static cache; None: they can.
        self.slotted: dict[tuple[type, torch.dtype], str | None] = {}

    @property
    def source(self) -> str:
        """Who writes, as responses record it."""
        return self._source()

    def text(self, token_ids: Tokens) -> str:
        """Tokens as text, without special ones."""
        return self._decode(token_ids)

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Writing]:
        """One writing for each request, in order; ValueError where a static cache is asked for, and the model cannot have one."""
        rows, cache = [Row(request) for request in requests], self.settle(requests, sampling)
        with self._playing() as playing, torch.no_grad():
            model = unwrapped(playing)
            kind = self._layout(model)
            if kind == "dense":
                write_padded(model, rows, self.batch_size, sampling, self.end_ids, self.pad_id, self._tick)
            elif cache == "static" and (reason := self._cannot_slot(model, kind)):
                raise ValueError(
                    f"cache_implementation is static, and {type(model).__name__} cannot be written so here ({reason}): leave it at "
                    "auto, or give dynamic"
                )
            else:
                self._batch(cache, model, kind, sampling, self._tick).write(rows)
        return [Writing(tokens(row.ids), finished=bool(row.ids) and row.ids[-1] in self.end_ids) for row in rows]

    def settle(self, requests: Sequence[Request], sampling: Sampling) -> CacheKind:
        """Which cache is faster with the first of ``requests``: on CUDA measured, elsewhere dynamic; where it is auto."""
        few = [replace(r, max_new_tokens=min(TRIAL, r.max_new_tokens)) for r in requests[: self.batch_size]]
        if self.cache != "auto" or not any(request.max_new_tokens for request in few):
            return self.cache
        self.cache = "dynamic"
        with self._playing() as playing, torch.no_grad():
            model = unwrapped(playing)
            device = next(model.parameters()).device
            if device.type not in compiling.MEASURED or (kind := self._layout(model)) == "dense":
                return self.cache

            def way(cache: str) -> None:
                if cache == "static" and (reason := self._cannot_slot(model, kind)):
                    raise RuntimeError(reason)
                self._batch(cache, model, kind, sampling).write([Row(request) for request in few])

            ways = {cache: partial(way, cache) for cache in CACHES}
            if compiling.fastest("the cache for writing", ways, device, self._say) == "static":
                self.cache = "static"
        return self.cache

    def _batch(
        self, cache: str, model: Any, kind: Kind, sampling: Sampling, tick: Callable[[int], None] = lambda rows: None
    ) -> Batch:
        made = CACHES["dynamic" if cache == "auto" else cache]
        return made(model, kind, self.batch_size, sampling, self.end_ids, tick)

    def _cannot_slot(self, model: Any, kind: Kind) -> str | None:
        name = type(model), next(model.parameters()).dtype
        if name not in self.slotted:
            self.slotted[name] = cannot_slot(model, kind)
        return self.slotted[name]

    def _layout(self, model: Any) -> Kind:
        weight = next(model.parameters())
        name = type(model), weight.dtype
        if name not in self.layouts:
            # A model may be dense for lack of a kernel with soft-capped scores, which FlexAttention and ours have.
            own, other = (kind_for(weight.device, how) for how in (model.config._attn_implementation, "sdpa"))
            kinds: dict[Kind, None] = dict.fromkeys((own, other, "segments"))
            packable = (kind for kind in kinds if kind != "dense" and can_pack(model, kind))
            self.layouts[name] = next(packable, "dense")
        return self.layouts[name]
