"""Generation in this process: packed where the model can be, padded where it cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparring.actors.packed import Batch, Row, can_pack
from sparring.actors.padded import write_padded
from sparring.actors.sampling import choose
from sparring.methods.base import Request, Sampling, Writing
from sparring.model.attention import Kind, kind_for
from sparring.model.logps import unwrapped
from sparring.records import Tokens, tokens

__all__ = ["LocalWriter", "choose"]


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
        tick: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """``playing`` gives the model; ``source`` its name at the time; ``tick`` is told of finished rows."""
        self._playing, self._source, self._decode = playing, source, decode
        self.end_ids, self.pad_id, self.batch_size, self._tick = end_ids, pad_id, batch_size, tick
        self.layouts: dict[tuple[type, torch.dtype], Kind] = {}  # that models turned out to be right in

    @property
    def source(self) -> str:
        """Who writes, as responses record it."""
        return self._source()

    def text(self, token_ids: Tokens) -> str:
        """Tokens as text, without special ones."""
        return self._decode(token_ids)

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Writing]:
        """One writing for each request, in order."""
        rows = [Row(request) for request in requests]
        with self._playing() as playing, torch.no_grad():
            model = unwrapped(playing)
            kind = self._layout(model)
            if kind == "dense":
                write_padded(model, rows, self.batch_size, sampling, self.end_ids, self.pad_id, self._tick)
            else:
                Batch(model, kind, self.batch_size, sampling, self.end_ids, self._tick).write(rows)
        return [Writing(tokens(row.ids), finished=bool(row.ids) and row.ids[-1] in self.end_ids) for row in rows]

    def _layout(self, model: Any) -> Kind:
        weight = next(model.parameters())
        name = type(model), weight.dtype
        if name not in self.layouts:
            # A model may be dense for lack of a kernel with soft-capped scores, which ours has.
            kinds: list[Kind] = [kind_for(weight.device, model.config._attn_implementation), "segments"]
            packable = (kind for kind in kinds if kind != "dense" and can_pack(model, kind))
            self.layouts[name] = next(packable, "dense")
        return self.layouts[name]
