"""The model in its three roles: the policy that learns, the EMA that writes, the reference that both are measured by."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sparring.model import ema
from sparring.model.parallel import ALONE, World
from sparring.model.sharding import gathered, shard, together

Role = Literal["policy", "ema", "reference"]


class Roles:
    """Policy, EMA and reference, each a whole model; a role that nobody keeps falls to the policy.

    Policy and EMA have float32 weights. Under bfloat16 one working copy of the policy computes; it lends itself to the EMA while
    that writes. The reference is measured and never moves by itself, so it is held in the precision of the computation. With
    several processes all are sharded, and FSDP2 makes what computes of the float32 weights.
    """

    def __init__(
        self,
        policy: Any,
        *,
        ema_decay: float,
        reference: bool,
        dtype: torch.dtype = torch.float32,
        world: World = ALONE,
        device: torch.device | None = None,
    ) -> None:
        """All roles start as copies of ``policy``, on ``device`` where they are sharded; ``dtype`` is that of the computation."""
        self.dtype, self.ema_decay, self.world = dtype, ema_decay, world
        self.divided = world  # the processes that weights are divided over
        self.known: dict[int, Tensor] = {}  # what the reference, as it stands, said of pairs, by their serial
        if world.size > 1:
            assert device is not None
            copied = partial(shard, policy, world, device, computes=dtype)
            self.policy = self.worker = self.learnt = copied(trains=True)
            self.ema = copied() if ema_decay else None
            self.reference = copied(held=dtype) if reference else None
            return
        self.policy = self.learnt = policy  # what of the policy learns: all of it
        self.ema = _frozen_copy(policy) if ema_decay else None
        self.worker = policy if dtype == torch.float32 else _working_copy(policy, dtype)
        self.reference = _frozen_copy(policy, dtype) if reference else None

    @contextlib.contextmanager
    def playing(self, role: Role, *, alone: bool = False) -> Iterator[Any]:
        """The model in ``role``, for forward passes without gradient.

        Of a sharded one all processes make the same number of passes, unless each has to be ``alone``: then its weights are
        gathered for as long as it plays, in a plain model of the same kind.
        """
        model = self.reference if role == "reference" and self.reference is not None else self.worker
        lent = role == "ema" and self.ema is not None
        if lent and self.worker is self.policy:
            model, lent = self.ema, False
        was_training = model.training
        model.eval()
        with torch.no_grad(), gathered(model) if alone else together(model) as playing:
            if lent:
                ema.step(self.worker, self.ema, 0.0)
            try:
                yield playing
            finally:
                if lent:
                    self.sync()
        model.train(was_training)

    def sync(self) -> None:
        """Let the working copy have the policy's weights, after they have moved."""
        if self.worker is not self.policy:
            ema.step(self.worker, self.policy, 0.0)

    def step_ema(self) -> None:
        """ema <- (1 - b) policy + b ema."""
        if self.ema is not None:
            ema.step(self.ema, self.learnt, self.ema_decay)

    def refresh_reference(self, source: Literal["ema", "policy"]) -> None:
        """Copy the EMA (the policy, where there is none) or policy to the reference; where none is kept, forget what it said."""
        if self.reference is not None:
            origin = self.ema if source == "ema" and self.ema is not None else self.learnt
            ema.step(self.reference, origin, 0.0)
        self.known.clear()

    def described(self) -> str:
        """What the models compute besides their weights' part in it: their kind and its settings."""
        about = self.policy.config.to_dict()
        settings = {
            key: value for key, value in about.items() if key not in ("transformers_version", "dtype", "torch_dtype")
        }
        return json.dumps([type(self.policy).__name__, settings], sort_keys=True, default=str)

    def kept(self) -> dict[Role, Any]:
        """What is kept of each role there is: models, or adapters of one."""
        models: dict[Role, Any] = {"policy": self.learnt, "ema": self.ema, "reference": self.reference}
        return {role: model for role, model in models.items() if model is not None}


def checkpointing(model: Any) -> None:
    """Let ``model`` compute its activations again in the backward pass."""
    # transformers 5.2x renamed it, and warns of the old name.
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})


def _frozen_copy(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    return _cast(copy.deepcopy(model).requires_grad_(False).eval(), dtype)


def _working_copy(model: Any, dtype: torch.dtype) -> Any:
    return serving(_cast(copy.deepcopy(model), dtype), model.parameters())


def serving(worker: Any, masters: Iterable[Any]) -> Any:
    """``worker``, whose gradients are handed to ``masters``, and added up there in float32, as soon as they are made."""
    for mine, master in zip(worker.parameters(), masters, strict=True):
        mine.master = master
        if mine.requires_grad:
            mine.register_post_accumulate_grad_hook(_hand_over)
    return worker


def _hand_over(weight: Any) -> None:
    master = weight.master
    if master.grad is None:
        master.grad = weight.grad.to(master.dtype)
    else:
        master.grad.add_(weight.grad)
    weight.grad = None


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """Weights in ``dtype``; buffers, such as rotary frequencies, as they are."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model
