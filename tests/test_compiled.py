"""What is compiled computes what is not: steps over a static cache, norms, gated activations; and choices by the clock."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small import learner, tiny_llama
from test_generation import FAMILIES, PROMPTS, generated, requests, small_model, writer
from test_learner import PAIRS, capture
from toyrun import toy_folder, write_rows

from sparring import resume, train
from sparring.actors import packed, slots
from sparring.actors.local import LocalWriter
from sparring.config import AdapterConfig, ModelConfig, TrainingConfig, resolve
from sparring.journal import Journal
from sparring.learner import Learner
from sparring.methods.base import Request, Sampling
from sparring.methods.offline import DPO
from sparring.methods.sapo import SAPO
from sparring.model import compiling, pieces
from sparring.model.adapters import AdapterRoles, with_adapter
from sparring.model.compiling import fastest
from sparring.model.parallel import ALONE
from sparring.model.policy import prepared
from sparring.model.roles import Roles
from sparring.records import tokens

CPU = torch.device("cpu")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Programs are traced and run as they are, which takes no compiler; the functions that were, each time that they run."""
    seen: list[Any] = []
    compiler = torch.compile

    def compiled(function: Any, **options: Any) -> Any:
        program = compiler(function, backend="eager", **options)

        def run(*given: Any) -> Any:
            seen.append(function)
            return program(*given)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    slots._program.cache_clear()
    pieces._either.cache_clear()
    yield seen
    slots._program.cache_clear()
    pieces._either.cache_clear()
    torch._dynamo.reset()


def static(model: Any, batch_size: int = 8, say: Callable[[str], None] = lambda text: None) -> LocalWriter:
    """A writer with a static cache."""
    made = writer(model, batch_size)
    made.cache, made._say = "static", say
    return made


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_with_a_static_cache_what_generate_writes(family: str, traced: list[Any]) -> None:
    model, limits = small_model(family), [12, 3, 9, 12, 7]
    for batch_size in (3, 8):
        mine = static(model, batch_size)
        written = mine.write(requests(limits), Sampling(temperature=0))
        assert [list(w.token_ids) for w in written] == [
            generated(model, p, n) for p, n in zip(PROMPTS, limits, strict=True)
        ]
        assert set(mine.slotted.values()) == {None}
    assert traced


@torch.no_grad()
def test_a_step_that_is_really_compiled_writes_what_generate_writes() -> None:
    model = tiny_llama(num_key_value_heads=1).double()
    mine = static(model, batch_size=3)
    written = mine.write(requests([12] * 5), Sampling(temperature=0))
    assert [list(w.token_ids) for w in written] == [generated(model, p, 12) for p in PROMPTS]
    assert set(mine.slotted.values()) == {None}


@torch.no_grad()
def test_slots_widen_change_hands_and_grow_fewer_without_a_change_in_what_is_written(
    monkeypatch: pytest.MonkeyPatch, traced: list[Any]
) -> None:
    model = small_model("qwen3", eos_token_id=None)
    asked = [Request(tokens(PROMPTS[i % 5] * (1 + i % 4)), 3 + 17 * i % 40, i) for i in range(23)]
    whole = writer(model).write(asked, Sampling(0.9, 0.95, 20))
    widths: list[tuple[int, ...]] = []
    resized = slots.Slots.resized

    def noted(self: Any, rows: Any, capacity: int) -> None:
        widths.append((len(rows), capacity))
        resized(self, rows, capacity)

    monkeypatch.setattr(slots.Slots, "resized", noted)
    monkeypatch.setattr(slots, "ROOM", 1)
    monkeypatch.setattr(slots, "SMALLEST", 1)
    monkeypatch.setattr(slots, "_rounded", lambda columns: -(-columns // 8) * 8)
    monkeypatch.setattr(packed, "READ", 16)
    assert static(model, batch_size=6).write(asked, Sampling(0.9, 0.95, 20)) == whole
    assert {rows for rows, _ in widths} >= {6, 4, 2, 1}
    assert len({columns for rows, columns in widths if rows == 6}) > 2


@torch.no_grad()
def test_a_recorded_step_needs_nothing_but_the_memory_that_it_was_recorded_with(
    monkeypatch: pytest.MonkeyPatch, traced: list[Any]
) -> None:
    """As a CUDA graph does: what is read lies where it lay, and what comes out lies where it came out first."""

    def recorded(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        run()
        slots_of: Any = run.args[1]  # type: ignore[attr-defined]
        held = slots_of.given, slots_of.ids, slots_of.at, list(slots_of.kept)
        found = run()

        def replay() -> torch.Tensor:
            assert held[0] is slots_of.given
            assert (slots_of.ids.data_ptr(), slots_of.at.data_ptr()) == (held[1].data_ptr(), held[2].data_ptr())
            assert all(a is b for a, b in zip(held[3], slots_of.kept, strict=True))
            return found.copy_(run())

        return replay

    model = tiny_llama().double()
    step = slots.step

    def stepped(model: Any, about: Any, *given: Any) -> torch.Tensor:
        if about.run is None:
            run = partial(slots._program(), model, about)
            about.given.copy_(torch.tensor(given))
            about.run = recorded(run)
        return step(model, about, *given)

    monkeypatch.setattr(slots, "step", stepped)
    monkeypatch.setattr(slots, "ROOM", 1)
    monkeypatch.setattr(slots, "_rounded", lambda columns: -(-columns // 8) * 8)
    asked = [Request(tokens(PROMPTS[i % 5]), 3 + 7 * i % 20, i) for i in range(11)]
    assert static(model, 4).write(asked, Sampling()) == writer(model).write(asked, Sampling())


@pytest.mark.parametrize("columns", range(1, 700, 7))
def test_columns_come_in_few_sizes_none_a_third_too_large(columns: int) -> None:
    found = slots._rounded(columns)
    assert columns <= found <= max(64, columns * 1.5)
    assert found % 8 == 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("fault", "words"), [("wrong", "its logits are not those of plain forward passes"), ("raises", "no compiler")]
)
def test_a_compiler_that_errs_is_found_out(fault: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def program() -> Any:
        def run(*given: Any) -> torch.Tensor:
            if fault == "raises":
                raise RuntimeError("no compiler\nand much more")
            found: torch.Tensor = slots._logits(*given).roll(1, -1)
            return found

        return run

    monkeypatch.setattr(slots, "_program", program)
    model = tiny_llama().double()
    with pytest.raises(ValueError, match=rf"static, and LlamaForCausalLM cannot be written so here \({words}\): leave"):
        static(model).write(requests([9] * 5), Sampling())
    monkeypatch.setattr(compiling, "MEASURED", {"cpu"})
    said: list[str] = []
    mine = writer(model)
    mine.cache, mine._say = "auto", said.append
    assert mine.write(requests([9] * 5), Sampling()) == writer(model).write(requests([9] * 5), Sampling())
    assert said[-1].startswith("the cache for writing: dynamic (dynamic ")
    assert said[-1].endswith(f"; static cannot be: {words})")


@torch.no_grad()
def test_a_slot_s_next_row_does_not_see_what_was_not_finite_in_the_last_one(traced: list[Any]) -> None:
    model, found = tiny_llama().double(), []  # type: Any, list[torch.Tensor]
    _, (piece,) = packed.read(model, "segments", [tokens([5, 6, 7])], CPU)
    for number in (0.0, torch.inf):
        cache = slots.Slots(1, 64, piece.packed.pairs)
        for both in cache.kept:
            for tensor in both:
                tensor.fill_(number)
        cache.put({0: piece})
        with slots.implementing(model, slots.NAME):
            found.append(slots.step(model, cache, [9], [3]))
    assert found[0].isfinite().all()
    assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("slow", ["dynamic", "static"])
def test_auto_takes_the_cache_that_writes_faster_here_and_says_so(
    slow: str, monkeypatch: pytest.MonkeyPatch, traced: list[Any]
) -> None:
    model, said = tiny_llama().double(), []  # type: tuple[Any, list[str]]
    module = {"dynamic": packed, "static": slots}[slow]
    step = module.step  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "step", lambda *given: time.sleep(0.02) or step(*given))
    mine = writer(model)
    mine.cache, mine._say = "auto", said.append
    asked = requests([9] * 5)
    assert mine.settle([], Sampling()) == "auto", "nothing to go by"
    monkeypatch.setattr(compiling, "MEASURED", {"cpu"})
    written = mine.write(asked, Sampling())
    assert mine.cache == ({"dynamic", "static"} - {slow}).pop()
    assert said[0] == "the cache for writing: dynamic and static are tried"
    assert said[1].startswith(f"the cache for writing: {mine.cache} (dynamic ")
    assert written == writer(model).write(asked, Sampling())


def test_auto_compiles_nothing_where_it_would_not_pay(traced: list[Any]) -> None:
    mine = writer(tiny_llama())
    mine.cache = "auto"
    mine.write(requests([9] * 5), Sampling())
    assert mine.cache == "dynamic"
    config = resolve(SAPO, {}, {"output_dir": "runs/one"})
    assert config.training.torch_compile == "auto"
    assert pieces.settled(config, tiny_llama(), CPU, ALONE, lambda text: None).training.torch_compile is False
    assert not traced


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_pieces_give_the_gradient_of_plain_ones(
    family: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch, traced: list[Any]
) -> None:
    monkeypatch.setattr(pieces, "LEAST", 1)

    def gradient(compiled: bool) -> torch.Tensor:
        parts = small_model(family).float(), small_model(family, initializer_range=0.1).float()
        keys = {"gradient_checkpointing": checkpointed, "max_tokens_per_micro_batch": 24}
        return capture(learner(DPO(), *parts, torch_compile=compiled, **keys), PAIRS)

    plain, compiled = gradient(False), gradient(True)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
    assert bool(traced) == (family != "phi")  # which has neither


def test_adapters_learn_the_same_under_compiled_pieces(monkeypatch: pytest.MonkeyPatch, traced: list[Any]) -> None:
    monkeypatch.setattr(pieces, "LEAST", 1)

    def losses(compiled: bool) -> list[float]:
        start = with_adapter(tiny_llama(), AdapterConfig(use_peft=True, lora_r=4), None, ModelConfig(), 7)
        roles = AdapterRoles(start, moving=True, adapted=False, ema_decay=0.5, reference=True, dtype=torch.float32)
        keys = TrainingConfig(learning_rate=1e-2, warmup_ratio=0.0, torch_compile=compiled)
        made = Learner(roles, DPO(), keys, pad_id=0, total_steps=10)
        return [made.update(PAIRS, step)["loss"] for step in range(3)]

    plain = losses(False)
    assert plain[0] != plain[2]
    assert losses(True) == pytest.approx(plain, abs=1e-5)
    assert traced


def test_a_static_cache_writes_with_the_role_s_own_weights(traced: list[Any]) -> None:
    start = with_adapter(tiny_llama(), AdapterConfig(use_peft=True, lora_r=4), None, ModelConfig(), 7)
    words: dict[str, Any] = {"moving": True, "adapted": False, "reference": True, "dtype": torch.float32}
    adapters = AdapterRoles(start, ema_decay=0.5, **words)
    for number, tensor in enumerate(p for role in (adapters.ema, adapters.learnt) for p in role.parameters()):
        torch.nn.init.normal_(tensor.data, std=0.5, generator=torch.Generator().manual_seed(number))
    copied = Roles(prepared(tiny_llama()), ema_decay=0.5, reference=True, dtype=torch.bfloat16)
    torch._foreach_mul_([p.data for p in copied.ema.parameters()], 1.5)
    copied.sync()
    asked = requests([9] * 5)
    for roles in (adapters, copied):
        found = {}
        for cache in ("dynamic", "static", "static"):
            for role in ("policy", "ema", "reference"):
                mine = writer(None)
                mine.cache, mine._playing = cache, partial(roles.playing, role)
                written = mine.write(asked, Sampling(0.7))
                assert written == found.setdefault(role, written), (cache, role)
                assert cache == "dynamic" or set(mine.slotted.values()) == {None}
        assert found["policy"] != found["ema"]


def test_pieces_that_are_really_compiled_are_counted_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LEAST", 1)
    plain = capture(learner(DPO(), tiny_llama(), tiny_llama(1)), PAIRS)
    config = resolve(DPO, {}, {"output_dir": "runs/one", "torch_compile": "true"})
    assert pieces.settled(config, tiny_llama(), CPU, ALONE, lambda text: None).training.torch_compile is True
    compiled = capture(learner(DPO(), tiny_llama(), tiny_llama(1), torch_compile=True), PAIRS)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    assert not torch.equal(compiled, plain), "nothing was compiled"


def test_torch_compile_without_a_compiler_is_an_error_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def fail(*given: Any) -> Any:
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    pieces._either.cache_clear()
    config = resolve(DPO, {}, {"output_dir": "runs/one", "torch_compile": "true"})
    with pytest.raises(
        ValueError, match=r"torch_compile is true, .*no working C\+\+ compiler.* leave torch_compile at auto"
    ):
        pieces.settled(config, tiny_llama(), CPU, ALONE, lambda text: None)
    said: list[str] = []
    monkeypatch.setattr(compiling, "MEASURED", {"cpu"})
    config = resolve(DPO, {}, {"output_dir": "runs/one"})
    assert pieces.settled(config, tiny_llama(), CPU, ALONE, said.append).training.torch_compile is False
    assert said[-1].startswith("norms and gated activations: plain (plain ")
    assert said[-1].endswith("; compiled cannot be: InvalidCxxCompiler: no working C++ compiler found)")
    pieces._either.cache_clear()


def test_the_fastest_way_is_the_one_that_takes_least_when_it_is_warm() -> None:
    runs: list[str] = []

    def way(name: str, *seconds: float) -> Callable[[], None]:
        waits = iter(seconds)

        def run() -> None:
            runs.append(name)
            time.sleep(next(waits))

        return run

    said: list[str] = []
    ways = {"first": way("first", 0, 0.05, 0.03, 0.04), "slow at first": way("slow at first", 0.2, 0.06, 0.0, 0.06)}
    assert fastest("the way", ways, CPU, said.append) == "slow at first"
    assert runs == ["first", "slow at first"] * 4
    assert said[1].startswith("the way: slow at first (first 3")
    alike = {"first": way("first", 0, *[0.1] * 3), "other": way("other", 0, *[0.099] * 3)}
    assert fastest("the way", alike, CPU, said.append) == "first", "a hair's breadth is no reason"
    with pytest.raises(KeyError):
        fastest("the way", {"first": lambda: {}[1]}, CPU, said.append)


@pytest.mark.parametrize("compiled", [False, True])
def test_where_policy_and_reference_are_the_same_weights_their_log_probs_are_too(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "LEAST", 1)
    start = prepared(tiny_llama(hidden_size=64, intermediate_size=128))
    roles = Roles(start, ema_decay=0.0, reference=True, dtype=torch.bfloat16)
    keys = TrainingConfig(learning_rate=1e-3, warmup_ratio=0.0, torch_compile=compiled)
    metrics = Learner(roles, DPO(), keys, pad_id=0, total_steps=10).update(PAIRS, 0)
    assert metrics["rewards/margins"] == 0
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_pieces_that_have_nothing_to_compile_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MEASURED", {"cpu"})
    said: list[str] = []
    config = resolve(DPO, {}, {"output_dir": "runs/one"})
    phi = pieces.settled(config, small_model("phi").float(), CPU, ALONE, said.append)
    assert (phi.training.torch_compile, said) == (False, [])

    class BareRMSNorm(torch.nn.Module):
        """A norm without a weight, as some models have for their values."""

    model = tiny_llama()
    model.model.layers[0].self_attn.v_norm = BareRMSNorm()
    assert len(pieces._sample(model, CPU, torch.float32)[0]) == 2


def test_what_auto_came_to_is_written_down_and_a_resumed_run_computes_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: list[Any]
) -> None:
    monkeypatch.setattr(compiling, "MEASURED", {"cpu"})
    step, slow = packed.step, [0.02]
    monkeypatch.setattr(packed, "step", lambda *given: time.sleep(slow[0]) or step(*given))
    keys: dict[str, Any] = {
        "model_name_or_path": toy_folder(tmp_path / "model"),
        "dataset_name": write_rows(tmp_path / "rows.jsonl", 12),
        "output_dir": tmp_path / "run",
        "max_steps": 4,
        "segment_tokens": 4,
        "device": "cpu",
    }
    keys = {name: str(value) if isinstance(value, Path) else value for name, value in keys.items()}
    train("sapo", quiet=True, **keys)
    found, _ = Journal(tmp_path / "run").configuration()
    assert found["cache_implementation"] == "static"
    assert found["torch_compile"] in (True, False)
    with pytest.raises(ValueError, match="holds this run already"):  # and no run of another configuration
        train("sapo", quiet=True, **keys)
    slow[0], wrote = 0.0, []
    for kind in (packed.Batch, slots.SlotBatch):
        writes = kind.write
        monkeypatch.setattr(kind, "write", lambda self, rows, w=writes: (wrote.append(type(self)), w(self, rows))[1])
    (tmp_path / "run" / "model").rename(tmp_path / "before")  # a finished run has no checkpoint: it begins anew
    resume(tmp_path / "run", quiet=True)
    before, after = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("before", "run/model"))
    assert before == after
    assert set(wrote) == {slots.SlotBatch}
