"""The judge that a configuration names, on its bench."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparring import folders
from sparring.config import Config
from sparring.judges.base import Pairwise, Scoring
from sparring.judges.bench import Bench
from sparring.judges.cache import Cache
from sparring.methods.base import Comparison, Judge, Method, NoJudge
from sparring.model.parallel import ALONE, World
from sparring.seeds import Seeds


def make_judge(
    config: Config,
    device: torch.device,
    *,
    given: Pairwise | Scoring | None = None,
    policy: Callable[[], Pairwise] | None = None,
    world: World = ALONE,
    tick: Callable[[int], None] = lambda done: None,
    say: Callable[[str], None] = lambda text: None,
    spent: Mapping[str, float] | None = None,
) -> Judge:
    """The bench with the judge of ``config``; nobody where none is named.

    ``given`` is a judge of the caller's own, instead of one that is named; ``policy`` makes the judge that the policy itself is;
    ``spent`` is what earlier judging cost, which counts against a budget. Raises ValueError for a judge without what it needs.
    """
    keys = config.judging
    override = None
    if keys.human_labels and keys.judge != "human":
        from sparring.judges.human import labels

        said = labels(keys.human_labels)

        def override(each: Comparison) -> float | None:
            return said.of(each.prompt.asked, each.a.text, each.b.text)

    if keys.judge is None and given is None:
        if override is not None:
            raise ValueError("human_labels overrule a judge, and there is none: add --judge human, or another")
        return NoJudge()
    judge = _made(config, device, policy, say, spent or {}) if given is None else own(given)
    return Bench(
        judge,
        orders=keys.judge_orders,
        scale=keys.judge_scale,
        seeds=Seeds(config.run.seed),
        cache=Cache(folders.cache("judgments") / "answers.sqlite") if keys.judge_cache and world.main else None,
        override=override,
        world=world,
        device=device,
        tick=tick,
        closes=given is None,
    )


def own(given: Any) -> Pairwise | Scoring:
    """A judge of the caller's own; TypeError where it is no judge."""
    kind = ("score",) if hasattr(given, "score") else ("compare", "symmetric")
    lacks = [name for name in ("name", "identity", "everywhere", "tally", *kind) if not hasattr(given, name)]
    if lacks:
        raise TypeError(
            f"judge is {given!r:.60}, which has no {', '.join(lacks)}: give one as sparring.judges.base has them, or a name"
        )
    judge: Pairwise | Scoring = given
    return judge


def fitting(method: Method, judge: Judge) -> Judge:
    """``judge``, where ``method`` can be played with it; ValueError where not."""
    if isinstance(judge, NoJudge):
        if method.judged:
            raise ValueError(
                f"{method.name} needs a judge: add --judge (verifier, reward_model, pairrm, llm, policy, human)"
            )
    elif reason := method.refuses(judge):
        raise ValueError(reason)
    return judge


def _made(
    config: Config,
    device: torch.device,
    policy: Callable[[], Pairwise] | None,
    say: Callable[[str], None],
    spent: Mapping[str, float],
) -> Pairwise | Scoring:
    keys = config.judging

    def needed(name: str) -> Any:
        value = getattr(keys, name)
        if value is None:
            raise ValueError(f"judge is {keys.judge}, which needs {name}: add --{name}")
        return value

    if keys.judge == "verifier":
        from sparring.judges.verifier import VerifierJudge

        return VerifierJudge(needed("verifier"), timeout=keys.verifier_timeout, processes=keys.judge_concurrency)
    if keys.judge == "human":
        from sparring.judges.human import HumanJudge

        return HumanJudge(needed("human_labels"))
    about: dict[str, Any] = {
        "device": device,
        "dtype": getattr(torch, config.model.dtype),
        "batch_tokens": keys.judge_batch_tokens,
    }
    if keys.judge == "reward_model":
        from sparring.judges.reward import RewardModel

        trust = config.model.trust_remote_code
        return RewardModel(needed("judge_model_name_or_path"), trust_remote_code=trust, **about)
    if keys.judge == "pairrm":
        from sparring.judges.pairrm import PairRM

        return PairRM(needed("judge_model_name_or_path"), **about)
    if keys.judge == "llm":
        from sparring.judges.llm import LLMJudge

        return LLMJudge(keys, say=say, spent={name: int(value) for name, value in spent.items()})
    if policy is None:
        raise ValueError("judge is policy, and there is none here: give judge llm an endpoint, or train")
    return policy()
