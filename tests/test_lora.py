"""LoRA: one base, three roles; what is learned, averaged, saved, resumed and merged."""

import contextlib
import gc
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import started
import test_resume
import torch
from small import PAD, pair, tiny_llama
from test_resume import assert_same, state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from toyrun import toy_folder, write_pairs, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparring
from sparring import folders
from sparring.config import AdapterConfig, ModelConfig, TrainingConfig
from sparring.data.packing import Group
from sparring.learner import Learner
from sparring.merge import merge
from sparring.methods.offline import DPO
from sparring.model import policy
from sparring.model.adapters import AdapterRoles, with_adapter
from sparring.model.logps import Scorer, checked

pytestmark = pytest.mark.filterwarnings("ignore:.*gemm_4bit")  # bitsandbytes, where it is installed, on importing peft
CPU = torch.device("cpu")
BASE = ModelConfig(model_name_or_path="base")
PAIRS = [
    pair([5, 6, 7], [10, 11, 12, 13, 2], [10, 11, 40, 41, 13, 2], rejected_scored=(2, 5)),
    pair([8], [20, 21, 2], [22, 2]),
    pair([9, 4, 4], [30, 31, 32, 33, 2], [30, 2]),
]
GROUPS = [Group(p.prompt_token_ids, [p.chosen.token_ids, p.rejected.token_ids]) for p in PAIRS if p.rejected]
SPANS = torch.tensor([s for p in PAIRS for s in (p.chosen_scored, p.rejected_scored)])
SMALL: dict[str, Any] = {
    "use_peft": True,
    "max_length": 96,
    "max_prompt_length": 48,
    "learning_rate": 1e-2,
    "warmup_ratio": 0.0,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "quiet": True,
}


def adapted(model: Any = None, *, moved: bool = True, **keys: Any) -> Any:
    """A small model with an adapter, which does something where it is ``moved``."""
    made = with_adapter(tiny_llama() if model is None else model, AdapterConfig(use_peft=True, **keys), None, BASE, 3)
    if moved:
        torch.manual_seed(5)
        for name, p in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, 0.0, 0.3)
    return made


def roles_of(model: Any, *, ema: float = 0.0, reference: bool = True, moving: bool = False, start: bool = False) -> Any:
    return AdapterRoles(model, ema_decay=ema, reference=reference, moving=moving, adapted=start, dtype=torch.float32)


def learner_of(roles: Any, **keys: Any) -> Learner:
    config = TrainingConfig(**({"learning_rate": 1e-2, "warmup_ratio": 0.0} | keys))
    return Learner(roles, DPO(), config, pad_id=PAD, total_steps=10)


def shift(roles: Any, by: float = 0.1) -> None:
    """Move the policy's adapter."""
    with torch.no_grad():
        for tensor in roles.learnt.parameters():
            tensor.add_(by)


def plain_sums(model: Any) -> Tensor:
    """Summed log-probs of the pairs' responses over their spans, by nothing but a forward pass for each."""
    found = []
    for group, spans in zip(GROUPS, SPANS.view(-1, 2, 2).tolist(), strict=True):
        for response, (first, last) in zip(group.responses, spans, strict=True):
            ids = torch.tensor([[*group.prompt, *response]])
            logps = model(ids)[0].float().log_softmax(-1)
            start = len(group.prompt)
            found.append(sum(logps[start + t - 1, ids[0, start + t]] for t in range(first, last)))
    return torch.stack(found)


def logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(input_ids=ids).logits


def by_hand(model: Any) -> dict[str, Tensor]:
    """Gradients of the sum of -logsigmoid(margin) by A and B, where each weight is W + alpha/r B A, without PEFT."""
    weights = {k: v.detach().clone() for k, v in model.get_base_model().state_dict().items()}
    factors = {k: v.requires_grad_() for k, v in weights.items() if ".lora_" in k}
    bare = tiny_llama(tie_word_embeddings=model.config.tie_word_embeddings)

    def logits(ids: Tensor) -> Tensor:
        whole = {k.replace(".base_layer", ""): v for k, v in weights.items() if ".lora_" not in k}
        for k, a in factors.items():
            if "lora_A" in k:
                place = k.partition(".lora_")[0] + ".weight"
                whole[place] = whole[place] + 32 / 16 * factors[k.replace("lora_A", "lora_B")] @ a
        found: Tensor = torch.func.functional_call(bare, whole, kwargs={"input_ids": ids}, tie_weights=False).logits
        return found

    sums = plain_sums(logits).view(-1, 2)
    (-torch.nn.functional.logsigmoid(sums[:, 0] - sums[:, 1])).sum().backward()
    return {k: v.grad for k, v in factors.items() if v.grad is not None}


def margin_loss(first: int, last: int, sums: Tensor) -> Tensor:
    scored = sums[:, 0].view(-1, 2)
    return -torch.nn.functional.logsigmoid(scored[:, 0] - scored[:, 1]).sum()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["segments", "dense"])
@pytest.mark.parametrize("targets", [None, "q_proj,up_proj", "q_proj,lm_head"])
def test_the_adapter_s_gradient_is_that_of_plain_autograd(kind: Any, targets: str | None, checkpointing: bool) -> None:
    model = adapted(tiny_llama(tie_word_embeddings=targets is None), lora_target_modules=targets)
    roles = roles_of(model)
    scorer = Scorer(kind, PAD, CPU)
    if targets and "lm_head" in targets and kind == "segments":
        scorer, words = checked("segments", roles.worker, GROUPS, PAD, CPU)
        assert (scorer.kind, "an output layer of type Linear" in words) == ("dense", True)
    roles.worker.train()
    if checkpointing:
        old = roles.worker.gradient_checkpointing_enable
        getattr(roles.worker, "activation_checkpointing_enable", old)({"use_reentrant": False})
    scorer.backward(roles.worker, GROUPS, SPANS, margin_loss)
    mine = {name: p.grad for name, p in roles.policy.named_parameters() if p.grad is not None}
    theirs = by_hand(model)
    assert mine.keys() == theirs.keys()
    assert len(mine) == 2 * {None: 14, "q_proj,up_proj": 4, "q_proj,lm_head": 3}[targets]
    for name, gradient in theirs.items():
        assert gradient.norm() > 1e-3
        assert (mine[name] - gradient).norm() < 1e-4 * gradient.norm()


@pytest.mark.parametrize("role", ["policy", "ema", "reference"])
def test_every_role_is_packed_as_it_is_dense(role: Any) -> None:
    roles = roles_of(adapted(), ema=0.5, moving=True)
    shift(roles)
    roles.step_ema()
    with roles.playing(role) as model:
        packed, dense = (Scorer(kind, PAD, CPU).sums(model, GROUPS, SPANS) for kind in ("segments", "dense"))
        torch.testing.assert_close(packed, dense)
        torch.testing.assert_close(dense[:, 0], plain_sums(logits_of(model)))


def test_a_run_from_the_base_starts_at_log_2_and_its_reference_stays_the_base() -> None:
    base = tiny_llama()
    expected = plain_sums(logits_of(base)).detach()
    learner = learner_of(roles_of(adapted(tiny_llama(), moved=False)))
    losses = [learner.update(PAIRS, step)["loss"] for step in range(3)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[2] < losses[0] - 0.01
    learner.roles.known.clear()
    torch.testing.assert_close(learner.reference_sums(PAIRS).flatten(), expected)
    assert learner.roles.kept().keys() == {"policy"}


def test_a_run_from_an_adapter_has_the_adapted_model_as_its_reference() -> None:
    model = adapted()
    expected = plain_sums(logits_of(model)).detach()
    bare = plain_sums(logits_of(tiny_llama())).detach()
    assert (expected - bare).abs().max() > 0.1
    learner = learner_of(roles_of(model, start=True))
    losses = [learner.update(PAIRS, step)["loss"] for step in range(3)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[2] < losses[0] - 0.01
    torch.testing.assert_close(learner.reference_sums(PAIRS).flatten(), expected)


def test_the_ema_and_a_moving_reference_are_those_of_the_adapter_s_weights() -> None:
    roles = roles_of(adapted(), ema=0.75, moving=True)
    base = {k: v.clone() for k, v in roles.policy.state_dict().items() if ".lora_" not in k}
    start = {k: v.clone() for k, v in roles.learnt.state_dict().items()}
    assert roles.ema.state_dict().keys() == roles.reference.state_dict().keys() == start.keys()
    shift(roles, 1.0)
    roles.step_ema()
    for name, tensor in roles.ema.state_dict().items():  # 0.25 (w + 1) + 0.75 w
        torch.testing.assert_close(tensor, start[name] + 0.25)
    torch.testing.assert_close(roles.reference.state_dict(), start)
    roles.known[1] = torch.zeros(2)
    roles.refresh_reference("ema")
    assert roles.known == {}
    assert_equal(roles.reference.state_dict(), roles.ema.state_dict())
    roles.refresh_reference("policy")
    assert_equal(roles.reference.state_dict(), roles.learnt.state_dict())
    assert_equal({k: v for k, v in roles.policy.state_dict().items() if ".lora_" not in k}, base)
    with roles.playing("reference") as model, torch.no_grad():
        moved = model(torch.tensor([[5, 6]])).logits
    torch.testing.assert_close(moved, roles.policy(torch.tensor([[5, 6]])).logits)


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert [k for k in mine if not torch.equal(mine[k], theirs[k])] == []


def test_playing_a_role_leaves_gradients_and_what_is_trained_as_they_were() -> None:
    roles = roles_of(adapted(), ema=0.5, moving=True)
    learner = learner_of(roles)
    trained = {name for name, p in roles.policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name and ".default." in name for name in trained)
    assert len(learner.weights) == len(trained) == sum(len(g["params"]) for g in learner.optimizers[0].param_groups)
    Scorer("segments", PAD, CPU).backward(roles.worker, GROUPS, SPANS, margin_loss)
    before = [p.grad.clone() for p in learner.weights if p.grad is not None]
    ids = torch.tensor([[5, 6, 7]])
    own = roles.policy(ids).logits
    for role in ("ema", "reference", "policy"):
        with contextlib.suppress(KeyError), roles.playing(role) as model:
            assert not model.training
            assert not model(ids).logits.requires_grad
            raise KeyError  # what happens in there does not matter
        assert {name for name, p in roles.policy.named_parameters() if p.requires_grad} == trained
    assert len(before) == len(learner.weights)
    assert all(torch.equal(p.grad, g) for p, g in zip(learner.weights, before, strict=True) if p.grad is not None)
    assert torch.equal(roles.policy(ids).logits, own)


def test_one_copy_of_the_base_is_in_memory_whatever_the_roles(tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "model", hidden_size=96)
    base = policy.load_model(ModelConfig(model_name_or_path=str(folder)), CPU)
    places = {name: p.data_ptr() for name, p in base.named_parameters()}
    mine = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in base.parameters()}
    shapes = {tuple(p.shape) for p in base.parameters() if p.ndim == 2}
    roles = roles_of(adapted(base, lora_r=4), ema=0.5, moving=True)
    now = {n.replace(".base_layer", ""): p.data_ptr() for n, p in roles.policy.named_parameters() if ".lora_" not in n}
    assert now == places
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in roles.policy.parameters()}
    adapter = sum(t.nbytes for t in roles.learnt.parameters())
    assert sum(held.values()) == sum(mine.values()) + 3 * adapter
    gc.collect()
    tensors = (t for t in gc.get_objects() if issubclass(type(t), Tensor) and type(t) is not FakeTensor)
    alive = [t for t in tensors if tuple(t.shape) in shapes]
    assert {t.data_ptr() for t in alive} <= set(places.values())  # nor does anyone else hold one


def test_under_bfloat16_the_base_is_bfloat16_and_what_learns_is_float32(tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "model")
    base = policy.load_model(ModelConfig(model_name_or_path=str(folder)), CPU, torch.bfloat16)
    whole = policy.load_model(ModelConfig(model_name_or_path=str(folder)), CPU)
    assert base.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(base.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)
    roles = AdapterRoles(adapted(base), ema_decay=0.5, reference=True, moving=True, adapted=False, dtype=torch.bfloat16)
    kinds = {".lora_" in name: set() for name, _ in roles.policy.named_parameters()}
    for name, p in roles.policy.named_parameters():
        kinds[".lora_" in name].add(p.dtype)
    assert kinds == {False: {torch.bfloat16}, True: {torch.float32}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, rows, pairs, and an adapter of the model made by SFT."""
    folder = tmp_path_factory.mktemp("lora")
    found = {
        "model": toy_folder(folder / "model"),
        "rows": write_rows(folder / "rows.jsonl", 40),
        "pairs": write_pairs(folder / "pairs.jsonl", 40),
    }
    keys = SMALL | {"max_steps": 12, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "q_proj,v_proj,down_proj"}
    run = sparring.train(
        sparring.SFT, model_name_or_path=found["model"], dataset_name=found["rows"], output_dir=folder / "sft", **keys
    )
    return found | {"adapter": run.model}


def sapo(inputs: dict[str, Path], out: Path, start: str = "model", **keys: Any) -> sparring.Run:
    method = sparring.SAPO(segment_tokens=8, ema_every=2, reference_every=5, buffer_size=20, generate_ahead=3)
    return sparring.train(
        method, model_name_or_path=inputs[start], dataset_name=inputs["rows"], output_dir=out, **SMALL | keys
    )


def test_the_result_is_an_adapter_folder_that_peft_reads(inputs: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    run = sapo(inputs, tmp_path / "run", max_steps=6)
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(line["skipped"] == 0 for line in run.metrics)
    found = {}
    for name in ("model", "model_ema"):
        files = {file.name for file in (run.folder / name).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "generation_config.json", "README.md"} <= files
        assert {"tokenizer.json", "chat_template.jinja"} <= files
        assert not {"model.safetensors", "config.json"} & files
        base = AutoModelForCausalLM.from_pretrained(inputs["model"])
        found[name] = PeftModel.from_pretrained(base, str(run.folder / name)).eval()
    about = json.loads((run.model / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(inputs["model"])
    assert about["target_modules"] == sorted(about["target_modules"])
    assert "library_name: peft" in (run.model / "README.md").read_text()
    b = {k: sum(p.norm() for n, p in m.named_parameters() if "lora_B" in n) for k, m in found.items()}
    assert 0 < b["model_ema"] < b["model"]  # an average with the start, where B is 0


@pytest.mark.parametrize("name", ["model", "model_ema"])
def test_a_merged_model_gives_the_adapter_s_logits(inputs: dict[str, Path], tmp_path: Path, name: str) -> None:
    from peft import PeftModel

    run = sapo(inputs, tmp_path / "run", max_steps=6)
    source = run.folder if name == "model" else run.folder / name
    words = merge(str(source), tmp_path / "merged")
    assert words == f"{run.folder / name} into {inputs['model']}, in float32: {tmp_path / 'merged'}"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(inputs["model"])
    ids = torch.tensor([[5, 60, 70, 8, 300]])
    with torch.no_grad():
        bare = base(ids).logits
        logits = PeftModel.from_pretrained(base, str(run.folder / name)).eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-5, atol=1e-5)
        assert (logits - bare).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert f"the adapter `{run.folder / name}` is added into its base" in card
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_merge_keeps_the_precision_that_the_base_was_shipped_in(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(inputs["model"], folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    run = sapo(inputs | {"model": folder}, tmp_path / "run", dtype="bfloat16")
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(run.model / "adapter_model.safetensors").values()} == {torch.float32}
    merge(str(run.model), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("start", ["model", "adapter"])
def test_a_resumed_sapo_run_equals_the_unbroken_one_to_the_bit(
    inputs: dict[str, Path], tmp_path: Path, start: str
) -> None:
    keys = {"max_steps": 16, "save_steps": 4, "save_total_limit": 9, "monitor_steps": 6, "learning_rate": 1e-3}
    whole = sapo(inputs, tmp_path / "whole", start, **keys)
    saved = folders.checkpoints(whole.folder / "checkpoints")
    assert [path.name for path in saved] == ["000004", "000008", "000012"]
    size = sum(file.stat().st_size for file in (inputs["model"]).glob("*.safetensors"))
    adapter = (whole.model / "adapter_model.safetensors").stat().st_size
    for role in ("policy", "ema", "reference"):
        assert (saved[0] / f"{role}.0-of-1.safetensors").stat().st_size < adapter + 1000 < size
    for at in ("000004", "000008"):
        broken = tmp_path / at
        shutil.copytree(whole.folder, broken)
        for path in (broken / "model", broken / "model_ema", *folders.checkpoints(broken / "checkpoints")):
            if path.name.startswith("model") or path.name > at:
                shutil.rmtree(path)
        for path in (broken / "rounds").iterdir():
            if int(path.name) > int(at):
                shutil.rmtree(path)
        assert sparring.resume(broken, quiet=True).state == "finished"
        assert_same(state(broken), state(whole.folder))
    assert sparring.resume(whole.folder, quiet=True).message == "it was finished before"


@pytest.mark.slow
def test_a_sapo_run_killed_three_times_ends_as_if_never_stopped(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(test_resume.COMMON, "use_peft", "true")
    given = (inputs["adapter"], inputs["rows"])
    expected = test_resume.unbroken("sapo", given, tmp_path / "whole")
    assert "model/adapter_model.safetensors" in expected
    struck = test_resume.kill_and_resume("sapo", given, tmp_path / "broken", random.Random(11), 3)
    assert struck >= 2
    assert_same(state(tmp_path / "broken"), expected)


def test_a_run_that_begins_anew_draws_the_same_adapter(inputs: dict[str, Path], tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        torch.manual_seed(len(runs))
        before = torch.get_rng_state()
        runs.append(sapo(inputs, tmp_path / name))
        assert torch.equal(before, torch.get_rng_state())
    other = sapo(inputs, tmp_path / "c", seed=7)
    files = [(run.model / "adapter_model.safetensors").read_bytes() for run in (*runs, other)]
    assert files[0] == files[1] != files[2]


def test_dpo_from_an_adapter_starts_at_log_2_and_goes_on_with_its_shape(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    words = ["dpo", "--use_peft", "--model_name_or_path", str(inputs["adapter"]), "--dataset_name"]
    words += [str(inputs["pairs"]), "--output_dir", str(tmp_path / "run"), "--max_steps", "4", "--max_length", "96"]
    words += ["--max_prompt_length", "48", "--learning_rate", "1e-2", "--warmup_ratio", "0", "--lora_alpha", "8"]
    done = started.run(["-m", "sparring", *words])
    assert done.returncode == 0, done.stderr
    assert "LoRA of rank 4, alpha 8, on 6 modules" in " ".join(done.stderr.split())
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]
    about = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (4, 8, str(inputs["model"]))
    done = started.run(["-m", "sparring", "merge", str(tmp_path / "run"), "--output_dir", str(tmp_path / "merged")])
    assert done.returncode == 0, done.stderr
    assert f"merged  {tmp_path / 'run' / 'model'} into {inputs['model']}, in float32" in done.stdout
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_an_adapter_folder_is_loaded_as_its_merged_model(inputs: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    config = ModelConfig(model_name_or_path=str(inputs["adapter"]))
    mine = policy.load_model(config, CPU).eval()
    base = AutoModelForCausalLM.from_pretrained(inputs["model"])
    ids = torch.tensor([[5, 60, 70, 8, 300]])
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, str(inputs["adapter"])).eval()(ids).logits
        torch.testing.assert_close(mine(ids).logits, theirs, rtol=1e-5, atol=1e-5)
    assert policy.load_tokenizer(config).chat_template
    without = tmp_path / "without"  # an adapter alone, as many are published: the rest is the base's
    without.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(inputs["adapter"] / name, without / name)
    config = ModelConfig(model_name_or_path=str(without))
    assert policy.load_chat(config).end_ids == policy.load_chat(ModelConfig(str(inputs["model"]))).end_ids
    # without use_peft all weights learn, and the result is a whole model
    keys = SMALL | {"use_peft": False}
    run = sparring.train(
        sparring.DPO, model_name_or_path=without, dataset_name=inputs["pairs"], output_dir=tmp_path / "run", **keys
    )
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (run.model / "model.safetensors").exists()
    # with it, the run starts from the same model
    other = sparring.train(
        sparring.DPO, model_name_or_path=without, dataset_name=inputs["pairs"], output_dir=tmp_path / "other", **SMALL
    )
    assert other.metrics[0]["logps/chosen"] == pytest.approx(run.metrics[0]["logps/chosen"], rel=1e-5)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_an_adapter_made_elsewhere_goes_on_in_its_own_form(
    inputs: dict[str, Path], tmp_path: Path, more: dict[str, Any]
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(inputs["model"])
    lora = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **more)
    made = get_peft_model(base, lora)
    torch.manual_seed(0)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0.0, 0.3)
    made.save_pretrained(tmp_path / "start")
    run = sapo(inputs | {"start": tmp_path / "start"}, tmp_path / "run", "start", max_steps=6)
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    merge(str(run.model), tmp_path / "merged")
    ids = torch.tensor([[5, 60, 70, 8, 300]])
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits]
        for folder in (run.model, tmp_path / "start"):
            base = AutoModelForCausalLM.from_pretrained(inputs["model"])
            logits.append(PeftModel.from_pretrained(base, str(folder)).eval()(ids).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    assert (logits[1] - logits[2]).abs().max() > 1e-3


def test_a_model_object_carries_an_adapter_too_and_one_that_has_one_is_refused(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    given = AutoModelForCausalLM.from_pretrained(inputs["model"])
    words: dict[str, Any] = {"tokenizer": AutoTokenizer.from_pretrained(inputs["model"]), **SMALL, "save_steps": 2}
    words["train_dataset"] = [json.loads(line) for line in inputs["pairs"].read_text().splitlines()]
    run = sparring.train(sparring.DPO, model=given, output_dir=tmp_path / "run", **words)
    about = json.loads((run.model / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(tmp_path / "run" / "start")
    shutil.rmtree(run.model)
    assert sparring.resume(run.folder, quiet=True).state == "finished"
    assert run.model.exists()
    with pytest.raises(ValueError, match="carries a PEFT adapter"):
        sparring.train(sparring.DPO, model=adapted(given), output_dir=tmp_path / "other", **words)


def test_what_is_wrong_with_an_adapter_is_said_with_the_remedy(inputs: dict[str, Path], tmp_path: Path) -> None:
    def broken(name: str, drop: str = "", rename: str = "", **changes: Any) -> dict[str, Any]:
        folder = tmp_path / name
        shutil.copytree(inputs["adapter"], folder)
        about = json.loads((folder / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(about))
        if drop:
            (folder / drop).unlink()
        if rename:
            (folder / "adapter_model.safetensors").rename(folder / rename)
        return {"model_name_or_path": folder}

    weights = "adapter_model.safetensors"
    another = toy_folder(tmp_path / "another", hidden_size=64)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"use_peft": False, "lora_r": 8}, "lora_r says nothing without use_peft"),
        ({"lora_r": 0}, "lora_r is 0: it must be at least 1"),
        ({"lora_target_modules": "q_proj,v_prj"}, "'v_prj', and the model has no such module; did you mean 'v_proj'"),
        ({"model_name_or_path": inputs["adapter"], "lora_r": 16}, "lora_r is 16, but the adapter .* has 4: leave"),
        ({"model_name_or_path": inputs["adapter"], "lora_alpha": 16}, "lora_alpha is 16, but the adapter .* has 8"),
        (
            {"model_name_or_path": inputs["adapter"], "lora_target_modules": "all-linear"},
            "lora_target_modules is all-linear, but .* has down_proj, q_proj, v_proj",
        ),
        (broken("gone", base_model_name_or_path="/no/such/base"), "no such folder is here: put it back, or write"),
        (broken("nameless", base_model_name_or_path=None), "does not say what it was made on: write"),
        (broken("stacked", base_model_name_or_path=str(inputs["adapter"])), "an adapter itself: merge that one first"),
        (broken("pickled", rename="adapter_model.bin"), "is a pickle, and never read.*save_pretrained"),
        (broken("empty", drop=weights), f"has no {weights}: load it with PEFT"),
        (broken("misfit", base_model_name_or_path=str(another)), "does not fit"),
        (broken("rank", r=8), "does not fit"),
        (broken("more", target_modules=["q_proj", "v_proj", "down_proj", "up_proj"]), "weights without a counterpart"),
        (broken("bias", bias="all"), "has bias 'all', which is not trained here: merge it first"),
        (broken("saved", modules_to_save=["lm_head"]), "has modules_to_save"),
        (broken("pissa", init_lora_weights="pissa"), "has init_lora_weights 'pissa'"),
        (broken("other", peft_type="IA3"), "is of type IA3, and LORA is what is trained here"),
    ]
    for place, (changes, words) in enumerate(cases):
        keys = SMALL | {"model_name_or_path": inputs["model"], "dataset_name": inputs["pairs"]} | changes
        with pytest.raises(ValueError, match=words):
            sparring.train(sparring.DPO, output_dir=tmp_path / f"run{place}", **keys)
        assert not (tmp_path / f"run{place}").exists()
    for wrong in ("more", "rank", "pickled", "empty", "misfit"):  # merged, they do not fit either
        with pytest.raises(ValueError, match=r"does not fit|has no adapter_model|a pickle"):
            merge(str(tmp_path / wrong), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_are_not_adapted_on_one_side(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LoRA on lm_head: this model's input and output embeddings are one tensor"):
        adapted(tiny_llama(tie_word_embeddings=True), lora_target_modules="q_proj,lm_head")
    adapted(tiny_llama(tie_word_embeddings=False), lora_target_modules="q_proj,lm_head")


def test_merge_refuses_what_is_no_adapter_and_a_folder_that_is_not_empty(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is no adapter"):
        merge(str(inputs["model"]), tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: choose a new folder"):
        merge(str(inputs["adapter"]), tmp_path / "taken")
    assert (tmp_path / "taken" / "file").read_text() == "mine"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("method: dpo\n")
    with pytest.raises(ValueError, match="has not ended: `sparring resume"):
        merge(str(tmp_path / "begun"), tmp_path / "out")


def test_muon_takes_all_of_an_adapter() -> None:
    adapted = with_adapter(tiny_llama(), AdapterConfig(use_peft=True, lora_r=4), None, ModelConfig(), 0)
    roles = AdapterRoles(adapted, ema_decay=0.0, reference=True, moving=False, adapted=False, dtype=torch.float32)
    before = [weight.clone() for weight in roles.learnt.parameters()]
    config = TrainingConfig(optim="muon", learning_rate=1e-2, warmup_ratio=0.0)
    learner = Learner(roles, DPO(), config, pad_id=PAD, total_steps=4)
    pairs = [pair([5, 6, 7], [10, 11, 2], [10, 40, 2])]
    losses = [learner.update(pairs, step)["loss"] for step in range(3)]
    assert losses[0] == pytest.approx(math.log(2))
    assert losses[2] < losses[1] < losses[0]
    (optimizer,) = learner.optimizers
    assert isinstance(optimizer, torch.optim.Muon)
    moved = [not torch.equal(a, b) for a, b in zip(before, roles.learnt.parameters(), strict=True)]
    assert all(moved)
