"""A PEFT adapter where a model is expected: its folder or hub name found, its base found, its weights put onto that base."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from sparring.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = {  # what a LoRA adapter may set and still be trained on here; every other key of its configuration has to be the default
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora", "use_dora", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of the initialization alone
}


@dataclass(frozen=True)
class AdapterFolder:
    """A PEFT adapter on disk or on the hub."""

    config: ModelConfig  # as the user gave it
    about: dict[str, Any]  # its adapter_config.json

    @property
    def name(self) -> str:
        """Its folder or hub name."""
        return self.config.model_name_or_path

    @property
    def base(self) -> ModelConfig:
        """Where the model lies that it was made on; ValueError where it is not said or not there."""
        base = self.about.get("base_model_name_or_path")
        remedy = f"write the base's folder or hub name as base_model_name_or_path into {self.name}/{CONFIG}"
        if not base:
            raise ValueError(f"the adapter {self.name} does not say what it was made on: {remedy}")
        path = Path(base)
        if not path.is_dir() and (path.is_absolute() or base.startswith((".", "~")) or base.count("/") > 1):
            raise ValueError(
                f"the adapter {self.name} was made on {base}, and no such folder is here: put it back, or {remedy}"
            )
        found = replace(self.config, model_name_or_path=base, model_revision=self.about.get("revision") or "main")
        if find_adapter(found):
            raise ValueError(
                f"the adapter {self.name} was made on {base}, an adapter itself: merge that one first (sparring merge)"
            )
        return found

    def file(self, name: str) -> Path | None:
        """One of its files, fetched where it lies on the hub; None where it has no such file."""
        try:
            found = cached_file(self.name, name, revision=self.config.model_revision)
        except OSError:
            return None
        return Path(found) if found else None

    @property
    def weights(self) -> Path:
        """Its weights; ValueError where they are not in safetensors."""
        found = self.file(WEIGHTS)
        if found is None:
            pickled = " (adapter_model.bin is a pickle, and never read)" if self.file("adapter_model.bin") else ""
            raise ValueError(
                f"the adapter {self.name} has no {WEIGHTS}{pickled}: load it with PEFT where you trust it, and save it "
                "again with save_pretrained"
            )
        return found

    def merged(self, model: Any) -> Any:
        """Its base ``model`` with its weights added in: an ordinary model, in place."""
        from peft import PeftModel

        folder = self.weights.parent
        refuse_tied(model, self.about.get("target_modules") or ())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            try:
                adapted = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
            except (RuntimeError, ValueError, UserWarning) as problem:
                raise ValueError(self._misfit(model, problem)) from problem
        made: Any = adapted.merge_and_unload().requires_grad_(True)
        return made

    def lora(self) -> Any:
        """Its LoraConfig, without dropout; ValueError where it is no LoRA adapter that can be trained on here."""
        from peft import LoraConfig

        kind = self.about.get("peft_type")
        remedy = f"merge it first (sparring merge {self.name}) and train a new adapter"
        if kind != "LORA":
            raise ValueError(f"the adapter {self.name} is of type {kind}, and LORA is what is trained here: {remedy}")
        default = LoraConfig().to_dict()
        given = {k: v for k, v in self.about.items() if v not in (None, {}, [])}
        odd = sorted(k for k, v in given.items() if k not in PLAIN and v != default.get(k))
        if given.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
            odd.append("init_lora_weights")
        if odd:
            named = ", ".join(f"{k} {self.about[k]!r}" for k in odd)
            raise ValueError(f"the adapter {self.name} has {named}, which is not trained here: {remedy}")
        kept = {k: v for k, v in given.items() if k in PLAIN - {"peft_type", "auto_mapping", "task_type"}}
        return LoraConfig(
            **kept | {"lora_dropout": 0.0, "inference_mode": False, "init_lora_weights": True}, task_type="CAUSAL_LM"
        )

    def fill(self, model: Any) -> None:
        """Copy its weights into the adapter of ``model``, a PeftModel of :meth:`lora`; ValueError where they do not fit.

        One without storage stays so.
        """
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        try:
            with warnings.catch_warnings():  # one without storage is only compared
                warnings.filterwarnings("ignore", ".*copying from a non-meta parameter", UserWarning)
                result: Any = set_peft_model_state_dict(model, load_file(self.weights))
        except RuntimeError as problem:  # another shape
            raise ValueError(self._misfit(model, problem)) from problem
        wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if ".lora_" in key)]
        if wrong:
            raise ValueError(self._misfit(model, f"{len(wrong)} weights without a counterpart, as {wrong[0]}"))

    def _misfit(self, model: Any, problem: object) -> str:
        base = self.about.get("base_model_name_or_path")
        return f"the adapter {self.name} does not fit {base}, which is the base it names: {problem}"


def find_adapter(config: ModelConfig) -> AdapterFolder | None:
    """The adapter that ``model_name_or_path`` names; None where it names something else."""
    name = config.model_name_or_path
    file: str | Path | None = Path(name) / CONFIG
    if not Path(name).is_dir():
        if not name or Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            return None
        try:
            file = find_adapter_config_file(name, revision=config.model_revision)
        except OSError:
            return None
    if file is None or not Path(file).is_file():
        return None
    return AdapterFolder(config, json.loads(Path(file).read_text()))


def refuse_tied(model: Any, targets: Any) -> None:
    """Raise ValueError where LoRA is to lie on one side of tied embeddings: a merge would change the other side too."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if inputs is None or outputs is None or inputs.weight is not outputs.weight or isinstance(targets, str):
        return
    tied = {name.rpartition(".")[2] for name, module in model.named_modules() if module in (inputs, outputs)}
    if wrong := sorted(tied & {target.rpartition(".")[2] for target in targets}):
        raise ValueError(
            f"LoRA on {', '.join(wrong)}: this model's input and output embeddings are one tensor, which cannot be adapted on "
            "one side; leave it out of the target modules"
        )
