"""The stages of a round by themselves: write, rank, pair. Put a step of your own between them.

Each reads and writes folders of Parquet (:mod:`sparring.data.stage_files`); the same command goes on where it stopped.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparring.actors.launch import serving
from sparring.actors.local import LocalWriter
from sparring.actors.server import ServerWriter
from sparring.actors.servers import check_servers
from sparring.config import Config
from sparring.data.chat import Chat
from sparring.data.datasets import load
from sparring.data.stage_files import (
    NEEDS,
    Row,
    groups_of,
    keys_as_text,
    opened,
    pair_row,
    read,
    rows_of,
    shard,
    shards_of,
    write,
)
from sparring.failures import watched
from sparring.journal import Journal
from sparring.judges.bench import Bench
from sparring.judges.make import make_judge
from sparring.keys import key
from sparring.methods.base import Context, Sampling, Writer
from sparring.methods.rounds import Kind, cannot_rank, rank, settings, written
from sparring.model import policy
from sparring.model.flash import check_flash
from sparring.model.start import computed_in
from sparring.pairing import Paired, best_of
from sparring.progress import Bars
from sparring.records import Group, Prompt, Standing, to_row
from sparring.seeds import Seeds


@dataclass(frozen=True)
class Generate:
    """Responses of a model to prompts, as Parquet."""

    name = "generate"
    output_dir: str = key("", "Folder of the responses; the same command goes on in it")
    responses_per_prompt: int = key(5, "K: responses to each prompt", least=1)
    max_new_tokens: int = key(1024, "Longest response that is written", unit="tokens", least=1)
    temperature: float = key(1.0, "Sampling temperature; 0: greedy", least=0)
    top_p: float = key(1.0, "Nucleus of the sampling", above=0, most=1)
    top_k: int = key(0, "Likeliest tokens that are drawn from; 0: all", unit="tokens", least=0)
    seed: int = key(42, "Root of the random streams", least=0)


@dataclass(frozen=True)
class Rank:
    """Responses with their ranks and win rates, by a judge."""

    name = "rank"
    responses: str = key("", "Folder or file that `sparring generate` wrote, or that has its columns")
    output_dir: str = key("", "Folder of the ranked responses; the same command goes on in it")
    ranking: Kind = key(
        "round_robin", "Each against each; the winner stays; by a judge's scores; neighbours in the standings meet"
    )
    comparisons_per_response: int | None = key(None, "round_robin: others that each response meets; none: all", least=1)
    swiss_turns: int | None = key(None, "swiss: comparisons of each response; none: log2 K, rounded up", least=1)
    seed: int = key(42, "Root of the random streams", least=0)


@dataclass(frozen=True)
class MakePairs:
    """Pairs of ranked responses, ready for `sparring dpo` and `sparring sppo_offline`."""

    name = "pairs"
    ranked: str = key("", "Folder or file that `sparring rank` wrote, or that has its columns")
    output_dir: str = key("", "Folder of the pairs")
    rejected: Literal["last", "random"] = key("last", "Beside the best: the one ranked last, or any other")
    least_margin: float = key(0.0, "Pairs whose win rates differ by less are dropped and counted", least=0, most=1)
    seed: int = key(42, "Root of the random streams", least=0)


def generate(config: Config, bars: Bars) -> Path:
    """Write responses, shard by shard; the folder."""
    keys, folder = config.method, opened(config.method.output_dir, keys_as_text(config))
    check_servers(config.generation)
    if config.generation.generation_backend == "local":
        check_flash(config.model, policy.configuration(config.model), policy.pick_device(config.model.device))
    chat = policy.load_chat(config.model)
    loaded = load(config.data, chat, need="prompts")
    bars.say(loaded.summary(), "dim")
    shards = list(_cut(loaded.prompts, config.generation.shard_prompts))
    left = [n for n in range(len(shards)) if not shard(folder, n).exists()]
    if not left:
        return folder
    limit = policy.room(policy.configuration(config.model), loaded.prompts, config.data.max_length)
    seeds, sampling = Seeds(keys.seed), Sampling(keys.temperature, keys.top_p, keys.top_k)
    total = len(loaded.prompts) * keys.responses_per_prompt
    done = sum(len(shards[n]) for n in range(len(shards)) if n not in left) * keys.responses_per_prompt
    with bars.stage("generate", total, done, unit="responses"), writing(config, chat, folder, bars) as writer:
        for number in left:
            some = shards[number]

            def seed(place: int, repeat: int, some: Sequence[Prompt] = some) -> int:
                return seeds("generate", some[place].id, repeat)

            count = keys.responses_per_prompt
            made = written(writer, some, count, sampling, keys.max_new_tokens, limit, seed)
            groups = [Group(p, tuple(r)) for p, r in zip(some, made, strict=True)]
            write(shard(folder, number), (row for group in groups for row in rows_of(group)))
    return folder


@contextlib.contextmanager
def writing(config: Config, chat: Chat, folder: Path, bars: Bars) -> Iterator[Writer]:
    """Who writes with the model of ``config``: this process, or a server."""
    name, keys = config.model.model_name_or_path, config.generation
    if keys.generation_backend == "server":
        with serving(keys, Path(name), folder / "server.log") as servers:
            writer = ServerWriter(
                servers,
                chat,
                source=lambda: name,
                kept=folder / ".written.jsonl",
                concurrency=keys.server_concurrency,
                timeout=keys.server_timeout,
                retries=keys.server_retries,
                tick=bars.moved,
            )
            yield writer
            bars.say(
                "server: " + ", ".join(f"{what} {count:,}" for what, count in writer.tally.items() if count), "dim"
            )
        return
    with watched(config, "generation_batch_size"):
        model = policy.load_model(config.model, policy.pick_device(config.model.device), computed_in(config)).eval()
        yield LocalWriter(
            lambda: contextlib.nullcontext(model),
            source=lambda: name,
            decode=chat.decode,
            end_ids=chat.end_ids,
            pad_id=chat.pad_id,
            batch_size=keys.generation_batch_size,
            cache=keys.cache_implementation,
            tick=bars.moved,
            say=lambda text: bars.say(text, "dim"),
        )


def rank_responses(config: Config, bars: Bars) -> Path:
    """Rank responses, file by file; the folder."""
    keys, folder = config.method, opened(config.method.output_dir, keys_as_text(config))
    files = shards_of(keys.responses, "responses")
    ledger = Journal(folder)
    about: dict[str, Any] = {"tick": bars.moved, "say": bars.say, "spent": ledger.spent_on_judging()}
    judge = make_judge(config, policy.pick_device(config.model.device), **about)
    if not isinstance(judge, Bench):
        raise ValueError("no judge: add --judge (verifier, reward_model, pairrm, llm, human)")
    told = keys.comparisons_per_response, keys.swiss_turns
    if reason := cannot_rank(keys.ranking, judge, *told):
        raise ValueError(reason)
    context = Context({}, Seeds(keys.seed), 0, judge)
    with watched(config, "judge_batch_tokens"), bars.stage("rank", None, unit="answers"):
        for file in files:
            ranked, judgments = folder / file.name, folder / "judgments"
            if ranked.exists():
                continue
            rows = read(file, NEEDS)
            groups = groups_of(rows)
            try:
                judged = rank(groups, context, keys.ranking, settings(keys.ranking, *told))
            finally:  # what failed has cost something as well
                ledger.judging({"judge": judge.name} | judge.bill())
            judgments.mkdir(exist_ok=True)
            write(judgments / file.name, map(to_row, judged.judgments))
            places = {(s.prompt_id, s.place): s for s in judged.standings}
            write(ranked, (dict(row) | _standing(places, row) for row in rows))
    for text in judge.warnings():
        bars.say(text, "yellow")
    bill = ", ".join(f"{name} {value:,.6g}" for name, value in ledger.spent_on_judging().items())
    bars.say(f"{judge.name}: {bill}", "dim")
    judge.close()
    return folder


def pairs_of(config: Config, bars: Bars) -> Path:
    """Pair ranked responses; the folder."""
    keys = config.method
    folder = opened(keys.output_dir, keys_as_text(config))
    context = Context({}, Seeds(keys.seed), 0)
    dropped: Counter[str] = Counter()
    count = 0
    for file in shards_of(keys.ranked, "ranked"):
        rows = read(file, (*NEEDS, "rank", "win_rate"))
        groups = groups_of(rows)
        by_place = {(row["prompt_id"], row["place"]): row for row in rows}
        standings = [
            Standing(g.prompt.id, i, row["rank"], row["win_rate"], row.get("score"))
            for g in groups
            for i in range(len(g.responses))
            for row in (by_place[g.prompt.id, i],)
        ]

        def another(group: Group, others: list[int]) -> int:
            return context.seeds.random("reject", group.prompt.id).choice(others)

        other = another if keys.rejected == "random" else None
        paired: Paired = best_of(groups, standings, lambda response: response.whole, other)
        kept = [p for p in paired.pairs if abs(p.chosen_win_rate - p.rejected_win_rate) >= keys.least_margin]
        dropped += paired.dropped + Counter({"below least_margin": len(paired.pairs) - len(kept)})
        contents = {group.prompt.id: group.prompt for group in groups}
        count += len(kept)
        if kept:
            write(folder / file.name, (pair_row(pair, contents[pair.prompt_id]) for pair in kept))
    reasons = "".join(f", {n} {reason}" for reason, n in (+dropped).items())
    if not count:
        raise ValueError(f"there is no pair to write; dropped: {reasons[2:]}")
    bars.say(f"{count} pairs; dropped: {reasons[2:] or 'none'}")
    return folder


def _standing(places: dict[tuple[int, int], Standing], row: Row) -> Row:
    found = places[row["prompt_id"], row["place"]]
    return {"rank": found.rank, "win_rate": found.win_rate, "score": found.score}


def _cut(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for first in range(0, len(prompts), size):
        yield prompts[first : first + size]


STAGES: dict[str, tuple[type, tuple[str, ...], Callable[[Config, Bars], Path]]] = {  # settings, other keys, the work
    "generate": (Generate, ("model", "data", "generation"), generate),
    "rank": (Rank, ("judging", "model"), rank_responses),
    "pairs": (MakePairs, (), pairs_of),
}
