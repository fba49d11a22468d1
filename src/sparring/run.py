"""A configuration -> a run; and the same again from its directory."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from sparring.config import Config, ModelConfig, resolve
from sparring.failures import CHANGEABLE, watched
from sparring.journal import Journal, Run
from sparring.methods import method as method_called
from sparring.methods.base import Method
from sparring.model.parallel import joined
from sparring.progress import Bars
from sparring.recipes import read_recipe
from sparring.session import Session

T = TypeVar("T", str, str | None)
KERNELS = get_args(get_type_hints(ModelConfig)["attn_implementation"])


def train(
    method: Method | type[Method] | str,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_dataset: Any = None,
    judge: Any = None,
    recipe: str | Path | None = None,
    quiet: bool = False,
    **keys: Any,
) -> Run:
    """Train by ``method``, or the one of that name, and return the finished run.

    ``keys`` are the flat configuration keys (``model_name_or_path``, ``dataset_name``, ``output_dir``, ``learning_rate``, ...) over
    those of ``recipe``. ``model`` (a copy of it is trained; it needs ``tokenizer``), ``train_dataset`` (a ``datasets.Dataset`` or a
    list of dicts) and ``judge`` (a Pairwise or Scoring of :mod:`sparring.judges.base`) stand for names where you have the objects.
    Raises ValueError for anything wrong with configuration, model or data, before training begins; TypeError for no judge.
    """
    layer = read_recipe(recipe) if recipe else {}
    layer.pop("method", None)
    given_twice = {"model_name_or_path": ("model", model), "dataset_name": ("train_dataset", train_dataset)}
    for key, (name, thing) in given_twice.items():
        if thing is not None and keys.get(key) is not None:
            raise ValueError(
                f"{name} and {key} are both given: the object stands for the name, so leave one of them out"
            )
    if model is not None:
        keys["model_name_or_path"] = str(Path(keys.get("output_dir", "")).resolve() / "start")
        how = model.config._attn_implementation
        asked = (layer | keys).get("attn_implementation", how)
        if asked != how:
            raise ValueError(
                f"attn_implementation is {asked}{'' if 'attn_implementation' in keys else f' in {recipe}'}, and the model object "
                f"attends by {how}: call its set_attn_implementation({asked!r}) first, or leave the key out"
            )
        if how in KERNELS:  # so that it attends alike when the run is resumed
            keys["attn_implementation"] = how
    if train_dataset is not None:
        keys["dataset_name"] = str(Path(keys.get("output_dir", "")).resolve() / "data.jsonl")
    if judge is not None:
        keys["judge"], judge = (judge, None) if isinstance(judge, str) else (None, judge)
    config = _with_whole_paths(resolve(method_called(method) if isinstance(method, str) else method, layer, keys))
    if not config.run.output_dir:
        raise ValueError("output_dir is missing: name the run's folder, as in runs/first")
    if model is not None and tokenizer is None:
        raise ValueError("a model object needs its tokenizer: give tokenizer=")
    _require_extras(config)
    with joined(config.model.device) as world:
        journal = Journal(Path(config.run.output_dir), writes=world.main)
        if world.main:
            _refuse_taken(journal, config)
        world.wait()
        parts = config, journal, Bars(quiet or not world.main)
        given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "rows": train_dataset, "judge": judge}
        with watched(config, *CHANGEABLE), Session(*parts, **given, world=world) as session:
            session.begin(model, train_dataset)
            return session.run()


def resume(
    output_dir: str | Path, *, judge: Any = None, quiet: bool = False, changes: Mapping[str, Any] | None = None
) -> Run:
    """Continue an interrupted run to the end it would have had; a run without a checkpoint starts anew.

    A run that was given its ``judge`` as an object needs it again. ``changes`` are new values of keys that say how the work is cut
    (:data:`sparring.failures.CHANGEABLE`), and move results by rounding alone. Raises ValueError for other keys, where
    ``output_dir`` is no run directory, and where model, data or that judge are no longer what the run began with.
    """
    changes = dict(changes or {})
    if fixed := next((name for name in changes if name not in CHANGEABLE), None):
        raise ValueError(f"resume cannot change {fixed}: of a run that has begun {', '.join(CHANGEABLE)} may change")
    journal = Journal(Path(output_dir))
    keys, about = journal.configuration()
    keys.setdefault("cache_implementation", "dynamic")  # runs from before there was a choice have neither
    keys.setdefault("torch_compile", False)
    kind = method_called(keys.pop("method"))
    config = resolve(kind, keys, changes | {"output_dir": str(output_dir)})
    if (journal.folder / "model").is_dir():
        journal.finished()
        if changes:
            raise ValueError(
                f"{journal.folder} is finished: there is nothing left that {next(iter(changes))} could change"
            )
        return Run(journal.folder, "finished", "it was finished before")
    if "judge_fingerprint" in about and judge is None:
        raise ValueError(f"{journal.folder} was judged by an object of yours: give it again, resume(..., judge=...)")
    with joined(config.model.device) as world:
        journal = Journal(journal.folder, writes=world.main)
        parts = config, journal, Bars(quiet or not world.main)
        with watched(config, *CHANGEABLE), Session(*parts, judge=judge, world=world) as session:
            if world.main:
                _refuse_changed(session, about)
            session.restore()
            now = session.config.flat()
            journal.change({name: now[name] for name in changes}, session.state.counters.step)
            return session.run()


def _refuse_changed(session: Session, about: dict[str, Any]) -> None:
    """Raise ValueError where model or data are no longer what the run began with."""
    for name, mine in session.about.items():
        if about.get(name) != mine and name.endswith("fingerprint"):
            part = name.removesuffix("_fingerprint")
            raise ValueError(
                f"the {part} of {session.journal.folder} changed since the run began ({about.get(name)}, now {mine}): put it back"
            )


def _require_extras(config: Config) -> None:
    """Raise ValueError where a setting needs a package that is not installed."""
    needs: dict[str, tuple[str, str]] = {}
    if config.run.report_to != "none":
        needs["report_to"] = (config.run.report_to, config.run.report_to)
    if config.training.optim == "adamw_8bit":
        needs["optim"] = ("adam8bit", "bitsandbytes")
    for name, (extra, package) in needs.items():
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{name} needs {package}, which is not installed: pip install 'sparring[{extra}]'")


def _with_whole_paths(config: Config) -> Config:
    """The configuration with local files' full paths, so that a run can be resumed from anywhere."""
    model, data, judging = config.model, config.data, config.judging

    def whole(name: T) -> T:
        return str(Path(name).resolve()) if name and Path(name).exists() else name

    place, colon, function = (judging.verifier or "").rpartition(":")
    verifier = f"{whole(place)}{colon}{function}" if place.endswith(".py") else judging.verifier
    return replace(
        config,
        method=config.method.anchored(whole),
        model=replace(
            model,
            model_name_or_path=whole(model.model_name_or_path),
            chat_template_path=whole(model.chat_template_path),
        ),
        data=replace(data, dataset_name=whole(data.dataset_name)),
        evaluation=replace(config.evaluation, eval_dataset_name=whole(config.evaluation.eval_dataset_name)),
        judging=replace(
            judging,
            verifier=verifier,
            judge_model_name_or_path=whole(judging.judge_model_name_or_path),
            judge_template=whole(judging.judge_template),
            human_labels=whole(judging.human_labels),
        ),
    )


def _refuse_taken(journal: Journal, config: Config) -> None:
    """Raise ValueError where the output folder holds a run already, and say how it differs."""
    if not journal.folder.exists() or not any(journal.folder.iterdir()):
        return
    if not (journal.folder / "config.yaml").exists():
        raise ValueError(f"output_dir {journal.folder} is not empty and holds no run: choose a new folder")
    before, _ = journal.configuration()
    mine = config.flat()
    settled = [name for name, value in mine.items() if value == "auto" and name != "device"]  # and written down
    mine |= {name: before.get(name) for name in settled}
    differing = [
        f"{k} ({before.get(k)!r}, now {mine.get(k)!r})" for k in {**before, **mine} if before.get(k) != mine.get(k)
    ]
    if differing:
        raise ValueError(
            f"{journal.folder} holds a run of another configuration: {', '.join(differing)}. Choose a new output_dir"
        )
    raise ValueError(f"{journal.folder} holds this run already: `sparring resume {journal.folder}` continues it")
