"""Recipes: every key is known, every file says where its values come from, and published values are the published ones."""

import re
from pathlib import Path
from typing import Any

import pytest

from sparring.config import Config, resolve
from sparring.methods import method
from sparring.recipes import read_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
PUBLISHED = [path for path in RECIPES if not path.stem.startswith("demo_")]

# SAPO's values as its authors' code has them; buffer_size is 2000 on each of 8 processes. ema_every is quoted by reviewers.
SAPO: dict[str, Any] = {
    "segment_tokens": 256,
    "regenerate": "segment",
    "score": "response",
    "ema_decay": 0.5,
    "ema_every": 2,
    "buffer_size": 8 * 2000,
    "generate_every": 1,
    "generate_ahead": 1,
    "responses_per_prompt": 1,
    "temperature": 0.7,
    "top_p": 0.95,
    "top_k": 50,
    "num_train_epochs": 4,
    "batch": 64,
    "max_length": 2048,
    "max_prompt_length": 1792,
    "dtype": "bfloat16",
    "seed": 42,
    "dataset_name": "argilla/distilabel-capybara-dpo-7k-binarized",
}
SAPO_DPO = SAPO | {
    "loss_type": "dpo",
    "beta": 0.1,
    "reference": "ema",
    "reference_every": 108,
    "learning_rate": 5e-7,
    "optim": "rmsprop",
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.1,
}
SAPO_ORPO = SAPO | {
    "loss_type": "orpo",
    "beta": 0.05,
    "odds_floor": 0.0,
    "learning_rate": 5e-6,
    "optim": "adamw_8bit",
    "lr_scheduler_type": "inverse_sqrt",
    "warmup_steps": 100,
}
LLAMA, MISTRAL = "meta-llama/Meta-Llama-3-8B", "mistralai/Mistral-7B-v0.1"
SAPO_ORPO_LLAMA = SAPO_ORPO | {"model_name_or_path": LLAMA, "chat_template_path": "chatml"}
# SPPO's values as paper and authors' code agree on them; temperature and top_p are the paper's.
SPPO: dict[str, Any] = {
    "model_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
    "loss_type": "sppo",
    "beta": 0.001,
    "train_on": "best_and_worst",
    "responses_per_prompt": 5,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 2048,
    "ranking": "round_robin",
    "comparisons_per_response": None,
    "judge": "pairrm",
    "rounds": 3,
    "prompts_per_round": None,
    "reference": "policy",
    "fresh_optimizer": True,
    "learning_rate": 5e-7,
    "optim": "rmsprop",
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.1,
    "num_train_epochs": 1,
    "max_grad_norm": 1.0,
    "batch": 64,
    "max_length": 1024,
    "max_prompt_length": 512,
    "seed": 42,
}
ITERATIVE = {key: value for key, value in SPPO.items() if key not in ("loss_type", "beta", "train_on")} | {
    "beta": 0.1,
    "bcr_lambda": 0.0,
    "rejected": "last",
}
# IPR on SimPO's public recipe for responses; the paper's own values are not known.
IPR: dict[str, Any] = {
    "responses_per_prompt": 5,
    "temperature": 0.8,
    "top_p": 0.95,
    "max_new_tokens": 4096,
    "ranking": "winner_stays",
    "rejected": "last",
    "judge_orders": "both",
    "reference": "initial",
    "rounds": 1,
    "bcr_form": "hinge",
    "bcr_place": "outside",
    "bcr_on": "token_mean",
    "batch": 128,
    "max_length": 2048,
}
# Baselines of a paper that is not the method's own.
PAPERS = {"iterative_dpo": "2405.00675", "iterative_ipo": "2405.00675"}
SETTINGS: dict[str, dict[str, Any]] = {
    "sapo_dpo_llama3_8b": SAPO_DPO,
    "sapo_dpo_mistral_7b": SAPO_DPO | {"model_name_or_path": "wandb/mistral-7b-zephyr-sft"},
    "sapo_orpo_llama3_8b": SAPO_ORPO_LLAMA,
    "sapo_orpo_mistral_7b": SAPO_ORPO | {"model_name_or_path": MISTRAL},
    "sapo_no_segment": SAPO_ORPO_LLAMA | {"regenerate": "response"},
    "sapo_on_policy": SAPO_ORPO_LLAMA | {"regenerate": "response", "ema_decay": 0, "buffer_size": 0},
    "sft_llama3_8b_deita": {
        "model_name_or_path": LLAMA,
        "dataset_name": "HuggingFaceH4/deita-10k-v0-sft",
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 3,
        "batch": 128,
        "max_length": 2048,
    },
    "sppo_mistral_7b": SPPO,
    "sppo_mistral_7b_code": SPPO | {"temperature": 0.7, "top_p": 0.9},
    "sppo_llama3_8b": SPPO | {"model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct"},
    "iterative_dpo": ITERATIVE | {"loss_type": "dpo"},
    "iterative_ipo": ITERATIVE | {"loss_type": "ipo"},
    "best_of_5": {key: SPPO[key] for key in ("responses_per_prompt", "temperature", "top_p", "judge", "batch")}
    | {"rounds": 1},
    "spin_zephyr_7b": {
        "model_name_or_path": "alignment-handbook/zephyr-7b-sft-full",
        "max_samples": 50_000,
        "rounds": 4,
        "rounds_kept": 2,
        "prompts_per_round": None,
        "max_new_tokens": 256,
        "beta_per_round": [0.1, 0.1, 0.1, 5.0],
        "learning_rate_per_round": [5e-7, 5e-7, 1e-7, 1e-7],
        "optim": "rmsprop",
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.1,
        "num_train_epochs": 2,
        "batch": 64,
        "max_length": 1024,
        "max_prompt_length": 512,
        "fresh_optimizer": True,
    },
    "ipr_simpo_llama3_8b": IPR | {"loss_type": "simpo", "beta": 2.5, "gamma": 0.55 * 2.5, "learning_rate": 1e-6},
    "ipr_dpo_bcr": IPR | {"loss_type": "dpo", "beta": 0.1},
    "tso_llama3_8b": {
        "positives": ["human", "policy"],
        "negatives": ["policy", "previous", "start"],
        "clip_form": "rewards",
        "clip_chosen": 5.0,
        "clip_rejected": 5.0,
        "judge": "policy",
        "reference": "policy",
    },
    "simpo_llama3_8b_instruct": {
        "beta": 2.5,
        "gamma": 0.55 * 2.5,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1,
        "batch": 128,
        "max_length": 2048,
    },
}
UNUSED = {"segment_tokens", "ema_every"}  # where the whole response is regenerated


def resolved(path: Path) -> Config:
    keys = read_recipe(path)
    return resolve(method(keys.pop("method")), keys)


def header(path: Path) -> str:
    lines = path.read_text("utf-8").splitlines()
    return " ".join(
        line.removeprefix("#").strip() for line in lines[: next(i for i, s in enumerate(lines) if s[:1] != "#")]
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves(path: Path) -> None:
    assert resolved(path).training.batch_size > 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_header_names_the_paper_or_says_that_there_is_none(path: Path) -> None:
    about, kind = header(path), resolved(path).method
    named = re.findall(r"arXiv (\d{4}\.\d{5})", about)
    assert named or "No paper:" in about
    if named and kind.name != "sft":
        assert named == [PAPERS.get(path.stem, kind.paper)]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_recipe_says_where_its_values_are_from_and_what_it_should_give(path: Path) -> None:
    about = header(path)
    assert re.search(
        r"values from the authors' code|Values: (the authors' code|the paper|a reconstruction|ours)", about
    )
    assert "It should give: " in about


@pytest.mark.parametrize("name", SETTINGS)
def test_published_values_are_the_published_ones(name: str) -> None:
    config = resolved(next(path for path in RECIPES if path.stem == name))
    have = config.flat() | {"batch": config.training.batch_size}
    skipped = UNUSED if have.get("regenerate") == "response" else set()
    wanted = {key: value for key, value in SETTINGS[name].items() if key not in skipped}
    assert {key: have[key] for key, value in wanted.items() if have[key] != pytest.approx(value)} == {}


def test_every_published_recipe_stands_in_the_table() -> None:
    assert {path.stem for path in PUBLISHED} == set(SETTINGS)


def test_a_published_recipe_writes_out_what_it_rests_on() -> None:
    for path in PUBLISHED:
        keys = read_recipe(path)
        given = {"learning_rate", "optim", "lr_scheduler_type", "num_train_epochs", "max_length", "seed"}
        assert given <= set(keys), path.stem
