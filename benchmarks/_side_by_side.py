"""What the benchmarks share: shapes, pairs, our side and TRL's. Not a benchmark itself."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparring.actors.local import LocalWriter
from sparring.config import TrainingConfig
from sparring.learner import Learner
from sparring.model.policy import prepared
from sparring.model.roles import Roles
from sparring.records import Pair, Response, Tokens, tokens

PAD, END, FIRST = 0, 2, 3  # random text is made of the ids from FIRST on
BATCH = 8  # pairs in a step
RATE = 1e-6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A Llama's measures, and how long its prompts and responses are."""

    name: str
    hidden: int
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int
    intermediate: int
    tied: bool = False
    prompts: tuple[int, int] = (20, 400)
    responses: tuple[int, int] = (50, 300)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S", 128, 4, 8_192, 4, 4, 352),
        Shape("M", 512, 8, 32_000, 8, 4, 1_376),
        Shape("L", 256, 4, 128_256, 4, 4, 704),
        Shape("long", 512, 8, 32_000, 8, 4, 1_376, prompts=(200, 1600)),
        Shape("toy", 32, 2, 512, 2, 2, 64, prompts=(4, 24), responses=(8, 24)),
    )
}


def llama(shape: Shape, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of ``shape`` with random weights; the same seed gives the same weights."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    torch.manual_seed(seed)
    with device:
        return LlamaForCausalLM(config).to(dtype).eval()


def make_pairs(kind: str, count: int, shape: Shape, seed: int = 0) -> list[Pair]:
    """Pairs of random tokens.

    dpo: two responses of their own lengths to one prompt. sapo: A, B, C against A, B', C, where B is a third of the response and
    A of any length. unkind: nothing to gain, prompts of one token and unshared responses of one length.
    """
    rng = random.Random(f"{kind} {seed}")

    def text(length: int) -> Tokens:
        return tokens(rng.randrange(FIRST, shape.vocabulary) for _ in range(length))

    def one() -> tuple[Tokens, Tokens, Tokens]:
        prompt, chosen = text(rng.randint(*shape.prompts)), text(rng.randint(*shape.responses))
        if kind == "sapo":
            length = len(chosen) // 3
            start = rng.randint(0, len(chosen) - length)
            return prompt, chosen, chosen[:start] + text(length) + chosen[start + length :]
        if kind == "unkind":
            length = sum(shape.responses) // 2
            chosen = text(length)
            other = FIRST + (chosen[0] - FIRST + 1) % (shape.vocabulary - FIRST)
            return text(1), chosen, tokens([other]) + text(length - 1)
        return prompt, chosen, text(rng.randint(*shape.responses))

    return [pair_of(*one()) for _ in range(count)]


def pair_of(prompt: Tokens, chosen: Tokens, rejected: Tokens) -> Pair:
    """A pair that is scored whole."""
    sides = Response("", chosen, "human"), Response("", rejected, "ema@0")
    return Pair(0, "", prompt, *sides, (0, len(chosen)), (0, len(rejected)))


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def needed_flops(shape: Shape, pairs: Sequence[Pair], *, reference: bool) -> float:
    """Floating-point operations of a DPO step that computes nothing twice: 3 forwards of the policy, 1 of the reference.

    A forward has 2 W N + 2 H V R + 4 D K L of them: W weights in the layers' matrices, N tokens with a pair's common prefix
    counted once and the last of a response, which predicts nothing, left out; H hidden size, V vocabulary, R scored tokens, a
    common one counted once; D heads times head size, K keys that the tokens attend to, L layers. What activation checkpointing
    computes again does not count, nor do norms, activations and the softmax.
    """
    inside, head = shape.hidden, shape.hidden // shape.heads
    weights = shape.layers * inside * (2 * inside + 2 * shape.kv_heads * head + 3 * shape.intermediate)
    packed = scored = keys = 0
    for pair in pairs:
        chosen, rejected = pair.chosen.token_ids, pair.rejected.token_ids if pair.rejected else tokens([])
        shared = common_prefix(chosen, rejected)
        trunk = len(pair.prompt_token_ids) + shared
        branches = [max(0, len(side) - shared - 1) for side in (chosen, rejected)]
        packed += trunk + sum(branches)
        scored += len(chosen) + len(rejected) - shared
        keys += trunk * (trunk + 1) // 2 + sum(own * trunk + own * (own + 1) // 2 for own in branches)
    forward = 2 * weights * packed + 2 * inside * shape.vocabulary * scored + 4 * inside * keys * shape.layers
    return float(forward * (3 + reference))


def our_learner(
    policy: Any, reference: Any, method: Any, dtype: torch.dtype, checkpointing: bool, compiled: bool = False
) -> Learner:
    """Our side of a step: the one place that knows how a learner is built."""
    roles = Roles(prepared(policy), ema_decay=0.0, reference=False, dtype=dtype)
    roles.reference = prepared(reference).requires_grad_(False).eval().to(dtype)
    keys = {"learning_rate": RATE, "lr_scheduler_type": "constant", "term_grad_norm_steps": 0}
    config = TrainingConfig(**keys, gradient_checkpointing=checkpointing, torch_compile=compiled)  # type: ignore[arg-type]
    return Learner(roles, method, config, pad_id=PAD, total_steps=1000)


def our_writer(
    playing: Callable[[], contextlib.AbstractContextManager[Any]], rows: int, cache: Any = "dynamic"
) -> LocalWriter:
    """Our side of generation: the one place that knows how a writer is built."""
    return LocalWriter(
        playing,
        source=lambda: "ema@0",
        decode=lambda ids: " ".join(map(str, ids)),
        end_ids=frozenset({END}),
        pad_id=PAD,
        batch_size=rows,
        cache=cache,
        say=lambda text: print(text, flush=True),
    )


@contextlib.contextmanager
def trl_head(compact: bool) -> Iterator[list[int]]:
    """TRL's head on completion tokens alone, as on a GPU, or on every position, as on a CPU; yields the positions of each call.

    ``trl.trainer.utils`` asks ``_use_triton`` for this choice and nothing else; the kernels ask their own module's.
    """
    from trl.trainer import utils

    scored: list[int] = []
    asked, head = utils._use_triton, utils._ChunkedLogProbFunction

    class Counted:
        @staticmethod
        def apply(hidden: Any, *rest: Any) -> Any:
            scored.append(len(hidden))
            return head.apply(hidden, *rest)

    utils._use_triton, utils._ChunkedLogProbFunction = lambda device: compact, Counted
    try:
        yield scored
    finally:
        utils._use_triton, utils._ChunkedLogProbFunction = asked, head


def trl_trainer(
    policy: Any,
    reference: Any,
    pairs: Sequence[Pair],
    sums: Sequence[Any],
    folder: str,
    callback: Any,
    adapters: Any = None,
    **keys: Any,
) -> Any:
    """TRL's DPOTrainer on tokens that are given, with its own training loop; ``losses`` holds each step's loss.

    ``sums`` are the reference's log-probs of each pair's responses, which it uses while its ``precompute_ref_logps`` is set;
    ``adapters`` are PEFT's settings, where not all weights are trained.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

        def compute_loss(self, *args: Any, **more: Any) -> Any:
            loss = super().compute_loss(*args, **more)
            self.losses.append(loss.detach())
            return loss

    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<unk>": 1, "<end>": END}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    rows = [(p.prompt_token_ids, p.chosen.token_ids, p.rejected.token_ids) for p in pairs if p.rejected]
    columns = zip(("prompt_ids", "chosen_ids", "rejected_ids"), zip(*rows, strict=True), strict=True)
    known = {"ref_chosen_logps": [float(a) for a, _ in sums], "ref_rejected_logps": [float(b) for _, b in sums]}
    config = DPOConfig(
        folder,
        beta=0.1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        per_device_train_batch_size=BATCH,
        max_steps=len(pairs) // BATCH,
        max_length=None,
        train_sampling_strategy="sequential",
        use_cpu=next(policy.parameters()).device.type == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        **keys,
    )
    data = Dataset.from_dict({name: [list(ids) for ids in column] for name, column in columns} | known)
    given = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [callback], "peft_config": adapters}
    trainer = Trainer(policy, reference, config, **given)
    trainer.losses = []
    trainer.remove_callback(PrinterCallback)
    return trainer
