"""What a method is to the rest of the house: a frozen dataclass of hyper-parameters with four hooks and a cadence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from sparring import losses
from sparring.keys import key
from sparring.pairing import Paired
from sparring.records import Group, Judgment, Prompt, Response, Tokens
from sparring.seeds import Seeds

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 takes the likeliest."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Request:
    """Tokens to be continued by at most ``max_new_tokens``, drawn from the row's own random stream."""

    token_ids: Tokens
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Writing:
    """What a writer added: its tokens, the end of turn included where it wrote one."""

    token_ids: Tokens
    finished: bool


class Writer(Protocol):
    """An actor: continues requests, each row the same whatever rows stand beside it."""

    @property
    def source(self) -> str:
        """Who writes, as responses record it: ``ema@120``."""
        ...

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Writing]:
        """One writing for each request, in order."""
        ...

    def text(self, token_ids: Tokens) -> str:
        """Tokens as text, without special ones."""
        ...


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses to one prompt, ``a`` shown before ``b``."""

    prompt: Prompt
    a: Response
    b: Response


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a comparison."""

    probability: float | None  # that a beats b; None: it could not be judged
    agree: bool | None = None  # whether both orders of showing the two said the same; None: one was asked


class Judge(Protocol):
    """Who says which of two responses is better."""

    @property
    def name(self) -> str:
        """Who judges, as judgments record it: ``verifier:check.py:score``."""
        ...

    def compare(self, asked: Sequence[Comparison]) -> list[Verdict]:
        """One verdict for each comparison, in order."""
        ...

    def score(self, asked: Sequence[tuple[Prompt, Response]]) -> list[float | None]:
        """Each response's own score, in order; None: it could not be judged. ValueError where the judge only compares."""
        ...


class NoJudge:
    """Nobody: a method that needs a judge says so."""

    name = "none"

    def compare(self, asked: Sequence[Comparison]) -> list[Verdict]:
        """Raise ValueError."""
        raise ValueError("this method needs a judge, and none is given: add --judge, `sparring run --help` lists them")

    def score(self, asked: Sequence[tuple[Prompt, Response]]) -> list[float | None]:
        """Raise ValueError."""
        self.compare([])
        return []


@dataclass(frozen=True)
class Context:
    """What a method's hooks may reach: who can write and judge, the random streams, and the room a sequence has."""

    writers: Mapping[str, Writer]  # by role: "policy", "ema"; by name: a matrix's other models
    seeds: Seeds
    max_length: int  # tokens of prompt and response
    judge: Judge = field(default_factory=NoJudge)


@dataclass(frozen=True)
class Cadence:
    """What a method asks of the loop. Counts are of prompts, pairs and optimizer updates."""

    prompts_per_round: int | None = None  # None: all of them
    updates_per_round: int | None = None  # None: the one round has all updates
    generate_ahead: int = 1  # rounds whose responses are generated together
    buffer_size: int | None = None  # pairs that stay; None: all; 0: the round's own
    draw: Literal["replay", "epochs"] = (
        "epochs"  # replay: weight 1/(times drawn + 1); epochs: each once before any twice
    )
    ema_decay: float = 0.0  # 0: there is no EMA, and its role falls to the policy
    ema_every: int = 1
    reference: Literal["none", "initial", "ema", "policy"] = "initial"  # what the reference is copied from
    reference_every: int | None = None  # None: never after the start


@dataclass(frozen=True)
class LogProbs:
    """Log-probs of one micro-batch, each [B], summed over the scored response tokens, in nats."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_win_rate: Tensor
    rejected_win_rate: Tensor
    chosen_whole: Tensor  # over the whole chosen response, whatever part is scored
    chosen_whole_tokens: Tensor
    mean_tokens: float  # of the update's chosen responses: the weight of a token in a token-mean over the update
    kl: Tensor  # [], the policy's distance from the reference on mismatched responses; 0 where no method asks

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi - log pi_ref of the chosen responses."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log pi - log pi_ref of the rejected responses."""
        return self.rejected - self.ref_rejected


@dataclass(frozen=True)
class Method(ABC):
    """A method: hyper-parameters as fields, the algorithm as hooks, no state."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]  # arXiv id
    needs: ClassVar[Literal["prompts", "responses", "pairs"]]
    defaults: ClassVar[Mapping[str, Any]] = {}  # the vetted values of other parts' keys
    mismatched: ClassVar[bool] = False  # wants LogProbs.kl

    @abstractmethod
    def cadence(self, batch_size: int, updates_per_epoch: int) -> Cadence:
        """How the loop is to run for updates of ``batch_size`` pairs."""

    @abstractmethod
    def respond(self, prompts: Sequence[Prompt], visit: int, context: Context) -> list[Group]:
        """The responses to ``prompts``, which are numbers ``visit``, ``visit + 1``, ... of the run's stream of prompts."""

    @abstractmethod
    def judge(self, groups: Sequence[Group], context: Context) -> list[Judgment]:
        """Which responses are better."""

    @abstractmethod
    def pair(self, groups: Sequence[Group], judgments: Sequence[Judgment]) -> Paired:
        """The pairs to train on."""

    @abstractmethod
    def terms(self, logps: LogProbs) -> dict[str, Tensor]:
        """The loss's weighted terms by name, each [B]; the loss is their sum."""


@dataclass(frozen=True)
class Preference(Method):
    """A method whose loss is ``preference_weight * preference + nll_weight * NLL(chosen)``."""

    beta: float | None = key(0.1, "Strength of the preference term", above=0)
    preference_weight: float = key(1.0, "Weight of the preference term", least=0)
    nll_weight: float | None = key(
        None,
        "Weight of the chosen response's token-mean NLL; none: the method's own, 1 with an odds ratio, else 0",
        least=0,
    )

    @abstractmethod
    def preference(self, logps: LogProbs) -> Tensor:
        """The preference term of each pair, [B]."""

    def terms(self, logps: LogProbs) -> dict[str, Tensor]:
        """Preference and NLL, each with its weight; a term of weight 0 is not computed."""
        terms = {}
        if self.preference_weight:
            terms["preference"] = self.preference_weight * self.preference(logps)
        nll_weight = self.own_nll_weight() if self.nll_weight is None else self.nll_weight
        if nll_weight:
            terms["nll"] = nll_weight * losses.nll(logps.chosen_whole, logps.chosen_whole_tokens)
        return terms

    def own_nll_weight(self) -> float:
        """The method's own weight of the NLL."""
        return 0.0

    def own_beta(self) -> float:
        """The method's own strength, where ``beta`` is none."""
        return 0.1

    @property
    def strength(self) -> float:
        """beta, or the method's own."""
        return self.own_beta() if self.beta is None else self.beta


def reference_goes_first(method: Method, cadence: Cadence, uses: int | None = None, pairs: int = 0) -> bool:
    """Whether all that the reference will be asked is known before the first update, when it is still the policy.

    Then its log-probs can be computed first, and it need not stay in memory. It does not pay where the run ``uses`` fewer pairs
    than there are.
    """
    once = cadence.prompts_per_round is None and cadence.updates_per_round is None
    given = method.needs == "pairs" and once and cadence.reference == "initial"
    return given and not method.mismatched and (uses is None or uses >= pairs)
