"""Configuration: defaults <- recipe YAML <- flags, as flat keys of which each belongs to exactly one part.

A part is a frozen dataclass whose fields are made with :func:`sparring.keys.key`, which carries meaning, unit and range
beside the default. A method is one part; the parts below are the others. The resolved whole is saved with the run and read back by
resume. This file is over 300 lines because every part's keys stand in it, where they are found.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sparring.keys import check, key, nearest, read


@dataclass(frozen=True)
class ModelConfig:
    """The model"""

    model_name_or_path: str = key("", "Starting model: a folder, or a name on the hub")
    model_revision: str = key("main", "Branch, tag or commit on the hub")
    dtype: Literal["float32", "bfloat16"] = key(
        "float32",
        "Precision of the computation, and of use_peft's base; what learns, EMA and optimizer are float32 whatever it is",
    )
    device: str = key("auto", "Where to train: auto, cpu, cuda, cuda:1")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = key(
        "sdpa", "Attention kernel, as transformers names it; FlashAttention: on CUDA, with dtype bfloat16"
    )
    trust_remote_code: bool = key(False, "Run Python code that comes with the model; only for models you trust")
    apply_chat_template: bool = key(
        True, "Render prompts with the tokenizer's chat template; false: plain text, response after prompt"
    )
    chat_template_path: str | None = key(None, "A Jinja file to use as chat template; chatml: the built-in one")


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA"""

    use_peft: bool = key(False, "Train a LoRA adapter: one frozen base carries policy, EMA and reference as adapters")
    lora_r: int | None = key(None, "Rank of the adapter; none: the start's adapter's, else 16", least=1)
    lora_alpha: int | None = key(
        None, "An adapter's output is scaled by lora_alpha / lora_r; none: the start's adapter's, else 32", least=1
    )
    lora_target_modules: str | None = key(
        None, "What is adapted: all-linear, or modules as q_proj,v_proj; none: as the start's adapter, else all-linear"
    )
    lora_shard_base: bool | Literal["auto"] = key(
        "auto", "Divide the base over the processes (FSDP2); auto: where a whole one in each leaves too little room"
    )


@dataclass(frozen=True)
class DataConfig:
    """The data"""

    dataset_name: str = key("", "JSONL or Parquet file, a folder of them, or a data set's name on the hub")
    dataset_config: str | None = key(None, "Configuration of a hub data set")
    dataset_train_split: str = key("train", "Split; train[:1000] takes the first thousand rows")
    column_map: dict[str, str] | None = key(None, "Names for other columns: prompt=question,completion=answer")
    max_length: int = key(2048, "Longest prompt plus response", unit="tokens", least=8)
    max_prompt_length: int = key(1792, "Longer prompts are dropped and counted", unit="tokens", least=1)
    overlong: Literal["cut", "drop"] = key(
        "cut", "Responses past max_length: cut there (they then have no end of turn), or dropped; counted either way"
    )
    max_samples: int | None = key(None, "Use only the first so many rows; none: all", unit="rows", least=1)


@dataclass(frozen=True)
class GenerationConfig:
    """Generation"""

    generation_batch_size: int = key(64, "Rows that are generated together", unit="rows", least=1)
    cache_implementation: Literal["auto", "dynamic", "static"] = key(
        "auto",
        "local: a cache that grows, or slots with a compiled step; auto: what is measured to be faster on CUDA, else dynamic",
    )
    generation_backend: Literal["local", "server"] = key(
        "local", "Who writes the policy's responses: this process, or a server that speaks OpenAI's protocol"
    )
    server_urls: str | None = key(None, "Servers that run already: http://localhost:8000/v1, several with commas")
    server_command: str | None = key(
        None, "Starts a server for each round: vllm serve {model} --host {host} --port {port}"
    )
    server_model: str | None = key(None, "The model's name at the server; none: the first that it lists")
    server_api_key_env: str = key("SPARRING_SERVER_API_KEY", "Environment variable that holds the servers' key, if any")
    server_concurrency: int = key(64, "Requests at a time, to all servers together", unit="requests", least=1)
    server_timeout: float = key(600.0, "Longest wait for one response", unit="s", above=0)
    server_start_timeout: float = key(600.0, "Longest wait for server_command to answer", unit="s", above=0)
    server_retries: int = key(5, "Times that a request is tried again, and that a dead server is started anew", least=0)
    shard_prompts: int = key(
        256, "Prompts of a round whose responses are written to the disk together", unit="prompts", least=1
    )


@dataclass(frozen=True)
class JudgeConfig:
    """The judge"""

    judge: Literal["verifier", "reward_model", "pairrm", "llm", "policy", "human"] | None = key(
        None, "Who judges: your function, a reward model, PairRM, an LLM at an endpoint, the policy itself, or people"
    )
    judge_model_name_or_path: str | None = key(
        None, "reward_model, pairrm: a folder or a name on the hub; llm: the model's name at the endpoint"
    )
    verifier: str | None = key(None, "verifier: path/to/file.py:function(prompt, response, row) -> number")
    verifier_timeout: float = key(10.0, "Longest that a verifier may take for one response", unit="s", above=0)
    judge_scale: float = key(
        1.0,
        "verifier, reward_model: P(a beats b) = sigmoid(judge_scale (score of a - score of b)), Bradley-Terry",
        above=0,
    )
    judge_orders: Literal["both", "random", "given"] = key(
        "both", "llm, policy: both orders of showing two responses, one at random, or the one that comes"
    )
    judge_by: Literal["verdict", "logprobs"] = key(
        "verdict", "llm, policy: read the written verdict, or compare the log-probs of the two verdict tokens"
    )
    judge_template: str | None = key(None, "llm, policy: a Jinja file with the instruction; none: the built-in one")
    judge_base_url: str | None = key(
        None, "llm: the endpoint, http://localhost:8000/v1; none: OPENAI_BASE_URL, else OpenAI's"
    )
    judge_api_key_env: str = key("OPENAI_API_KEY", "llm: environment variable that holds the key")
    judge_max_new_tokens: int = key(512, "llm, policy: longest verdict", unit="tokens", least=1)
    judge_concurrency: int = key(8, "llm: requests at a time; verifier: processes", least=1)
    judge_timeout: float = key(120.0, "llm: longest wait for one answer", unit="s", above=0)
    judge_retries: int = key(
        5, "llm: times that a request is tried again after 429, 5xx or a broken connection", least=0
    )
    judge_max_calls: int | None = key(None, "llm: calls that the run may make; none: any number", unit="calls", least=1)
    judge_max_tokens: int | None = key(None, "llm: tokens that the run may use, in and out", unit="tokens", least=1)
    judge_price_in: float = key(0.0, "llm: price of a million prompt tokens, for the ledger", least=0)
    judge_price_out: float = key(0.0, "llm: price of a million written tokens, for the ledger", least=0)
    judge_batch_tokens: int = key(16384, "reward_model, pairrm: tokens scored together", unit="tokens", least=1)
    judge_cache: bool = key(True, "Keep answers on the disk, so that none is paid for twice")
    human_labels: str | None = key(
        None,
        "human: JSON lines of pair_id, verdict (a, b, tie), who, when; what they say overrides any other judge",
    )


@dataclass(frozen=True)
class TrainingConfig:
    """Training"""

    learning_rate: float = key(1e-6, "Peak learning rate", above=0)
    optim: Literal["adamw_torch", "adamw_torch_fused", "rmsprop", "adamw_8bit", "muon"] = key(
        "adamw_torch_fused", "Optimizer; muon: Muon on hidden matrices, AdamW on the rest"
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = key(
        "linear", "Shape of the learning rate after warm-up"
    )
    warmup_ratio: float = key(0.1, "Share of the updates that warm up", least=0, most=1)
    warmup_steps: int = key(0, "Updates that warm up; above 0 it overrides warmup_ratio", unit="updates", least=0)
    weight_decay: float = key(0.0, "Decoupled weight decay", least=0)
    adam_beta1: float = key(0.9, "AdamW's decay of the first moment", least=0, below=1)
    adam_beta2: float = key(0.999, "AdamW's decay of the second moment", least=0, below=1)
    adam_epsilon: float = key(1e-8, "AdamW's and RMSprop's term for numerical stability", above=0)
    max_grad_norm: float = key(1.0, "Gradients are scaled down to this norm; 0: never", least=0)
    per_device_train_batch_size: int = key(
        8, "Pairs of an update, with gradient_accumulation_steps", unit="pairs", least=1
    )
    gradient_accumulation_steps: int = key(1, "Times per_device_train_batch_size: the pairs of an update", least=1)
    max_tokens_per_micro_batch: int | Literal["auto"] = key(
        "auto",
        "Tokens in one forward and backward pass; changes speed and memory, not the result",
        unit="tokens",
        least=1,
    )
    num_train_epochs: float = key(1.0, "Times that every prompt, or given pair, comes up", unit="epochs", above=0)
    max_steps: int = key(-1, "Updates in all; above 0 it overrides num_train_epochs", unit="updates", least=-1)
    precompute_ref_log_probs: bool = key(
        True,
        "Given pairs, a reference that never moves: its log-probs are computed first, kept on disk, and it leaves memory",
    )
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass: less memory, a third slower")
    torch_compile: bool | Literal["auto"] = key(
        "auto", "Compile norms and gated activations; auto: on CUDA where it is measured to be faster, else false"
    )
    term_grad_norm_steps: int = key(
        10, "Measure each loss term's own gradient norm every so many updates; 0: never", unit="updates", least=0
    )

    @property
    def batch_size(self) -> int:
        """Pairs in one update."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True)
class MonitorConfig:
    """The watch over the run"""

    on_alarm: Literal["warn", "stop", "rollback"] = key(
        "warn",
        "What an alarm does: warn; stop (saved first); rollback to the last checkpoint at half the learning rate, else stop",
    )
    monitor_steps: int = key(
        50, "Updates between measurements of the KL to the start; 0: never", unit="updates", least=0
    )
    max_kl: float = key(1.0, "Alarm: KL from the start to the policy above this", unit="nats per token", above=0)
    max_chosen_drop: float = key(
        0.5,
        "Alarm: log-prob of the chosen responses this far under the run's first updates",
        unit="nats per token",
        above=0,
    )
    max_length_drift: float = key(
        2.0, "Alarm: generated responses this many times longer or shorter than the run's first ones", above=1
    )
    max_dropped: float = key(0.9, "Alarm: share of duplicate and empty pairs in a round above this", least=0, most=1)


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation between rounds"""

    eval_dataset_name: str | None = key(
        None, "Held-out prompts, with or without responses: what dataset_name may be; none: no evaluation in the run"
    )
    eval_split: str = key("test", "Split of a hub data set, or of a folder's files")
    eval_max_samples: int | None = key(200, "Use only the first so many of its rows; none: all", unit="rows", least=1)
    eval_steps: int = key(
        0,
        "Updates between evaluations, besides those at rounds' ends and the run's; 0: those alone",
        unit="updates",
        least=0,
    )
    eval_max_new_tokens: int | None = key(
        None, "Longest response to them; none: the method's max_new_tokens, else 256", unit="tokens", least=1
    )


@dataclass(frozen=True)
class RunConfig:
    """The run"""

    output_dir: str = key("", "The run's folder; must be new or empty")
    seed: int = key(42, "Root of every random stream", least=0)
    save_steps: int = key(100, "Updates between checkpoints", unit="updates", least=1)
    save_total_limit: int = key(2, "Checkpoints that are kept, the last ones", unit="checkpoints", least=1)
    save_round_records: bool = key(True, "Write every round's responses and pairs to rounds/ as Parquet")
    keep_round_models: bool = key(True, "Keep the model after each counted round, in models/round-00001 and on")
    keep_models_at: tuple[float, ...] | None = key(
        None, "Shares of the run after which the model is kept, in models/step-000120: 0.25,0.5", above=0, most=1
    )
    report_to: Literal["none", "trackio", "tensorboard", "wandb"] = key("none", "Tracker beside metrics.jsonl")
    run_name: str | None = key(None, "The run's name at the tracker and in the model card; none: the folder's")


PARTS: dict[str, type] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "generation": GenerationConfig,
    "judging": JudgeConfig,
    "training": TrainingConfig,
    "monitor": MonitorConfig,
    "evaluation": EvaluationConfig,
    "run": RunConfig,
}


@dataclass(frozen=True)
class Config:
    """A run's whole configuration: the method and the nine parts."""

    method: Any  # a method's frozen dataclass
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    generation: GenerationConfig = GenerationConfig()
    judging: JudgeConfig = JudgeConfig()
    training: TrainingConfig = TrainingConfig()
    monitor: MonitorConfig = MonitorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()

    def flat(self) -> dict[str, Any]:
        """Every key with its value, and the method's name under ``method``."""
        parts = [getattr(self, name) for name in ("method", *PARTS)]
        found = {f.name: getattr(p, f.name) for p in parts for f in dataclasses.fields(p)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
        return {"method": self.method.name} | plain


def resolve(method: type | Any, *layers: Mapping[str, Any], parts: Iterable[str] = tuple(PARTS)) -> Config:
    """The configuration that ``layers`` (a recipe's keys, then flags) give on top of the defaults.

    ``method`` is a method's class, or an instance whose fields are then the method's base; ``parts`` are those whose keys may be
    given. Text values are read as the key's type. Raises ValueError for an unknown key (naming the nearest), a value of the wrong
    type or out of range.
    """
    kind = method if isinstance(method, type) else type(method)
    known = keys_of(kind, parts)
    chosen: dict[str, Any] = dict(getattr(kind, "defaults", {}))
    for layer in layers:
        for name, value in layer.items():
            if name not in known:
                raise ValueError(f"unknown key {name!r} for {kind.name}{nearest(name, known)}")  # type: ignore[attr-defined]
            chosen[name] = read(name, value, known[name][1])
    base: dict[str, Any] = {}
    if not isinstance(method, type):
        base = {f.name: read(f.name, getattr(method, f.name), known[f.name][1]) for f in dataclasses.fields(method)}
    made = {name: part(**_mine(part, chosen)) for name, part in PARTS.items()}
    config = Config(method=kind(**(base | _mine(kind, chosen))), **made)
    for part in (config.method, *made.values()):
        check(part)
    for name in [f.name for f in dataclasses.fields(AdapterConfig) if not config.adapter.use_peft]:
        if getattr(config.adapter, name) != getattr(AdapterConfig(), name):
            raise ValueError(f"{name} says nothing without use_peft: add use_peft, or leave {name} out")
    return config


def keys_of(method: type, parts: Iterable[str] = tuple(PARTS)) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Every key of ``method`` and ``parts``: its field and its type."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for part in (method, *(PARTS[name] for name in parts)):
        hints = typing.get_type_hints(part)
        for f in dataclasses.fields(part):
            assert f.name not in found, f"key {f.name} belongs to two parts"
            found[f.name] = (f, hints[f.name])
    return found


def _mine(part: type, chosen: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: chosen[f.name] for f in dataclasses.fields(part) if f.name in chosen}
