"""Everyone who can write responses in a run: the policy, its EMA, what it was a round ago, the start, other models."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from sparring.actors.forms import CHAT, Message
from sparring.actors.local import TRIAL, CacheKind, LocalWriter
from sparring.actors.served import Served
from sparring.actors.server import ServerWriter
from sparring.actors.servers import Running, base_urls, check_installed, check_servers
from sparring.actors.shared import SharedWriter
from sparring.config import Config
from sparring.data.chat import Chat
from sparring.judges.policy import PolicyJudge
from sparring.judges.verdicts import read_instruction
from sparring.methods.base import Method, Request, Sampling, Writer
from sparring.model import policy
from sparring.model.parallel import World
from sparring.model.roles import Role, Roles
from sparring.model.start import computed_in
from sparring.records import Prompt

ROLES: tuple[Role, ...] = ("policy", "ema")


class Writers(Mapping[str, Writer]):
    """Writers by name: ``policy``, ``ema``, ``previous``, ``start``, a model's folder or name on the hub, or a server's URL.

    A model that is no role of the run is loaded when it writes and leaves memory after, so that one is there at a time.
    """

    def __init__(
        self,
        config: Config,
        roles: Roles,
        chat: Chat,
        *,
        step: Callable[[], int],
        stamp: Callable[[], str],
        previous: Callable[[], str | None],
        prompts: Sequence[Prompt],
        room: int,
        lay_down: Callable[[Path], None],
        folder: Path,
        say: Callable[[str], None],
        note: Callable[[Mapping[str, Any]], None],
        tick: Callable[[int], None],
        world: World,
        device: torch.device,
    ) -> None:
        """``step`` says how many updates are behind the policy, ``previous`` where that of a round ago lies (None: the start).

        For a server ``lay_down`` writes the policy's weights to a folder; what it wrote is kept in ``folder``, under ``stamp``, and
        ``note`` is told what it was asked. Servers of a matrix are shown the conversations of ``prompts``. ``room`` is the longest
        sequence, 0 where nothing will be written; ``config`` then is what was given with the cache decided on.
        """
        self.config, self._roles, self._chat = config, roles, chat
        self._step, self._previous, self._tick, self._say = step, previous, tick, say
        self._world, self._device, self._prompts, self._folder = world, device, prompts, folder
        if config.generation.cache_implementation == "auto":
            local = config.generation.generation_backend == "local"
            found: CacheKind = self._faster_cache(room) if room and local else "dynamic"
            self.config = replace(config, generation=replace(config.generation, cache_implementation=found))
        self._known: dict[str, Writer] = {role: self._role(role) for role in ROLES}
        self._served: Served | None = None
        if config.generation.generation_backend == "server":
            self._served = Served(
                config.generation,
                chat,
                folder,
                source=lambda: f"policy@{step()}",
                stamp=stamp,
                lay_down=lay_down,
                main=world.main,
                say=say,
                note=note,
                tick=tick,
            )
            shared = SharedWriter(self._served, world, device, alone=True)
            self._known["policy"] = self._served if world.size == 1 else shared

    def check(self, name: str) -> None:
        """Raise ValueError where nobody of that name can write, before anything is written."""
        if name == "previous" and not self.config.run.keep_round_models:
            raise ValueError(
                "previous is to write, and keep_round_models is false, so that earlier models are gone: leave one of the two out"
            )
        self[name]

    def release(self) -> None:
        """Stop what writes in a server: the memory is the training's now."""
        if self._served is not None:
            self._served.release()

    def __getitem__(self, name: str) -> Writer:
        """The writer of that name; ValueError where there is no such model."""
        if name == "previous":
            return self._loaded(self._previous() or self.config.model.model_name_or_path, "previous")
        if name not in self._known and name.startswith(("http://", "https://")):
            self._known[name] = self._at(name)
        if name not in self._known:
            self._known[name] = self._loaded(self.config.model.model_name_or_path if name == "start" else name, name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        """The names that are known so far."""
        return iter(self._known)

    def __len__(self) -> int:
        """How many those are."""
        return len(self._known)

    def as_judge(self, max_length: int, whose: Callable[[], str]) -> PolicyJudge:
        """The policy as judge of responses; ``whose`` says whose weights it has."""
        keys = self.config.judging
        return PolicyJudge(
            self._chat,
            read_instruction(keys.judge_template, keys.judge_by),
            writer=self._role("policy", alone=True),
            playing=lambda: self._roles.playing("policy", alone=True),
            whose=whose,
            max_length=max_length,
            max_new_tokens=keys.judge_max_new_tokens,
            rows=self.config.generation.generation_batch_size,
            batch_tokens=keys.judge_batch_tokens,
            world=self._world,
        )

    def _faster_cache(self, room: int) -> CacheKind:
        """What is found with the first prompts; it goes into the run's configuration, so a resumed one computes as it began."""
        some = self._prompts[: self.config.generation.generation_batch_size]
        asked = [
            Request(p.token_ids, max(0, min(TRIAL, room - len(p.token_ids))), place) for place, p in enumerate(some)
        ]
        found = self._alone(lambda: self._roles.playing("policy", alone=True), lambda: "policy").settle(
            asked, Sampling()
        )
        return "dynamic" if self._world.any(found != "static") else "static"  # what one cannot have, none has

    def _role(self, role: Role, *, alone: bool = False) -> Writer:
        name = role if role in self._roles.kept() else "policy"
        return self._local(lambda: self._roles.playing(role, alone=True), lambda: f"{name}@{self._step()}", alone=alone)

    def _loaded(self, where: str, name: str) -> Writer:
        about = self.config.model
        if where != about.model_name_or_path:
            about = replace(about, model_name_or_path=where, model_revision="main")
        own = self._chat.tokenizer.get_vocab()
        if where != self.config.model.model_name_or_path and policy.load_tokenizer(about).get_vocab() != own:
            raise ValueError(
                f"{where} has another tokenizer than {self.config.model.model_name_or_path}: its tokens mean something else here. "
                "Use a model of the same family"
            )

        @contextmanager
        def playing() -> Iterator[Any]:
            dtype = computed_in(self.config)
            model = policy.load_model(about, self._device, dtype).eval()
            try:
                yield model
            finally:
                del model
                gc.collect()
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()

        moved = name == "previous" and where != self.config.model.model_name_or_path
        label = f"{name}@{Path(where).name}" if moved else f"{'start' if name == 'previous' else name}@0"
        return self._local(playing, lambda: label)

    def _at(self, url: str) -> Writer:
        """A server's model, named behind a #: asked by conversation, so that its tokenizer may be another one."""
        check_installed()
        address, _, model = url.partition("#")
        asked = {p.token_ids.tobytes(): _messages(p) for p in self._prompts}
        keys = self.config.generation
        writer = ServerWriter(
            Running(base_urls(address), model=model or None, api_key=os.environ.get(keys.server_api_key_env) or None),
            self._chat,
            source=lambda: f"{model or urlsplit(address).netloc}@0",
            model_id=url,
            kept=self._folder / f"{hashlib.blake2b(url.encode(), digest_size=8).hexdigest()}.jsonl",
            concurrency=keys.server_concurrency,
            timeout=keys.server_timeout,
            retries=keys.server_retries,
            messages=lambda ids: asked[ids.tobytes()],
            forms=(CHAT,),
            tick=self._tick,
        )
        return writer if self._world.size == 1 else SharedWriter(writer, self._world, self._device, alone=True)

    def _local(self, playing: Callable[[], Any], source: Callable[[], str], *, alone: bool = False) -> Writer:
        writer = self._alone(playing, source)
        return writer if alone or self._world.size == 1 else SharedWriter(writer, self._world, self._device)

    def _alone(self, playing: Callable[[], Any], source: Callable[[], str]) -> LocalWriter:
        return LocalWriter(
            playing,
            source=source,
            decode=self._chat.decode,
            end_ids=self._chat.end_ids,
            pad_id=self._chat.pad_id,
            batch_size=self.config.generation.generation_batch_size,
            cache=self.config.generation.cache_implementation,
            tick=self._tick,
            say=self._say,
        )


def _messages(prompt: Prompt) -> Sequence[Message]:
    content = prompt.text if prompt.content is None else prompt.content
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def check_generation(config: Config, method: Method) -> None:
    """Raise ValueError where what ``method`` wants cannot be written as ``config`` has it, before time is spent."""
    keys = config.generation
    if keys.generation_backend != "server":
        return
    check_servers(keys)
    rounds = method.cadence(config.training.batch_size, 1).rounds
    if rounds is None:
        raise ValueError(
            f"generation_backend is server, and {method.name} writes at every few updates or not at all: use local"
        )
    if config.adapter.use_peft:
        raise ValueError(
            "generation_backend is server, and use_peft keeps the policy as an adapter, which servers do not load as a model: use "
            "local, or train all weights"
        )
    if config.evaluation.eval_dataset_name and keys.server_urls is not None:
        raise ValueError(
            "server_urls serve one model for good, and eval_dataset_name is to be answered by the policy as it becomes: give "
            "server_command"
        )
    if rounds > 1 and keys.server_urls is not None:
        raise ValueError(
            f"server_urls serve one model for good, and {method.name} writes with a new one in each of {rounds} rounds: give "
            "server_command, which is started anew for each, or rounds 1"
        )
