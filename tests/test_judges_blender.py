"""PairRM in LLM-Blender's own form: it answers as the published class does, and a folder that lacks a part says which."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pairrm_tiny
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import BertConfig, PreTrainedTokenizerFast

from sparring.judges.pairrm import PairRanker, PairRM
from sparring.methods.base import Comparison
from sparring.records import Prompt, Response, tokens

MARKS = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]


def own(folder: Path, limits: tuple[int, int] = pairrm_tiny.LIMITS[0], **changes: Any) -> str:
    """A folder as the package's trainer writes it, but for ``changes`` in its config.json; its base lies in it."""
    pairrm_tiny.base().save_pretrained(folder / "base")
    tokenizer = pairrm_tiny.tokenizer()
    tokenizer.add_tokens(MARKS)
    tokenizer.save_pretrained(folder)
    weights = pairrm_tiny.fill(PairRanker(pairrm_tiny.config())).state_dict()
    save_file(weights, folder / "model.safetensors")  # without metadata
    rewrite(folder, **(pairrm_tiny.stated(str(folder / "base"), limits) | changes))
    return str(folder)


def rewrite(folder: Path, **stated: Any) -> None:
    (folder / "config.json").write_text(json.dumps(stated))


def pairrm(folder: str, **options: Any) -> PairRM:
    return PairRM(folder, device=torch.device("cpu"), dtype=torch.float32, batch_tokens=4096, **options)


def comparisons(rows: Any = pairrm_tiny.OWN_ASKED) -> list[Comparison]:
    answers = [(Response(a, tokens([1]), "x"), Response(b, tokens([1]), "x")) for _, a, b in rows]
    asked = [Prompt(n, f"[INST] {row[0]}", tokens([1]), question=row[0]) for n, row in enumerate(rows)]
    return [Comparison(prompt, a, b) for prompt, (a, b) in zip(asked, answers, strict=True)]


def published() -> Iterator[tuple[tuple[int, int], list[dict[str, Any]]]]:
    """The limits, and what the published ranker and collator gave under them."""
    rows = json.loads(pairrm_tiny.OWN_GOLDEN.read_text("utf-8"))["rows"]
    each = len(pairrm_tiny.OWN_ASKED)
    assert len(rows) == each * len(pairrm_tiny.LIMITS)
    for n, limits in enumerate(pairrm_tiny.LIMITS):
        yield limits, rows[n * each : (n + 1) * each]


def without_tokenizer(folder: Path) -> None:
    """The tokenizer lies with the base alone, without the marks, which the package adds."""
    for file in folder.glob("*token*"):
        file.unlink()
    pairrm_tiny.tokenizer().save_pretrained(folder / "base")


@pytest.mark.parametrize("where", ["beside the weights", "with the base"])
def test_the_own_form_gives_what_the_published_ranker_gives_under_the_limits_in_its_configuration(
    tmp_path: Path, where: str
) -> None:
    for n, (limits, rows) in enumerate(published()):
        assert max(row["ab"] for row in rows) - min(row["ab"] for row in rows) > 0.5  # else nothing is shown
        folder = own(tmp_path / str(n), limits)
        if where == "with the base":
            without_tokenizer(Path(folder))
        judge = pairrm(folder)
        for one, row in zip(comparisons(), rows, strict=True):
            for ids, order in zip(judge._rows(one), ("ab", "ba"), strict=True):
                assert ids == row[f"{order}_ids"]
                gap = judge.model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
                assert gap.item() == pytest.approx(row[order], abs=1e-5)


def test_the_tests_weights_have_the_published_ranker_s_names_and_shapes(tmp_path: Path) -> None:
    given = {name: list(weight.shape) for name, weight in load_file(Path(own(tmp_path)) / "model.safetensors").items()}
    assert given == json.loads(pairrm_tiny.OWN_GOLDEN.read_text("utf-8"))["weights"]


def test_limits_that_are_given_stand_for_those_of_the_folder(tmp_path: Path) -> None:
    source, candidate = pairrm_tiny.LIMITS[1]
    judge = pairrm(own(tmp_path), source_max_length=source, candidate_max_length=candidate)
    (_, whole), (_, short) = published()
    assert [judge._rows(one)[0] for one in comparisons()] == [row["ab_ids"] for row in short]
    assert whole != short


def test_both_forms_of_the_same_weights_answer_the_same(tmp_path: Path) -> None:
    own_form = list(pairrm(own(tmp_path)).compare(comparisons()))
    ids = {"source_prefix_id": 260, "cand1_prefix_id": 261, "cand2_prefix_id": 262, "cand_prefix_id": 263}
    pairrm_tiny.config(**ids).save_pretrained(tmp_path)  # now it is the other form
    assert list(pairrm(str(tmp_path)).compare(comparisons())) == own_form


@pytest.mark.parametrize("form", ["own", "hf"])
def test_the_tokenizer_is_read_to_the_letter_whatever_class_it_names(tmp_path: Path, form: str) -> None:
    folder = Path(own(tmp_path))
    tokenizer = pairrm_tiny.tokenizer(*pairrm_tiny.MARKS)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()  # as the published one has, and that class has not
    tokenizer.save_pretrained(folder)
    if form == "hf":
        pairrm_tiny.config().save_pretrained(folder)
    names = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "DebertaV2Tokenizer"}))
    judge = pairrm(str(folder))
    odd, plain = comparisons([("ﬁne … ½", "Ａ", "①"), ("fine ... 1⁄2", "A", "1")])
    assert judge._rows(odd) == judge._rows(plain)


def test_the_identity_holds_the_limits_and_what_the_base_says(tmp_path: Path) -> None:
    folder = own(tmp_path)
    first = pairrm(folder).identity
    assert pairrm(folder).identity == first
    assert pairrm(folder, source_max_length=1224, candidate_max_length=412).identity == first
    assert pairrm(folder, source_max_length=100).identity != first
    pairrm_tiny.base(layer_norm_eps=1e-3).save_pretrained(tmp_path / "base")
    assert pairrm(folder).identity != first


def test_a_text_that_spells_the_mark_of_the_package_s_own_tokenizer_is_read_with_a_space_there(tmp_path: Path) -> None:
    judge = pairrm(own(tmp_path))
    odd, plain = comparisons([("Why?", "<|candidate|>No.", "a[SEP]b"), ("Why?", " No.", "a b")])
    assert judge._rows(odd) == judge._rows(plain)


def test_a_base_that_is_not_there_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own(tmp_path, model_name=str(tmp_path / "nowhere"))
    with pytest.raises(
        ValueError, match=r"its base .*nowhere, and that cannot be read .*as model_name into .*PairRM-hf"
    ):
        pairrm(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = own(tmp_path, model_name="microsoft/no-such-deberta")
    with pytest.raises(ValueError, match=r"`hf download microsoft/no-such-deberta config.json`"):
        pairrm(folder)
    BertConfig().save_pretrained(tmp_path / "base")
    rewrite(tmp_path, **pairrm_tiny.stated(str(tmp_path / "base")))
    with pytest.raises(ValueError, match="which is a bert, no DeBERTa-v2"):
        pairrm(folder)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    folder = own(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled weights are never read"):
        pairrm(folder)


def test_a_pointer_in_place_of_the_weights_is_told(tmp_path: Path) -> None:
    folder = own(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"cannot be read .*: download it again"):
        pairrm(folder)


def test_weights_that_are_not_the_ranker_s_are_named(tmp_path: Path) -> None:
    folder = own(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    bias = weights.pop("head_layer.1.bias")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no weights that fit head_layer\.1\.bias"):
        pairrm(folder)
    save_file(weights | {"head_layer.1.bias": bias[:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no weights that fit head_layer\.1\.bias"):
        pairrm(folder)
    save_file(weights | {"head_layer.1.bias": bias, "single_head.weight": bias.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights beside its own, single_head\.weight"):
        pairrm(folder)
    save_file(
        weights | {"head_layer.1.bias": bias, "pretrained_model.embeddings.position_ids": torch.arange(32)[None]},
        tmp_path / "model.safetensors",
    )
    pairrm(folder)  # a buffer that older versions of transformers wrote


def test_a_tokenizer_that_has_not_the_weights_tokens_is_refused(tmp_path: Path) -> None:
    folder = own(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["<|one_more|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="264 embeddings, and its tokenizer with the marks 265 tokens"):
        pairrm(folder)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json in .* and .*base: put the one there"):
        pairrm(folder)
    pairrm_tiny.tokenizer().save_pretrained(folder)
    names = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**names, "pad_token": None}))
    with pytest.raises(ValueError, match="names no padding"):
        pairrm(folder)


def test_another_ranker_of_the_package_is_refused(tmp_path: Path) -> None:
    for change in ({"ranker_type": "summareranker"}, {"model_type": "roberta"}, {"model_type": "deberta-rm"}):
        with pytest.raises(ValueError, match="no PairRM: give llm-blender/PairRM-hf or llm-blender/PairRM"):
            pairrm(own(tmp_path, **change))
    for key in ("model_name", "source_maxlength", "candidate_maxlength"):
        with pytest.raises(ValueError, match=f"config.json does not say {key}"):
            pairrm(own(tmp_path, **{key: None}))
