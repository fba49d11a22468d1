"""Configuration: who overrides whom, and what is said of a wrong key or value."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sparring.config import PARTS, keys_of, resolve
from sparring.methods import METHODS, method
from sparring.methods.sapo import SAPO
from sparring.recipes import read_recipe

SRC = Path(__file__).parents[1] / "src" / "sparring"


def test_flags_override_the_recipe_which_overrides_the_method_which_overrides_the_parts() -> None:
    config = resolve(SAPO, {"seed": 7, "learning_rate": "2e-6"}, {"learning_rate": "5e-7"})
    assert config.training.learning_rate == 5e-7
    assert config.run.seed == 7
    assert config.training.optim == "rmsprop"  # the method's
    assert config.training.weight_decay == 0.0  # the part's
    assert resolve(SAPO(beta=0.3), {"segment_tokens": 9}).method == SAPO(beta=0.3, segment_tokens=9)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"segment_token": 3}, "unknown key 'segment_token' for sapo; did you mean 'segment_tokens'?"),
        ({"top_p": 1.5}, "top_p is 1.5: it must be at most 1"),
        ({"ema_decay": 1}, "ema_decay is 1.0: it must be below 1"),
        ({"beta": "nan"}, "beta is nan"),
        ({"optim": "adamw"}, "it must be one of adamw_torch,"),
        ({"max_steps": "3.5"}, "max_steps is '3.5': it must be int"),
        ({"trust_remote_code": "perhaps"}, "it must be bool"),
        ({"column_map": "question"}, "write it as prompt=question,completion=answer"),
        ({"max_steps": True}, "max_steps is True"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_remedy(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        resolve(SAPO, keys)


def test_text_is_read_as_the_key_s_type() -> None:
    config = resolve(
        SAPO,
        {"column_map": "prompt=question,completion=answer", "beta": "none", "max_steps": "1e3", "overlong": "drop"},
    )
    assert config.data.column_map == {"prompt": "question", "completion": "answer"}
    assert config.method.beta is None
    assert config.training.max_steps == 1000
    assert isinstance(config.training.max_steps, int)


def test_what_was_resolved_resolves_to_itself_from_yaml() -> None:
    import yaml

    config = resolve(SAPO, {"column_map": "prompt=q,completion=a", "learning_rate": 5e-7})
    keys = yaml.safe_load(yaml.safe_dump(config.flat()))
    assert keys.pop("method") == "sapo"
    assert resolve(SAPO, keys) == config


@pytest.mark.parametrize("name", METHODS)
def test_every_key_belongs_to_one_part_and_is_read_somewhere(name: str) -> None:
    kind = method(name)
    keys = keys_of(kind)  # asserts that no key has two parts
    code = "\n".join(path.read_text() for path in SRC.rglob("*.py"))
    unread = [key for key in keys if not re.search(rf"\.{key}\b", code)]
    assert unread == []
    assert len(keys) == sum(len(fields(part)) for part in (kind, *PARTS.values()))


def test_a_recipe_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    for name, words in (("list", "holds no keys"), ("bad", "is not YAML"), ("none", "no recipe")):
        with pytest.raises(ValueError, match=words):
            read_recipe(tmp_path / f"{name}.yaml")
