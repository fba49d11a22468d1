"""A run's parts in memory: assembled from its configuration, restored from its checkpoint, played to its end."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparring import reference
from sparring.archive import Archive
from sparring.buffer import Buffer
from sparring.checkpoint import TrainState
from sparring.chronicle import Chronicle
from sparring.config import Config
from sparring.data.datasets import Loaded, digest, load
from sparring.evaluate.evaluator import Evaluator
from sparring.failures import lasting, told
from sparring.interrupt import Interrupted, asked_to_stop
from sparring.journal import Journal, Run, tracker
from sparring.judges.bench import Bench
from sparring.judges.make import fitting, make_judge
from sparring.learner import Learner
from sparring.loop import Round, Update, planned, play
from sparring.methods.base import Context, Judge, Method, NoJudge, reference_goes_first
from sparring.model import pieces, policy
from sparring.model.dry import asked
from sparring.model.flash import check_flash
from sparring.model.parallel import ALONE, World
from sparring.model.plan import with_budget
from sparring.model.start import load_start, make_roles
from sparring.monitor import Monitor
from sparring.probe import Probe
from sparring.progress import Bars, Tick
from sparring.records import Prompt
from sparring.results import Results
from sparring.savepoints import Savepoints
from sparring.seeds import Seeds
from sparring.writers import Writers, check_generation

OTHERS = ["an alarm in another process"]


class Session:
    """A run's parts in memory, assembled from its configuration."""

    def __init__(
        self,
        config: Config,
        journal: Journal,
        bars: Bars,
        *,
        model: Any = None,
        tokenizer: Any = None,
        rows: Any = None,
        judge: Any = None,
        world: World = ALONE,
    ) -> None:
        """Read data, then the model; every fault in them is found here."""
        self.config, self.journal, self.bars, self.world = config, journal, bars, world
        self.method: Method = config.method
        device = policy.pick_device(config.model.device)
        judging: dict[str, Any] = {"world": world, "tick": bars.moved, "say": self._say, "given": judge}
        judging["spent"] = journal.spent_on_judging()
        later = judge is None and config.judging.judge == "policy"  # which is not there yet
        self.judge: Judge = NoJudge() if later else fitting(self.method, make_judge(config, device, **judging))
        check_generation(config, self.method)
        if model is None:
            policy.check_causal(config.model)
        about = policy.configuration(config.model) if model is None else model.config
        check_flash(config.model, about, device)
        ends = None if model is None else policy.ends_of(model.generation_config)
        self.chat = policy.load_chat(config.model, tokenizer, ends)
        with bars.stage("read", None, unit="rows") as tick:
            self.loaded: Loaded = load(config.data, self.chat, need=self.method.wants(), rows=rows, tick=tick)
        self.prompts: Sequence[Prompt] = self.loaded.prompts
        self.dtype_shipped = policy.shipped_dtype(config.model) if model is None else model.dtype
        if config.adapter.use_peft:
            self.dtype_shipped = torch.float32  # what learns is the adapter, and it is shipped as it learned
        self.max_length = policy.room(about, self.prompts, config.data.max_length)
        training = config.training
        self.updates_per_epoch = math.ceil(len(self.prompts) / training.batch_size)
        self.cadence = self.method.cadence(training.batch_size, len(self.prompts))
        wanted = planned(self.cadence, training, len(self.prompts))
        self.total_steps = training.max_steps if training.max_steps > 0 else wanted
        first = reference_goes_first(
            self.method, self.cadence, self.total_steps * training.batch_size, len(self.prompts)
        )
        self.reference_first = first = first and training.precompute_ref_log_probs
        parts = about, device, self.prompts, self.max_length, self._say, world
        config = with_budget(config, *parts, reference_first=first)
        start = load_start(config, device, model, world)
        policy.check_vocabulary(self.chat.tokenizer, start)
        config = pieces.settled(config, start, device, world, self._say)
        self.about = {
            "start_fingerprint": world.told(policy.fingerprint(start) if world.main else ""),
            "data_fingerprint": digest(self.prompts),
        } | ({} if judge is None else {"judge_fingerprint": judge.identity})
        kept = "none" if self.reference_first else self.cadence.reference
        roles = make_roles(config, start, self.cadence.ema_decay, kept, say=self._say, world=world, device=device)
        del start
        gc.collect()  # of a divided model the main process had a whole one
        self.learner = Learner(
            roles, self.method, config.training, pad_id=self.chat.pad_id, total_steps=self.total_steps, say=self._say
        )
        buffer = Buffer(self.cadence.buffer_size or None, self.cadence.draw)
        self.state = TrainState(roles, self.learner.optimizers, buffer)
        self.monitor = Monitor(config.monitor, self.state.counters.monitor)
        self.seeds = Seeds(config.run.seed)
        self.tick: Tick = lambda count, note="": None
        self.asked: Mapping[str, bool] = {}
        requests = asked(self.method, 2, self.max_length)[1]
        self.writers = Writers(
            config,
            roles,
            self.chat,
            step=lambda: self.state.counters.step,
            stamp=lambda: f"{self.about['start_fingerprint']} of {config.run.seed}, {self._stamp()}",
            prompts=self.prompts,
            room=self.max_length if requests or config.evaluation.eval_dataset_name else 0,
            previous=lambda: self.results.of_a_round_ago(self.state.counters.round),
            lay_down=lambda where: self.results.lay_down(where),
            folder=journal.folder / "serving",
            say=self._say,
            note=journal.serving,
            tick=bars.moved,
            world=world,
            device=self.learner.device,
        )
        self.config = config = self.writers.config
        if later:
            learns = self.about, config.method, config.run.seed, *lasting(config)
            judging["policy"] = partial(self.writers.as_judge, self.max_length, lambda: f"{learns} {self._stamp()}")
            self.judge = fitting(self.method, make_judge(config, device, **judging))
        self.context = Context(self.writers, self.seeds, self.max_length, self.judge)
        rows_used = f"{len(self.prompts)} of {self.loaded.rows} rows used"
        self.results = Results(config, journal, roles, self.chat, world, rows=rows_used, dtype=self.dtype_shipped)
        self.savepoints = Savepoints(
            config,
            self.cadence,
            self.state,
            self.learner,
            self.monitor,
            journal,
            self.results,
            reference_first=first,
            say=lambda text: bars.say(text, "bold yellow"),
        )
        for name in self.method.writers():
            self.writers.check(name)
        self.probe = Probe(self.learner, self.context, self.journal.folder / "probe.json")
        self.evaluator = None
        if config.evaluation.eval_dataset_name:
            self.evaluator = Evaluator(config, self.chat, self.learner, self.context, journal.folder, bars)
            self.about["evaluation_fingerprint"] = self.evaluator.fingerprint
        report_to = config.run.report_to if world.main else "none"
        self.tracker = tracker(report_to, journal.folder, config.run.run_name or journal.folder.name, config.flat())
        hears = self.tracker, self.monitor, self.probe, self.judge, self.evaluator
        counts: dict[str, Any] = {"total_steps": self.total_steps, "updates_per_epoch": self.updates_per_epoch}
        self.chronicle = Chronicle(config, self.cadence, self.state, journal, *hears, **counts, say=self._say)
        self.archive = Archive(
            journal.folder / "rounds",
            self._stamp,
            bars,
            world,
            requests=requests,
            shards=math.ceil((self.cadence.prompts_per_round or len(self.prompts)) / config.generation.shard_prompts),
            after_judging=self.chronicle.judged,
            stop=self._stop_asked,
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.writers.release()
        self.tracker.finish()
        if isinstance(self.judge, Bench):
            self.judge.close()

    def begin(self, model: Any, rows: Any) -> None:
        """Write the run directory's configuration, and what was given as objects."""
        self.journal.folder.mkdir(parents=True, exist_ok=True)
        if not self.world.main:
            return
        if model is not None:
            model.save_pretrained(self.config.model.model_name_or_path)
            self.chat.tokenizer.save_pretrained(self.config.model.model_name_or_path)
        if rows is not None:
            with Path(self.config.data.dataset_name).open("w") as file:
                file.writelines(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
        self.journal.begin(self.config.flat(), **self.about)
        held_out = [self.evaluator.summary(self.prompts)] if self.evaluator else []
        for line in (self.loaded.summary(), *self.loaded.warnings, *held_out):
            self.bars.say(line, "dim")

    def restore(self) -> None:
        """Become the last checkpoint, or the start where there is none."""
        self.savepoints.restore()
        self._say(f"goes on from update {self.state.counters.step} of {self.total_steps}")

    def run(self) -> Run:
        """Play to the end, an alarm or a signal; save; write the result where the end was reached."""
        outcome = None
        try:
            self.probe.prepare(self.prompts)
            self.chronicle.begin()
            bar = self.bars.stage(self.method.name, self.total_steps, self.state.counters.step, "updates", own=True)
            with asked_to_stop() as self.asked, bar as self.tick:
                while outcome is None:
                    outcome = self._play()
            if outcome.state == "finished":
                self.results.finish()
        except (OSError, ValueError, RuntimeError) as problem:
            clearer = told(problem, self.config)
            self._fail(str(clearer))
            if clearer is problem:
                raise
            raise clearer from problem
        done = self.state.counters.step
        total = done if outcome.state == "finished" else self.total_steps  # of counted rounds an upper bound
        self.journal.status(outcome.state, done, total, outcome.message)
        return outcome

    def _play(self) -> Run | None:
        """Consume rounds and updates; None: rolled back, to be played on."""
        folder, now = self.journal.folder, self.state.counters
        self.journal.status("running", now.step, self.total_steps)
        parts = self.method, self.cadence, self.learner, self.context, self.prompts, self.total_steps
        began = time.perf_counter()
        try:
            for event in play(self.state, *parts, self.archive, self.config.generation.shard_prompts):
                if isinstance(event, Round):
                    self._reference_of_round()
                    news = self.chronicle.round(event)
                else:
                    metrics, news = self.chronicle.update(event, time.perf_counter() - began)
                    margin = f"  margin {metrics['rewards/margins']:.3f}" if "rewards/margins" in metrics else ""
                    self.tick(1, f"loss {metrics['loss']:.4f}{margin}")
                    if not event.last:  # else the server that wrote for an evaluation writes the next round as well
                        self.writers.release()
                    began = time.perf_counter()
                for text in news:
                    self.bars.say(f"alarm at update {now.step}: {text}", "bold yellow")
                alarmed = self.world.any(bool(news)) and self.config.monitor.on_alarm != "warn"
                if alarmed and self.savepoints.can_go_back():
                    self.writers.release()
                    self.tick(-self.savepoints.roll_back(news or OTHERS))
                    return None
                stop = self._stop_asked()
                if isinstance(event, Update):
                    self.results.keep(event, now.round)
                    due = (now.step % self.config.run.save_steps == 0 or event.last) and now.step < self.total_steps
                    if due or stop:
                        self.savepoints.save()
                    if stop:
                        raise Interrupted
                if alarmed:
                    self.savepoints.save()
                    words = f"{(news or OTHERS)[0]}; sparring resume {folder} goes on all the same"
                    return Run(folder, "stopped", words)
        except Interrupted:
            return Run(folder, "interrupted", f"stopped by a signal after update {now.step}: sparring resume {folder}")
        return Run(folder, "finished")

    def _reference_of_round(self) -> None:
        """The round is written: training begins, first of all with what the reference says of its pairs."""
        self.writers.release()
        if self.reference_first:
            self.learner.sealed = False
            start = self.about["start_fingerprint"] if self.state.counters.step == 0 else None
            reference.compute(self.learner, self.state.buffer.pairs, start, self.bars)
            self.learner.sealed = True

    def _stop_asked(self) -> bool:
        """Whether a signal asks this process, or another one, to stop."""
        return self.world.any(self.asked.get("stop", False))

    def _stamp(self) -> str:
        """What responses and judgments of now depend on, besides the run's configuration."""
        now = self.state.counters
        return f"update {now.step}, learning rate times {now.learnt_at:g}"

    def _fail(self, message: str) -> None:
        """Note a failure, if the disk still takes a note."""
        try:
            self.journal.status("failed", self.state.counters.step, self.total_steps, message)
        except OSError as problem:
            self.bars.say(f"status.json could not be written: {problem}", "red")

    def _say(self, text: str) -> None:
        self.bars.say(text, "dim")
