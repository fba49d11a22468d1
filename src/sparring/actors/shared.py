"""Generation divided over processes: each writes its share of the rows, and all of them get the whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparring.methods.base import Request, Sampling, Writer, Writing
from sparring.model.parallel import World
from sparring.records import Tokens, tokens


class SharedWriter:
    """``writer`` in every process of ``world``."""

    def __init__(self, writer: Writer, world: World, device: torch.device, *, alone: bool = False) -> None:
        """Writings meet on ``device``; ``alone``: the main process writes them all, and the others only get them."""
        self._writer, self._world, self._device, self._alone = writer, world, device, alone

    @property
    def source(self) -> str:
        """Who writes, as responses record it."""
        return self._writer.source

    def text(self, token_ids: Tokens) -> str:
        """Tokens as text, without special ones."""
        return self._writer.text(token_ids)

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Writing]:
        """One writing for each request, in order, the same in all processes."""
        sizes = [len(request.token_ids) + request.max_new_tokens for request in requests]
        mine = self._world.deal(sizes)[self._world.rank]
        if self._alone:
            mine = list(range(len(requests))) if self._world.main else []
        longest = max((request.max_new_tokens for request in requests), default=0)
        table = torch.zeros(len(requests), 2 + longest, dtype=torch.long)  # length, finished, tokens
        for place, written in zip(mine, self._writer.write([requests[i] for i in mine], sampling), strict=True):
            row = [len(written.token_ids), int(written.finished), *written.token_ids]
            table[place, : len(row)] = torch.tensor(row)
        rows = self._world.sum(table.to(self._device)).tolist()
        return [Writing(tokens(row[2 : 2 + row[0]]), bool(row[1])) for row in rows]
