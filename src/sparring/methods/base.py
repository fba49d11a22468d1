"""What a method is to the rest of the house: a frozen dataclass of hyper-parameters with four hooks and a cadence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from sparring.pairing import Judged, Paired
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
    by: str | None = None  # who judged instead: people overrule a judge

    def judgment(self, prompt_id: int, a: int, b: int, judge: str) -> Judgment:
        """As a round's records have it: of responses ``a`` and ``b`` of a prompt's group."""
        return Judgment(prompt_id, a, b, self.probability, self.by or judge, self.agree)


class Judge(Protocol):
    """Who says which of two responses is better."""

    @property
    def name(self) -> str:
        """Who judges, as judgments record it: ``verifier:check.py:score``."""
        ...

    def compare(self, asked: Sequence[Comparison]) -> list[Verdict]:
        """One verdict for each comparison, in order."""
        ...

    @property
    def scores(self) -> bool:
        """Whether it scores a response by itself."""
        ...

    @property
    def scale(self) -> float:
        """P(a beats b) = sigmoid(scale (score of a - score of b)), where it scores."""
        ...

    def score(self, asked: Sequence[tuple[Prompt, Response]]) -> list[float | None]:
        """Each response's own score, in order; None: it could not be judged. ValueError where the judge only compares."""
        ...


class NoJudge:
    """Nobody: a method that needs a judge says so."""

    name = "none"
    scores = False
    scale = 1.0

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

    rounds: int | None = None  # None: as many as the updates need; else a round's updates go over its pairs
    prompts_per_round: int | None = None  # None: all of them; where rounds share the prompts out, at most
    shared_out: bool = False  # counted rounds share the prompts out evenly, each prompt once
    updates_per_round: int | None = None  # None: the one round has all updates
    generate_ahead: int = 1  # rounds whose responses are generated together
    buffer_size: int | None = None  # pairs that stay; None: all; 0: the round's own
    buffer_rounds: int | None = None  # rounds whose pairs stay; None: buffer_size alone says
    pairs_per_prompt: int = 1  # at most
    draw: Literal["replay", "epochs"] = (
        "epochs"  # replay: weight 1/(times drawn + 1); epochs: each once before any twice
    )
    ema_decay: float = 0.0  # 0: there is no EMA, and its role falls to the policy
    ema_every: int = 1
    reference: Literal["none", "initial", "ema", "policy"] = "initial"  # what the reference is copied from
    reference_every: int | None = None  # None: never after the start
    reference_at_round: bool = False  # it is copied anew when a round has its pairs
    fresh_start: bool = False  # each round has optimizer and learning-rate schedule of its own


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
    judged: ClassVar[bool] = False  # needs a judge
    sides: ClassVar[int] = 2  # responses of a pair: a demonstration has one
    written: ClassVar[int] = 1  # of them at most so many are written in the round

    @abstractmethod
    def cadence(self, batch_size: int, prompts: int) -> Cadence:
        """How the loop is to run for updates of ``batch_size`` pairs, over a data set of so many prompts."""

    def writers(self) -> tuple[str, ...]:
        """Who writes besides the policy and its EMA, by their names in ``Context.writers``."""
        return ()

    def wants(self) -> Literal["prompts", "responses", "pairs"]:
        """What each row of the data has to hold."""
        return self.needs

    def refuses(self, judge: Judge) -> str | None:
        """Why a judge cannot do what the method asks of one; None: it can."""
        return None

    def anchored(self, whole: Callable[[str], str]) -> Method:
        """The method with local folders' full names, as ``whole`` gives them."""
        return self

    def in_round(self, number: int) -> Method:
        """The method as it stands in a round, where its settings change from one to the next."""
        return self

    def rate(self, number: int) -> float | None:
        """The round's own peak learning rate; None: learning_rate."""
        return None

    def round_metrics(self, groups: Sequence[Group], judged: Judged) -> dict[str, float]:
        """What the method itself measures of a round's responses and judgments."""
        return {}

    def metrics(self, logps: LogProbs) -> dict[str, Tensor]:
        """What the method itself measures of an update's pairs, each [B]; their means are logged."""
        return {}

    @abstractmethod
    def respond(self, prompts: Sequence[Prompt], visit: int, context: Context) -> list[Group]:
        """The responses to ``prompts``, which are numbers ``visit``, ``visit + 1``, ... of the run's stream of prompts."""

    @abstractmethod
    def judge(self, groups: Sequence[Group], context: Context) -> Judged:
        """Which responses are better."""

    @abstractmethod
    def pair(self, groups: Sequence[Group], judged: Judged, context: Context) -> Paired:
        """The pairs to train on."""

    @abstractmethod
    def terms(self, logps: LogProbs) -> dict[str, Tensor]:
        """The loss's weighted terms by name, each [B]; the loss is their sum."""


def reference_goes_first(method: Method, cadence: Cadence, uses: int | None = None, pairs: int = 0) -> bool:
    """Whether all that the reference will be asked in a round is known before its first update, when it is still the policy.

    Then its log-probs can be computed first, and it need not stay in memory. It does not pay where the run ``uses`` fewer pairs
    than there are.
    """
    if method.mismatched:
        return False
    if cadence.rounds is not None:
        return cadence.reference_at_round or (cadence.rounds == 1 and cadence.reference == "initial")
    once = cadence.prompts_per_round is None and cadence.updates_per_round is None
    given = method.needs == "pairs" and once and cadence.reference == "initial"
    return given and (uses is None or uses >= pairs)
