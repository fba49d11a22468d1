"""What forward and backward passes take, found without computing them: the real model's own code on tensors without storage.

PyTorch's fake tensors have shapes, types and devices, but no numbers. Every operation of a pass is seen as it makes its result,
and a result's bytes count until autograd, the cache or the code lets it go, so what a layer needs for a moment is in the peak.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from sparring.config import AdapterConfig, ModelConfig
from sparring.data.packing import Group, Packed, Padded, pack, packed_size, pad
from sparring.model.attention import Kind, attending, inputs, unmasked
from sparring.model.head import CACHED, KEPT, WIDE, gradient
from sparring.model.linear import product
from sparring.model.logps import padded_logps
from sparring.model.policy import prepared
from sparring.model.roles import checkpointing, serving
from sparring.model.stand_in import let_stand_in
from sparring.records import tokens

GROUPS = 4  # in the row that is gone through


@dataclass(frozen=True)
class Passes:
    """Bytes above the weights at the peak of passes over one micro-batch, gradients of weights included."""

    kept: int  # what autograd has kept when the backbone's forward pass ends
    last: int  # an update's first micro-batch, whose gradients come into being, or another after it
    glance: int  # without gradient, as the reference's
    back: int  # in the last one's backward pass alone, after the head's


@dataclass(frozen=True)
class Shape:
    """What the passes of a run are over."""

    config: PretrainedConfig
    dtype: torch.dtype
    device: torch.device
    kind: Kind
    longest: int  # tokens of a prompt and its response
    sides: int  # responses to a prompt
    checkpointing: bool = False
    trust_remote_code: bool = False
    adapter: AdapterConfig | None = None
    divided: bool = False  # over processes: a weight's gradient leaves with its layer's, to be added up

    @property
    def by_kernel(self) -> bool:
        """Whether PyTorch's kernel on segments is gone through, and not its stand-in."""
        return self.kind == "segments" and self.dtype == torch.float32


class Live(TorchDispatchMode):
    """Counts the bytes of what operations make, for as long as it lives, and their highest sum."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count its results."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, size: int) -> None:
        self.now -= size

    def since(self) -> int:
        """The peak since this was last asked."""
        peak, self.peak = self.peak, self.now
        return peak


def passes(shape: Shape, budget: int, *, again: bool) -> Passes:
    """What passes over a micro-batch of ``budget`` tokens take, and ``again`` over another one of the same update.

    NotImplementedError where the model's code needs numbers.
    """
    whole = _layout(shape, budget)
    with _model(shape) as worker:
        layout = _fake(whole)
        if shape.kind != "dense":
            let_stand_in(worker, shape.kind, shape.longest, layout)
        how: Kind = "segments" if shape.by_kernel else "dense"
        with Live([*worker.parameters(), *worker.buffers()]) as live, attending(worker, how):
            with torch.no_grad():
                _head(shape, worker.eval(), _forward(shape, worker, layout), learns=False)
            glance, last, kept, back = live.since(), 0, 0, 0
            worker.train()
            if shape.checkpointing:
                checkpointing(worker)
            for _ in range(1 + again):
                states = _forward(shape, worker, layout)
                kept = kept or live.now
                slope = _head(shape, worker, states, learns=True)
                before = live.since()
                torch.autograd.backward(states, slope)
                del states, slope
                back = live.since()
                last = max(before, back)
                if shape.divided:
                    for weight in worker.parameters():
                        weight.grad = None
    return Passes(kept, last, glance, back)


def writing(shape: Shape, rows: int) -> tuple[int, int]:
    """Bytes of the cache that generation fills for ``rows`` sequences at their longest, and its peak, the cache included."""
    with _model(shape) as worker, torch.no_grad():
        worker.eval()
        ids = torch.zeros(rows, shape.longest - 1, dtype=torch.long)
        mask = torch.ones(rows, shape.longest - 1, dtype=torch.long)
        with Live([ids, mask, *worker.parameters(), *worker.buffers()]) as live:
            cache = DynamicCache(config=worker.config)
            for _ in range(2):
                at = mask.cumsum(1)[:, -ids.shape[1] :] - 1
                words = {"attention_mask": mask, "position_ids": at, "past_key_values": cache, "logits_to_keep": 1}
                logits = worker(input_ids=ids, use_cache=True, **words).logits[:, -1].float()
                logits.div(0.7).softmax(1)  # as tokens are drawn
                del logits
                ids, mask = ids[:, :1], torch.cat([mask, mask[:, :1]], 1)
            del words, at, ids, mask
            return live.now * 5 // 4, live.peak + live.now // 4  # the cache leaves itself room to grow


@contextmanager
def _model(shape: Shape) -> Iterator[Any]:
    """The model that computes, on fake tensors; under bfloat16 with float32 masters that take its gradients."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it would print what is raised, too
    log.disabled = True
    try:
        with torch.device("meta"):  # PEFT moves modules, which fake tensors refuse
            made = AutoModelForCausalLM.from_config(
                copy.deepcopy(shape.config),
                dtype=shape.dtype,
                attn_implementation="eager" if shape.kind == "dense" else "sdpa",
                trust_remote_code=shape.trust_remote_code,
            )
            worker = prepared(made)
            if shape.adapter is not None:
                worker = adapted(worker, shape.adapter)
        with FakeTensorMode(), torch.device(shape.device):
            _materialise(worker)
            if shape.divided:
                head = worker.get_output_embeddings().weight  # a gradient of its own, there from the first to the last
                for weight in worker.parameters():
                    if weight is not head:
                        weight.register_post_accumulate_grad_hook(_leave)
            elif shape.adapter is None and shape.dtype != torch.float32:
                serving(worker, [torch.empty(p.shape, dtype=torch.float32) for p in worker.parameters()])
            yield worker
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, KeyError) as problem:
        words = str(problem).split("\n")[0]
        raise NotImplementedError(
            f"{shape.config.model_type} cannot be gone through without numbers: {words}"
        ) from problem
    finally:
        log.disabled = False


def _leave(weight: Any) -> None:
    weight.grad = None


def _materialise(worker: Any) -> None:
    """Give fake tensors of the device to what has none; tied weights stay tied."""
    known: dict[int, Tensor] = {}
    for module in worker.modules():
        for kind in (module._parameters, module._buffers):
            for name, bare in kind.items():
                if bare is not None and id(bare) not in known:
                    made = torch.empty(bare.shape, dtype=bare.dtype)
                    learns = kind is module._parameters
                    known[id(bare)] = torch.nn.Parameter(made, bare.requires_grad) if learns else made
                kind[name] = None if bare is None else known[id(bare)]


def adapted(model: Any, config: AdapterConfig) -> Any:
    """``model`` with an adapter of ``config`` on it, its base frozen."""
    from sparring.model.adapters import with_adapter

    return with_adapter(model, config, None, ModelConfig(), 0).get_base_model()


def _forward(shape: Shape, worker: Any, layout: Any) -> Tensor:
    """The final hidden states of the tokens that predict, [N, H]; in the dense layout the log-probs, [N]."""
    if isinstance(layout, Padded):
        return padded_logps(worker, layout)
    words = inputs(worker, layout, "segments") if shape.by_kernel else unmasked(worker, layout)
    states: Tensor = worker.base_model(**words).last_hidden_state[0]
    return states[layout.scored.predictors]


def _head(shape: Shape, worker: Any, states: Tensor, *, learns: bool) -> Tensor:
    """What :class:`sparring.model.head.Head` makes of ``states``, block by block; its thousand small steps are not gone through."""
    if states.ndim == 1:
        return torch.empty_like(states)
    weight = worker.get_output_embeddings().weight
    plain = weight.detach()
    room = KEPT.get(states.device.type, KEPT["cpu"]) // (len(weight) * states.element_size())
    rows = max(1, min(len(states), room))
    block = states.new_empty(rows, states.shape[1])
    made = [product(block, plain)]
    if states.dtype != torch.float32:
        made.append(states.new_empty(CACHED.get(states.device.type, CACHED["cpu"]) // 4, dtype=torch.float32))
    if learns and weight.requires_grad:
        gradient(weight)
        if shape.divided and states.dtype != torch.float32:  # beside the weight's own
            made.append(torch.empty_like(weight, dtype=torch.float32))
        made += [states.new_empty(rows, states.shape[1], dtype=torch.float32) for _ in range(2)]
        if states.dtype != torch.float32:
            made.append(product(made[0].T[:WIDE], block.T))
            if states.device.type == "cpu":  # whose kernels widen a whole operand before they take it off a float32
                made.append(torch.empty_like(weight[:WIDE], dtype=torch.float32))
    if learns:
        product(made[0], plain.T)
    return torch.empty_like(states)


def _layout(shape: Shape, budget: int) -> Packed | Padded:
    """A micro-batch of ``budget`` tokens in a few groups: memory goes by tokens, however many groups they make up."""
    cpu, sides, longest = torch.device("cpu"), shape.sides, shape.longest
    if shape.kind == "dense":
        return pad([_group(longest, sides)] * max(1, budget // (sides * longest)), 0, cpu)
    size = packed_size(_group(longest, sides))
    count = min(GROUPS, max(1, budget // size))
    return pack([_group(max(2, budget * longest // (size * count)), sides)] * count, cpu)


def _group(longest: int, sides: int) -> Group:
    """A prompt and its responses, half of ``longest`` each, that share nothing."""
    half = longest // 2
    return Group(tokens([0] * (longest - half)), [tokens([side] * half) for side in range(sides)])


def _fake(layout: Packed | Padded) -> Any:
    """``layout`` with fake tensors."""

    def faked(part: Any) -> Any:
        tensors = {f.name: getattr(part, f.name) for f in fields(part)}
        return replace(
            part, **{name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items() if isinstance(t, Tensor)}
        )

    return replace(faked(layout), scored=faked(layout.scored))
