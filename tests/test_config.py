"""Configuration: who overrides whom, and what is said of a wrong key or value."""

import ast
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sparring.config import PARTS, keys_of, resolve
from sparring.keys import BOUNDS
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


OWN = [(method(name), f) for name in METHODS for f in fields(method(name))]
SHARED = [(SAPO, f) for part in PARTS.values() for f in fields(part)]
BOUNDED = [(kind, f) for kind, f in OWN + SHARED if any(f.metadata[bound] is not None for bound in BOUNDS)]


def outside(about: Any) -> list[tuple[float, float, str]]:
    """Values just outside a key's bounds, with the bound and the words that name it."""
    wrong = {"above": 0, "least": -1, "most": 1, "below": 0}
    return [(about[b] + wrong[b], about[b], words) for b, (_, words) in BOUNDS.items() if about[b] is not None]


@pytest.mark.parametrize(("kind", "field"), BOUNDED, ids=[f"{kind.name}-{f.name}" for kind, f in BOUNDED])
def test_a_value_outside_its_range_is_shown_with_the_bound_and_what_the_key_means(kind: Any, field: Any) -> None:
    name = field.name
    for value, bound, words in outside(field.metadata):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            resolve(kind, {name: value})
        text = str(caught.value)
        assert text.startswith(f"{name} is {value}")
        assert f"it must be {words} {bound}. {field.metadata['help']}" in text


def test_a_choice_that_is_not_offered_is_shown_with_all_that_are_and_the_nearest() -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        resolve(SAPO, {"lr_scheduler_type": "cosin"})
    text = str(caught.value)
    assert "lr_scheduler_type is 'cosin'" in text
    assert "linear, cosine, constant, constant_with_warmup, inverse_sqrt" in text
    assert "did you mean 'cosine'?" in text


def test_an_unknown_key_that_is_near_to_nothing_is_named_without_a_guess() -> None:
    with pytest.raises(ValueError, match=r"^unknown key 'zzzz' for sapo$"):
        resolve(SAPO, {"zzzz": 1})


def test_a_recipe_s_5e_7_is_text_to_yaml_and_a_number_to_us(tmp_path: Path) -> None:
    (tmp_path / "fast.yaml").write_text("learning_rate: 5e-7\nsave_steps: 1e2\nmax_samples: none\n")
    config = resolve(SAPO, {"learning_rate": "5e-7", "save_steps": "1e2", "max_samples": "none"})
    assert (config.training.learning_rate, config.run.save_steps, config.data.max_samples) == (5e-7, 100, None)
    import yaml

    keys = yaml.safe_load((tmp_path / "fast.yaml").read_text())
    assert keys["learning_rate"] == "5e-7"  # YAML 1.1 wants 5.0e-7
    assert resolve(SAPO, keys) == config


def test_several_values_are_read_from_text_a_list_and_one_alone() -> None:
    spin, tso = method("spin"), method("tso")
    for given in ("0.1,0.1,5", "0.1, 0.1 ,5e0", [0.1, "0.1", 5], (0.1, 0.1, 5.0)):
        assert resolve(spin, {"beta_per_round": given}).method.beta_per_round == (0.1, 0.1, 5.0)
    for given in (5, "5", [5]):
        assert resolve(spin, {"beta_per_round": given}).method.beta_per_round == (5.0,)
    assert resolve(spin, {"beta_per_round": "none"}).method.beta_per_round is None
    assert resolve(tso, {"positives": "human, policy*2"}).method.positives == ("human", "policy*2")
    assert resolve(tso, {"clip_chosen": "inf"}).method.clip_chosen == math.inf
    import yaml

    config = resolve(tso, {"positives": "policy", "clip_rejected": "inf", "beta_per_round": "0.1,0.5"})
    keys = yaml.safe_load(yaml.safe_dump(config.flat()))
    assert keys.pop("method") == "tso"
    assert resolve(tso, keys) == config


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("positives", "human,", "positives is 'human,': it must be str,..."),
        ("positives", "", "positives is '': it must be str,..."),
        ("positives", [], "positives is []: it must be str,..."),
        ("beta_per_round", "0.1,x", "beta_per_round is 'x': it must be float"),
        ("beta_per_round", "0.1,,5", "beta_per_round is '0.1,,5': it must be float,..."),
        ("beta_per_round", "0.1,0", "beta_per_round is 0.0: it must be above 0"),
        ("beta_per_round", "0.1,inf", "beta_per_round is inf: give a finite number"),
        ("beta_per_round", [0.1, True], "beta_per_round is True: it must be float"),
    ],
)
def test_one_wrong_value_of_several_is_named(name: str, given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        resolve(method("tso"), {name: given})


def test_a_column_map_is_read_from_text_with_spaces_and_from_a_mapping() -> None:
    expected = {"prompt": "question", "completion": "answer"}
    for given in ("prompt=question, completion=answer", expected, {"prompt": "question", "completion": "answer"}):
        assert resolve(SAPO, {"column_map": given}).data.column_map == expected
    for wrong in ("prompt=", "=question", "prompt=question,,"):
        with pytest.raises(ValueError, match="write it as prompt=question,completion=answer"):
            resolve(SAPO, {"column_map": wrong})


def test_only_the_parts_that_a_command_has_may_be_given() -> None:
    with pytest.raises(ValueError, match="unknown key 'seed'"):
        resolve(SAPO, {"seed": 1}, parts=("training",))


@pytest.mark.parametrize("name", METHODS)
def test_every_key_is_read_by_code_and_not_only_named_in_prose(name: str) -> None:
    read: set[str] = set()
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    assert keys_of(method(name)).keys() - read == set()


@pytest.mark.parametrize("given", [{"segment_tokens": "12"}, {"segment_tokens": 12.0}])
def test_a_method_instance_s_values_are_read_as_their_types_like_any_other(given: dict[str, Any]) -> None:
    value = resolve(SAPO(**given)).method.segment_tokens
    assert value == 12
    assert isinstance(value, int)
