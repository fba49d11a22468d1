"""What a person sees of a run: the regenerated segment in its colour, and never a control character of a response."""

import io
from pathlib import Path

from rich.console import Console
from toyrun import toy_folder, write_lines, write_rows

from sparring.config import ModelConfig, resolve
from sparring.data import parquet
from sparring.model.policy import load_tokenizer
from sparring.records import Pair, Response, tokens
from sparring.report.doctor import END, Doctor, doctor_report
from sparring.report.terminal import HUMAN, REGENERATED, coloured, pairs_view

WORDS = {1: "red", 2: " green", 3: " blue", 4: " \x1b[2Jgrey", 5: " [bold]"}


def decode(ids: object) -> str:
    return "".join(WORDS[i] for i in ids)  # type: ignore[attr-defined]


def test_exactly_the_segment_has_the_colour() -> None:
    text = coloured(Response("", tokens([1, 2, 3]), "human", segment=(1, 2)), decode, HUMAN)
    assert [(text.plain[s.start : s.end], s.style) for s in text.spans] == [
        ("red", "default"),
        (" green", HUMAN),
        (" blue", "default"),
    ]


def test_escape_sequences_and_markup_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    human = Response("red green blue", tokens([1, 2, 3]), "human", segment=(1, 3))
    written = Response("", tokens([1, 4, 5]), "ema@4", segment=(1, 3))
    (tmp_path / "rounds" / "00002").mkdir(parents=True)
    pair = Pair(0, "say \x1b]0;title\x07", tokens([1]), human, written, (0, 3), (0, 3), round=2, written_at=4)
    parquet.write(tmp_path / "rounds" / "00002" / "pairs.parquet", Pair, [pair])
    console = Console(file=io.StringIO(), width=100, record=True, force_terminal=True, color_system="truecolor")
    console.print(pairs_view(tmp_path, decode))
    sent = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2J" not in sent
    assert "\x1b]0;" not in sent
    assert "\\x1b[2Jgrey [bold]" in console.export_text(clear=False)
    assert "ema@4" in console.export_text()
    assert REGENERATED != HUMAN


def test_the_doctor_shades_the_response_and_marks_its_one_end(tmp_path: Path) -> None:
    model, rows = toy_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 5)
    names = {"model_name_or_path": model, "dataset_name": rows, "max_length": 96, "max_prompt_length": 48}
    console = Console(file=io.StringIO(), width=120, record=True, force_terminal=True)
    console.print(doctor_report(resolve(Doctor, names, parts=("model", "data"))))
    segments = [s for s in console._record_buffer if s.style and str(s.style) == END]
    assert [s.text for s in segments] == ["end of turn", *["<|im_end|>"] * 3]
    text = console.export_text()
    assert "5 of 5 rows" in text
    assert "the template keeps the rules" in text


def test_the_doctor_warns_of_a_template_without_an_end(tmp_path: Path) -> None:
    model, rows = (
        toy_folder(tmp_path / "model"),
        write_lines(tmp_path / "r.jsonl", [{"prompt": "a", "completion": "b"}]),
    )
    template = tmp_path / "bare.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    names = {"model_name_or_path": model, "dataset_name": rows, "chat_template_path": template}
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(doctor_report(resolve(Doctor, names, parts=("model", "data"))))
    assert "prints no end of turn" in console.export_text()


def test_a_made_model_is_the_same_bytes_for_the_same_seed_and_keeps_any_text(tmp_path: Path) -> None:
    folders = [toy_folder(tmp_path / name) for name in ("a", "b")]
    assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()
    assert (folders[0] / "tokenizer.json").read_bytes() == (folders[1] / "tokenizer.json").read_bytes()
    other = toy_folder(tmp_path / "c", seed=1)
    assert (folders[0] / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(folders[0])))
    for text in ("naïve café — 数学 🎲\n\tend", "48/2 = <<48/2=24>>24", " two  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("1234")["input_ids"]) == 4  # digits stand alone
