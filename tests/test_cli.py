"""The command line: help that explains every key, errors that name the remedy, commands that show what is there."""

import json
from pathlib import Path
from typing import Any

import pytest
from toyrun import toy_folder, write_rows

import sparring
from sparring.cli import flags, main
from sparring.config import keys_of
from sparring.methods import METHODS, method
from sparring.recipes import ABOUT


def test_help_of_every_method_gives_each_key_with_its_default(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for name in METHODS:
        assert main([name, "--help"]) == 0
        out = capsys.readouterr().out
        for key, (field, _) in keys_of(method(name)).items():
            assert f"--{key}" in out
            assert field.metadata["help"].split(":")[0][:40] in " ".join(out.split())
    assert "(2405.20830)" not in out
    main(["sapo", "--help"])
    out = capsys.readouterr().out
    assert "2405.20830" in out
    assert "(rmsprop)" in out  # the paper's optimizer, not the trainer's default


def test_the_overview_names_every_command_and_tells_the_two_sapos_apart(capsys: Any) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for name in (*METHODS, "plan", "demo", "resume", "status", "inspect", "doctor", "init-model", "evaluate"):
        assert f"  {name} " in out
    assert "2511.20347" in out


def test_titles_in_the_overview_are_those_of_the_methods() -> None:
    for name, (_, _, about) in METHODS.items():
        kind: Any = method(name)
        assert kind.name == name
        assert name in ("sft", "best_of_k") or kind.paper in about


def test_flags_are_read_in_the_three_ways_people_write_them() -> None:
    words = ["--beta", "0.2", "--max-steps=5", "--gradient_checkpointing", "--dtype", "bfloat16"]
    assert flags(words) == {"beta": "0.2", "max_steps": "5", "gradient_checkpointing": True, "dtype": "bfloat16"}
    assert flags(["--learning_rate", "-1"]) == {"learning_rate": "-1"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["spao"], "did you mean 'sppo'?"),
        (["sapo", "--bet", "1"], "did you mean 'beta'?"),
        (["sapo", "--beta", "1", "--beta", "2"], "given twice"),
        (["sapo", "beta"], "stands alone"),
        (["sapo", "--config", "sapo_dpo_lama3_8b"], "no recipe"),
        (["dpo", "--config", "demo_sapo_dpo"], "the recipe is for sapo"),
        (["resume", "nowhere"], "no run directory"),
        (["status", "nowhere"], "no run directory"),
        (["sapo", "--model", "x"], "unknown key 'model'"),
        (["evaluate", "--verifier", "x.py:score", "--model_name_or_path", "y"], "no file x.py"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(words: list[str], said: str, capsys: Any) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_a_recipe_is_overridden_by_flags_and_a_run_can_be_looked_at(tmp_path: Path, capsys: Any) -> None:
    model, rows = toy_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 20)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "method: sapo\nbeta: 0.3\nsegment_tokens: 5\nlearning_rate: 1e-3\nmax_length: 96\nmax_prompt_length: 48\n"
    )
    run = tmp_path / "run"
    words = [
        "--model_name_or_path",
        str(model),
        "--dataset_name",
        str(rows),
        "--output_dir",
        str(run),
        "--max_steps",
        "3",
    ]
    assert main(["sapo", "--config", str(recipe), "--beta", "0.4", *words]) == 0
    assert f"{run}/model" in capsys.readouterr().out.replace("\n", "")
    import yaml

    keys = yaml.safe_load((run / "config.yaml").read_text())
    assert (keys["beta"], keys["segment_tokens"], keys["learning_rate"]) == (0.4, 5, 0.001)
    assert main(["status", str(run)]) == 0
    out = capsys.readouterr().out
    assert "3 of 3 updates" in out
    assert "rewards/margins" in out
    assert main(["inspect", str(run), "--round", "0", "--count", "1"]) == 0
    assert "ema@0" in capsys.readouterr().out
    assert main(["inspect", str(run), "--round", "9"]) == 2
    assert "it has 0 to 2" in capsys.readouterr().err
    assert sparring.resume(run, quiet=True).state == "finished"
    # A run's keys are a recipe, without what else the run wrote down.
    again = tmp_path / "again"
    assert main(["sapo", "--config", str(run / "config.yaml"), "--output_dir", str(again)]) == 0
    assert (again / "model" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    about = set(keys) - set(keys_of(sparring.SAPO)) - {"method"}
    assert {"versions", "start_fingerprint", "data_fingerprint"} <= about <= set(ABOUT)
    recipe.write_text("method: sapo\nchanges: 3\n")
    assert main(["sapo", "--config", str(recipe)]) == 2
    assert "unknown key 'changes'" in capsys.readouterr().err


def test_a_dead_run_is_called_interrupted_and_names_its_resume(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.yaml").write_text("method: sapo\n")
    dead = {"state": "running", "step": 7, "total_steps": 20, "pid": 2**22 + 12345, "message": ""}
    (tmp_path / "status.json").write_text(json.dumps(dead))
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 0.5, "alarms": ["too far"]}\n{"step": 8, "lo')
    assert main(["status", str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "interrupted" in out
    assert "sparring resume" in out
    assert "7 of 20 updates" in out
    assert "too far" in out
