"""A method's page has each of its keys with the default that it has, and each metric that its runs log."""

import dataclasses
import json
import re
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest
from toyrun import toy_folder, write_rows

from sparring.config import resolve
from sparring.keys import read
from sparring.methods import method
from sparring.recipes import read_recipe
from sparring.run import train

PAGES = Path(__file__).parents[1] / "docs" / "methods"
VERIFIER = "def score(prompt, response, row):\n    return len(set(response)) / 30\n"
RUNS: dict[str, dict[str, Any]] = {
    "sppo": {"responses_per_prompt": 3, "nll_weight": 0.1},
    "spin": {},
    "ipr": {"responses_per_prompt": 3, "rounds": 2},
    "tso": {"rounds": 2, "bcr_lambda": 1.0},
    "best_of_k": {"responses_per_prompt": 3, "ranking": "score", "least_score": 0.3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("model") / "model")


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text()


@pytest.mark.parametrize("name", RUNS)
def test_a_page_has_every_key_once_with_its_default(name: str) -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \|", page(name).partition("## Keys")[2].partition("\n## ")[0], re.MULTILINE
    )
    kind = method(name)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f.default for f in dataclasses.fields(kind)}
    assert sorted(key for key, _ in rows) == sorted(fields)
    assert {key: read(key, default.strip("`"), hints[key]) for key, default in rows} == fields


@pytest.mark.parametrize("name", RUNS)
def test_a_page_has_every_metric_that_a_run_logs(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "check.py").write_text(VERIFIER)
    judge = {} if name == "spin" else {"judge": "verifier", "verifier": f"{tmp_path}/check.py:score"}
    run = train(
        resolve(method(name), {"rounds": 1} | RUNS[name]).method,
        model_name_or_path=str(model),
        dataset_name=str(write_rows(tmp_path / "rows.jsonl", 8)),
        output_dir=tmp_path / "run",
        quiet=True,
        max_length=64,
        max_prompt_length=32,
        per_device_train_batch_size=4,
        judge_cache=False,
        **judge,
    )
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    logged = {key for line in lines for key in line} - {"alarms"}
    table = page(name).partition("## Metrics")[2].partition("\n## ")[0]
    cells = " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))
    known = set(re.findall(r"`([\w/]+)`", cells)) | {f"pairs/dropped{rest}" for rest in re.findall(r"`(_\w+)`", cells)}
    missing = {key for key in logged if key not in known and not (key.startswith("diversity/") and name == "tso")}
    assert not missing
    assert len(logged) > 15


@pytest.mark.parametrize("name", ["sppo", "spin", "ipr", "tso", "best_of_k", "sapo", "offline"])
def test_the_commands_of_a_page_have_keys_that_exist(name: str) -> None:
    for line in re.findall(r"^(?:    )?sparring (\w+ .*)$", page(name), re.MULTILINE):
        command, *words = shlex.split(line.replace("$R", "").replace("$J", "").replace("$C", ""))
        try:
            kind = method(command)
        except ValueError:
            continue  # no method's command
        given = dict(zip(words[::2], words[1::2], strict=True))
        recipe = read_recipe(given.pop("--config")) if "--config" in given else {}
        assert recipe.pop("method", command) == command
        resolve(kind, recipe, {key.removeprefix("--"): value for key, value in given.items()})
