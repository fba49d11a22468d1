"""LoRA: one frozen base carries policy, EMA and reference as adapters.

The base is held once, in the precision of the computation. Adapters are float32, so they are their own masters and there is no
working copy. Switching a role is switching which adapter the layers read.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparring.config import AdapterConfig, ModelConfig
from sparring.keys import nearest
from sparring.model.adapter_folder import CONFIG, WEIGHTS, AdapterFolder, refuse_tied
from sparring.model.parallel import ALONE, World
from sparring.model.roles import Role, Roles
from sparring.model.sharding import divide, empty, gathered, together

POLICY = "default"  # the name that PEFT gives an adapter by itself
ADAPTED = ".lora_"  # in the name of every weight of an adapter, and of no other
RANK, ALPHA, MODULES = 16, 32, "all-linear"  # TRL's defaults, over all linear layers


class Adapter:
    """One adapter's weights, as what is averaged, saved and loaded: it stands where a whole model stands in :class:`Roles`."""

    def __init__(self, model: Any, name: str) -> None:
        """A view of the adapter ``name`` of ``model``, a PeftModel; nothing is copied."""
        from peft import get_peft_model_state_dict

        self.generation_config = model.get_base_model().generation_config
        self._lora = model.peft_config[name]
        tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        self._tensors: dict[str, Tensor] = {key: tensors[key].detach() for key in sorted(tensors)}

    def parameters(self) -> list[Tensor]:
        """Its weights, in one order for all adapters of a model."""
        return list(self._tensors.values())

    def named_parameters(self, remove_duplicate: bool = True) -> list[tuple[str, Tensor]]:
        """Its weights by PEFT's names, without the adapter's."""
        return list(self._tensors.items())

    def state_dict(self) -> dict[str, Tensor]:
        """Its weights by PEFT's names, without the adapter's."""
        return dict(self._tensors)

    def save_pretrained(self, folder: Path, *, state_dict: dict[str, Tensor]) -> None:
        """Write a PEFT adapter folder with these weights."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in state_dict.items()}, folder / WEIGHTS, metadata={"format": "pt"})
        lora = copy.deepcopy(self._lora)
        lora.inference_mode = True
        lora.save_pretrained(str(folder))
        about = json.loads((folder / CONFIG).read_text())
        about["target_modules"] = sorted(about["target_modules"])  # a set: in another order in every process
        (folder / CONFIG).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
        self.generation_config.save_pretrained(folder)


class AdapterRoles(Roles):
    """Policy, EMA and reference as adapters of one base; a role that nobody keeps falls to the policy.

    A frozen reference is the base alone where the run started from it, and a copy of the start's adapter where there was one; a
    reference that moves has its own adapter from the beginning.
    """

    def __init__(
        self,
        model: Any,
        *,
        ema_decay: float,
        reference: bool,
        moving: bool,
        adapted: bool,
        dtype: torch.dtype,
        world: World = ALONE,
        divided_on: torch.device | None = None,
    ) -> None:
        """All roles start as copies of the adapter of ``model``, a PeftModel; ``adapted``: it came with the start.

        Every process of ``world`` has the whole of it, or all adapters and a part of the base on the device ``divided_on``, filled
        from the main process's ``model``, which elsewhere may be without storage. Gradients are added up.
        """
        own = reference and (moving or adapted)
        names = [name for name, there in (("ema", ema_decay), ("reference", own)) if there]
        for name in names:
            _add(model, name)
        models = [model] if divided_on is None else _divided(model, world, divided_on, dtype)
        self._model, self._tuners = models[0], [one.base_model for one in models]
        self.policy = self.worker = self._model.get_base_model()
        self.dtype, self.ema_decay, self.world, self.divided = dtype, ema_decay, world, ALONE
        self.known: dict[int, Tensor] = {}
        self.learnt = Adapter(self._model, POLICY)
        kept = {name: Adapter(self._model, name) for name in names}
        self.ema, self.reference = kept.get("ema"), kept.get("reference")
        self._bare = reference and not own
        self._switch(POLICY)

    @contextlib.contextmanager
    def playing(self, role: Role, *, alone: bool = False) -> Iterator[Any]:
        """The model in ``role``, for forward passes without gradient; of a divided base as :class:`Roles` has it."""
        kept = {"ema": self.ema, "reference": self.reference}.get(role) is not None
        was_training = self.policy.training
        self.policy.eval()
        with torch.no_grad(), (gathered if alone else together)(self.policy) as playing:
            self._switch(None if role == "reference" and self._bare else role if kept else POLICY)
            try:
                yield playing
            finally:
                self._switch(POLICY)
        self.policy.train(was_training)

    def described(self) -> str:
        """What the models compute besides their weights' part in it: also how much the adapter counts."""
        return super().described() + json.dumps(self._model.peft_config[POLICY].to_dict(), sort_keys=True, default=str)

    def _switch(self, name: str | None) -> None:
        """Let the layers read the adapter ``name``, or none; the policy's alone takes gradients."""
        for tuner in self._tuners:
            if name is None:
                tuner.disable_adapter_layers()
            else:
                tuner.enable_adapter_layers()
                tuner.set_adapter(name, inference_mode=name != POLICY)


def _add(model: Any, name: str) -> None:
    """Lay one more adapter on ``model``, a copy of the policy's."""
    hollow = _hollow(model)
    with _drawing_from(0), torch.device("meta") if hollow else contextlib.nullcontext():
        model.add_adapter(name, copy.deepcopy(model.peft_config[POLICY]))
    if not hollow:
        torch._foreach_copy_(Adapter(model, name).parameters(), Adapter(model, POLICY).parameters())


def _divided(model: Any, world: World, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """A PeftModel like ``model``, its base divided over the processes, and an empty one for passes that each makes alone."""
    base = model.get_base_model()
    made, alone = (_laid_on(empty(base, dtype), copy.deepcopy(model.peft_config[POLICY]), 0) for _ in range(2))
    for name in list(model.peft_config)[1:]:
        _add(made, name)
        _add(alone, name)
    divide(made.get_base_model(), alone.get_base_model(), base, world, device, everywhere=ADAPTED)
    return [made, alone]


def with_adapter(model: Any, config: AdapterConfig, source: AdapterFolder | None, base: ModelConfig, seed: int) -> Any:
    """``model`` as a PeftModel: with the adapter of ``source``, or with a new one that changes nothing yet.

    ``base`` is where ``model`` lies. ValueError where ``config`` contradicts the adapter, or names modules that are not there.
    """
    from peft import LoraConfig

    names = config.lora_target_modules
    modules = None if names is None else _modules(model, names)
    if source is None:
        lora = LoraConfig(
            r=config.lora_r or RANK,
            lora_alpha=config.lora_alpha or ALPHA,
            target_modules=MODULES if names in (None, MODULES) else [name.strip() for name in str(names).split(",")],
            lora_dropout=0.0,  # policy and reference must agree where their weights do
            task_type="CAUSAL_LM",
        )
    else:
        lora = source.lora()
    refuse_tied(model, lora.target_modules)
    lora.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    try:
        adapted = _laid_on(model, lora, seed)
    except ValueError as problem:  # a kind of module that cannot be adapted
        raise ValueError(f"no LoRA adapter can be laid on this model: {problem}") from problem
    if source is not None:
        _refuse_contradictions(config, modules, adapted, source.name)
        source.fill(adapted)
    made = adapted.peft_config[POLICY]
    made.base_model_name_or_path = base.model_name_or_path
    made.revision = None if base.model_revision == "main" else base.model_revision
    return adapted


def _laid_on(model: Any, lora: Any, seed: int) -> Any:
    """``model`` as a PeftModel with a new adapter."""
    from peft import get_peft_model

    with _drawing_from(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed", UserWarning)
        named, made = lora.base_model_name_or_path, get_peft_model(model, lora)
        made.peft_config[POLICY].base_model_name_or_path = named  # PEFT writes the model's own over it
        return made


def _hollow(model: Any) -> bool:
    """Whether it is without storage."""
    return bool(next(model.parameters()).is_meta)


def described(model: Any) -> str:
    """An adapter's size, for people."""
    lora = model.peft_config[POLICY]
    mine = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for name, p in model.named_parameters() if ADAPTED not in name)
    places = len(model.base_model.targeted_module_names)
    return f"LoRA of rank {lora.r}, alpha {lora.lora_alpha}, on {places} modules: {mine:,} weights beside {base:,} frozen ones"


def _modules(model: Any, names: str) -> set[str]:
    """The modules of ``model`` that ``lora_target_modules`` names; ValueError for a name that none has."""
    known = [name for name, _ in model.named_modules() if name]
    if names == MODULES:
        return {name for name in known if _is_linear(model.get_submodule(name), model.get_output_embeddings())}
    found: set[str] = set()
    for wanted in names.split(","):
        mine = {name for name in known if f".{name}".endswith(f".{wanted.strip()}")}
        if not mine or not wanted.strip():
            close = nearest(wanted.strip(), {name.rpartition(".")[2] for name in known})
            raise ValueError(f"lora_target_modules names {wanted.strip()!r}, and the model has no such module{close}")
        found |= mine
    return found


def _is_linear(module: Any, output: Any) -> bool:
    return (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D") and module is not output


def _refuse_contradictions(config: AdapterConfig, modules: set[str] | None, model: Any, name: str) -> None:
    lora = model.peft_config[POLICY]
    there: dict[str, Any] = {"lora_r": lora.r, "lora_alpha": lora.lora_alpha}
    wrong = [k for k, v in (("lora_r", config.lora_r), ("lora_alpha", config.lora_alpha)) if v not in (None, there[k])]
    if modules is not None and modules != set(model.base_model.targeted_module_names):
        wrong.append("lora_target_modules")
        there[wrong[-1]] = ", ".join(sorted({m.rpartition(".")[2] for m in model.base_model.targeted_module_names}))
    if wrong:
        raise ValueError(
            f"{wrong[0]} is {getattr(config, wrong[0])}, but the adapter {name} that training starts from has "
            f"{there[wrong[0]]}: leave {wrong[0]} out, or merge the adapter first (sparring merge {name}) and train a new one"
        )


@contextlib.contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """PEFT draws new weights, on the processor, from the global stream: here from ``seed``, and that stream stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
