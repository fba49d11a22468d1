"""A whole run from Python: what it writes, and what it refuses before any time is spent."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from toyrun import counting, toy_folder, write_lines, write_pairs, write_rows
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertModel,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import sparring
from sparring.data import parquet
from sparring.model.policy import pick_device
from sparring.records import Pair

SMALL: dict[str, Any] = {
    "max_length": 96,
    "max_prompt_length": 48,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "quiet": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 30)


def test_a_device_that_is_not_here_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_device(name).index for name in ("cuda", "cuda:1")] == [None, 1]
    with pytest.raises(ValueError, match=r"device is 'cuda:7', and there are 2, numbered from 0: use cuda:1"):
        pick_device("cuda:7")
    with pytest.raises(ValueError, match=r"device is 'gpu', and no device is called so: use auto, cpu, cuda or cuda:1"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"sees no CUDA device here: use --device cpu"):
        pick_device("cuda:1")


def test_sapo_leaves_an_ordinary_folder_that_says_where_it_comes_from(model: Path, rows: Path, tmp_path: Path) -> None:
    method = sparring.SAPO(segment_tokens=6, beta=0.2, reference_every=2)
    run = sparring.train(method, model_name_or_path=model, dataset_name=rows, output_dir=tmp_path / "run", **SMALL)
    assert {file.name for file in (run.folder / "rounds/00000").iterdir()} == {"responses.parquet", "pairs.parquet"}
    start = AutoModelForCausalLM.from_pretrained(model)
    result = AutoModelForCausalLM.from_pretrained(run.model)
    average = AutoModelForCausalLM.from_pretrained(run.folder / "model_ema")
    weights = [m.get_input_embeddings().weight for m in (start, average, result)]
    assert not torch.equal(weights[0], weights[2])
    # b = 0.5 and two EMA steps: the average lies between the start and the policy.
    assert 0 < (weights[1] - weights[0]).norm() < (weights[2] - weights[0]).norm()
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(model).chat_template
    assert result.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    card = (run.model / "README.md").read_text()
    for words in (
        "2405.20830",
        str(model),
        "Initialised from",
        "the EMA of the policy",
        str(rows),
        "torch 2",
        "segment_tokens: 6",
    ):
        assert words in card
    keys = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert (keys["beta"], keys["method"], keys["optim"], keys["versions"]["torch"]) == (
        0.2,
        "sapo",
        "rmsprop",
        metadata.version("torch"),
    )
    steps = [line["step"] for line in run.metrics]
    assert steps == [1, 2, 3, 4]
    pairs = list(parquet.read(run.folder / "rounds" / "00003" / "pairs.parquet", Pair))
    assert {pair.round for pair in pairs} == {3}
    assert {pair.rejected.source for pair in pairs if pair.rejected} == {"ema@3"}


def test_the_result_is_saved_in_the_start_s_precision_after_training_in_float32(rows: Path, tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    run = sparring.train(
        sparring.SFT, model_name_or_path=folder, dataset_name=rows, output_dir=tmp_path / "run", save_steps=2, **SMALL
    )
    assert AutoModelForCausalLM.from_pretrained(run.model, dtype="auto").dtype == torch.bfloat16
    from safetensors.torch import load_file

    saved = load_file(run.folder / "checkpoints" / "000002" / "policy.0-of-1.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_objects_train_as_their_files_would(model: Path, rows: Path, tmp_path: Path) -> None:
    by_name = sparring.train(
        sparring.SFT, model_name_or_path=model, dataset_name=rows, output_dir=tmp_path / "a", **SMALL
    )
    table = [json.loads(line) for line in rows.read_text().splitlines()]
    objects = {"model": AutoModelForCausalLM.from_pretrained(model), "tokenizer": AutoTokenizer.from_pretrained(model)}
    before = objects["model"].get_input_embeddings().weight.clone()
    for name, given in (("b", table), ("c", datasets.Dataset.from_list(table))):
        run = sparring.train(sparring.SFT, **objects, train_dataset=given, output_dir=tmp_path / name, **SMALL)
        assert (run.model / "model.safetensors").read_bytes() == (by_name.model / "model.safetensors").read_bytes()
    assert torch.equal(before, objects["model"].get_input_embeddings().weight)


def test_an_object_and_a_name_for_the_same_are_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    given = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    keys = SMALL | {
        "dataset_name": rows,
        "output_dir": tmp_path / "run",
        "tokenizer": AutoTokenizer.from_pretrained(model),
    }
    with pytest.raises(ValueError, match=r"model and model_name_or_path are both given: .* leave one of them out"):
        sparring.train(sparring.SFT, model=given, model_name_or_path=model, **keys)
    with pytest.raises(ValueError, match="train_dataset and dataset_name are both given"):
        sparring.train(sparring.SFT, model=given, train_dataset=[], **keys)
    with pytest.raises(
        ValueError, match=r"is sdpa, and the model object attends by eager: .*set_attn_implementation\('sdpa'\)"
    ):
        sparring.train(sparring.SFT, model=given, attn_implementation="sdpa", **keys)
    assert not (tmp_path / "run").exists()


def test_sft_learns_to_count(model: Path, rows: Path, tmp_path: Path) -> None:
    keys = SMALL | {"max_steps": 60, "learning_rate": 1e-2}
    run = sparring.train(sparring.SFT, model_name_or_path=model, dataset_name=rows, output_dir=tmp_path / "run", **keys)
    assert run.metrics[-1]["loss"] < 0.3 * run.metrics[0]["loss"]


@pytest.mark.parametrize(
    "kind", [sparring.DPO, sparring.IPO, sparring.Hinge, sparring.ORPO, sparring.SimPO, sparring.KTO, sparring.DPOP]
)
def test_every_offline_loss_widens_the_margin_on_given_pairs(kind: type, model: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 30)
    keys = SMALL | {"max_steps": 12, "warmup_ratio": 0.0}
    run = sparring.train(kind, model_name_or_path=model, dataset_name=pairs, output_dir=tmp_path / "run", **keys)
    margins = [line["rewards/margins"] for line in run.metrics]
    assert margins[-1] > margins[0] + 0.01


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_name": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"column_map": {"prompt": "promt"}}, "no column 'promt'; did you mean 'prompt'"),
        ({"learning_rte": 1}, "did you mean 'learning_rate'"),
        ({"beta": -1}, "must be above 0"),
        ({"segment_tokens": 0}, "at least 1"),
        ({"max_steps": "many"}, "must be int"),
        ({"output_dir": ""}, "output_dir is missing"),
        ({"model_name_or_path": "/no/such/model"}, "no folder /no/such/model"),
        ({"device": "cuda:7"}, "(no CUDA device here|numbered from 0): use "),
        ({"report_to": "wandb"}, "pip install 'sparring\\[wandb\\]'"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_written(
    changes: dict[str, Any], words: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    keys = SMALL | {"model_name_or_path": model, "dataset_name": rows, "output_dir": tmp_path / "run"} | changes
    with pytest.raises(ValueError, match=words):
        sparring.train(sparring.SAPO, **keys)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_another_configuration_is_refused_with_the_difference(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    keys = SMALL | {"model_name_or_path": model, "dataset_name": rows, "output_dir": tmp_path / "run"}
    sparring.train(sparring.SFT, **keys)
    with pytest.raises(ValueError, match=r"another configuration: learning_rate \(0.001, now 0.01\)"):
        sparring.train(sparring.SFT, **(keys | {"learning_rate": 0.01}))
    with pytest.raises(ValueError, match=r"another configuration: device \('auto', now 'cpu'\)"):
        sparring.train(sparring.SFT, **(keys | {"device": "cpu"}))
    with pytest.raises(ValueError, match="sparring resume"):
        sparring.train(sparring.SFT, **keys)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        sparring.train(sparring.SFT, **(keys | {"output_dir": tmp_path / "other"}))


@pytest.mark.parametrize("kind", [BertModel, T5ForConditionalGeneration, LlamaModel])
def test_a_model_that_is_no_causal_language_model_is_refused(kind: Any, rows: Path, tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 16,
        "vocab_size": 400,
    }
    config = (
        T5Config(d_model=16, d_ff=16, num_layers=1)
        if kind is T5ForConditionalGeneration
        else kind.config_class(**small)
    )
    kind(config).save_pretrained(folder)
    with pytest.raises(ValueError, match="no causal language model"):
        sparring.train(sparring.SFT, model_name_or_path=folder, dataset_name=rows, output_dir=tmp_path / "run", **SMALL)


def test_pickled_weights_are_never_read(rows: Path, tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "model")
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are never read"):
        sparring.train(sparring.SFT, model_name_or_path=folder, dataset_name=rows, output_dir=tmp_path / "run", **SMALL)


def test_a_vocabulary_that_does_not_match_is_refused(rows: Path, tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"tokens and the model .* embeddings"):
        sparring.train(sparring.SFT, model_name_or_path=folder, dataset_name=rows, output_dir=tmp_path / "run", **SMALL)


def test_a_sequence_longer_than_the_model_reads_is_refused(rows: Path, tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "model", max_position_embeddings=16)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        sparring.train(sparring.SFT, model_name_or_path=folder, dataset_name=rows, output_dir=tmp_path / "run", **SMALL)


def test_resume_refuses_data_that_changed(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 20)
    keys = SMALL | {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": tmp_path / "run",
        "on_alarm": "stop",
    }
    # An alarm stops it at once: every update is further from the start than this.
    run = sparring.train(sparring.SFT, **keys, monitor_steps=1, max_kl=1e-12)
    assert run.state == "stopped"
    write_lines(data, [{"prompt": row["prompt"], "completion": "no"} for row in counting(20)])
    with pytest.raises(ValueError, match=r"the data of .* changed since the run began"):
        sparring.resume(tmp_path / "run", quiet=True)


def test_an_alarm_rolls_back_and_halves_the_learning_rate(model: Path, rows: Path, tmp_path: Path) -> None:
    keys = SMALL | {"max_steps": 12, "learning_rate": 3e-2, "warmup_ratio": 0.0, "lr_scheduler_type": "constant"}
    run = sparring.train(
        sparring.SFT,
        model_name_or_path=model,
        dataset_name=rows,
        output_dir=tmp_path / "run",
        on_alarm="rollback",
        monitor_steps=1,
        max_kl=2.0,
        save_steps=1,
        **keys,
    )
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    back = [line for line in lines if "rolled_back_from" in line]
    assert back
    assert [line["rate_scale"] for line in back] == [0.5**n for n in range(1, 1 + len(back))]  # none is forgotten
    assert all(line["step"] < line["rolled_back_from"] for line in back)  # not to what raised the alarm
    after = next(line for line in run.metrics if line["step"] == back[-1]["step"] + 1)
    assert after["learning_rate"] == pytest.approx(0.03 * back[-1]["rate_scale"])


def test_a_model_that_yields_only_nan_is_an_alarm_and_keeps_its_weights(rows: Path, tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "model")
    broken = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    broken.save_pretrained(folder)
    run = sparring.train(
        sparring.SFT,
        model_name_or_path=folder,
        dataset_name=rows,
        output_dir=tmp_path / "run",
        on_alarm="stop",
        **SMALL,
    )
    assert run.state == "stopped"
    assert "not finite" in run.message


def test_a_rollback_without_a_checkpoint_is_a_stop(model: Path, rows: Path, tmp_path: Path) -> None:
    keys = SMALL | {"model_name_or_path": model, "dataset_name": rows, "output_dir": tmp_path / "run"}
    run = sparring.train(sparring.SFT, **keys, on_alarm="rollback", monitor_steps=1, max_kl=1e-12)
    assert run.state == "stopped"
    assert "from its start" in run.message


def test_the_bar_of_a_run_counts_its_updates_and_not_what_is_written_within(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparring.progress._Lines.EVERY", 0.0)
    keys = SMALL | {"quiet": False, "max_steps": 3}
    sparring.train(sparring.SAPO, model_name_or_path=model, dataset_name=rows, output_dir=tmp_path / "run", **keys)
    shown = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("sapo ")]
    assert list(dict.fromkeys(shown)) == ["1/3", "2/3", "3/3"]
