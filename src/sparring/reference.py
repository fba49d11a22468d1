"""A reference that never moves, on pairs that are given: its log-probs computed once before training, and kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparring import folders
from sparring.journal import versions
from sparring.learner import Learner, group_of
from sparring.progress import Bars
from sparring.records import Pair

CHUNK = 512  # pairs between two moves of the bar


def compute(learner: Learner, pairs: Sequence[Pair], start_fingerprint: str | None, bars: Bars) -> None:
    """Let ``learner`` know the reference's log-probs of ``pairs``, from the disk where an earlier run left them.

    Without a fingerprint of it the reference is this run's own, and the disk knows nothing of it.
    """
    if not pairs:
        return
    kept = start_fingerprint is not None
    file = folders.cache("reference") / f"{_key(learner, pairs, start_fingerprint or '')}.safetensors"
    world = learner.roles.world
    if kept and not world.any(not file.is_file()):
        for pair, sums in zip(pairs, load_file(file)["logps"], strict=True):
            learner.roles.known[pair.serial] = sums
        bars.say(f"the reference's log-probs of {len(pairs)} pairs are known from an earlier run: {file}", "dim")
        return
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].length)  # micro-batches of like lengths
    with bars.stage("reference", len(pairs), unit="pairs") as tick:
        for start in range(0, len(pairs), CHUNK):
            some = [pairs[i] for i in order[start : start + CHUNK]]
            learner.reference_sums(some)
            tick(len(some))
    if kept and world.main and all(pair.serial in learner.roles.known for pair in pairs):
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            save_file({"logps": torch.stack([learner.roles.known[pair.serial] for pair in pairs])}, part)
            part.replace(file)
        except (OSError, SafetensorError) as problem:  # this run knows them, and later ones compute them anew
            bars.say(f"the reference's log-probs could not be kept for later runs: {problem}", "yellow")


def _key(learner: Learner, pairs: Sequence[Pair], start_fingerprint: str) -> str:
    """A digest of all that the numbers depend on; the tokens hold tokenizer, template, lengths and data."""
    digest = hashlib.blake2b(digest_size=16)
    layout = learner.scorer([group_of(pair) for pair in pairs[:8]]).kind
    about = (
        start_fingerprint,
        learner.roles.dtype,
        learner.device.type,
        learner.budget,
        learner.roles.world.size,
        layout,
        learner.config.torch_compile,
    )
    digest.update(repr((*about, versions(), learner.roles.described())).encode())
    for pair in pairs:
        sides = [side.token_ids for side in (pair.chosen, pair.rejected) if side is not None]
        digest.update(
            repr((pair.chosen_scored, pair.rejected_scored, *map(len, (pair.prompt_token_ids, *sides)))).encode()
        )
        for ids in (pair.prompt_token_ids, *sides):
            digest.update(ids.tobytes())
    return digest.hexdigest()
