"""The archive: what a round wrote and judged is read back as it was made, and only where it belongs to the state of now."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import END, prompt, response

from sparring.archive import Archive
from sparring.data import parquet
from sparring.model.parallel import World
from sparring.pairing import Judged
from sparring.progress import Bars
from sparring.records import Candidate, Group, Judgment, Prompt, Response, Standing, tokens

PROMPTS = [prompt(n, [5, 6 + n], [10, 11, END]) for n in (4, 0, 7)]
ODD = [
    Response("", tokens([]), "policy@3", False),
    Response("two\nlines, a tab\t and \u00e9 \U0001f600", tokens([40, END]), "models/start"),
    Response(" padded ", tokens([2**31 - 1, 0, 41]), "policy@3", False, (1, 3)),
]


def groups() -> list[Group]:
    """Three responses each, the human one among them, and none like the other."""
    return [
        Group(p, (p.human or ODD[0], ODD[n], response([50 + n, END], "policy@3", segment=(n, n + 1))))
        for n, p in enumerate(PROMPTS)
    ]


JUDGED = Judged(
    [
        Judgment(4, 0, 1, 0.1 + 0.2, "llm:one", True),
        Judgment(4, 2, 0, None, "llm:one"),
        Judgment(7, 0, 2, 0.0, "human", False),
    ],
    [Standing(4, 0, 1, 1 / 3, -2.5), Standing(4, 1), Standing(7, 2, 0, 1.0, None)],
)


def never() -> Any:
    raise AssertionError("what is on the disk is not made again")


def archive(folder: Path, stamp: str = "update 3", world: World | None = None) -> Archive:
    return Archive(folder, lambda: stamp, Bars(quiet=True), *([world] if world else []))


def counted(make: Callable[[], Any]) -> tuple[list[int], Callable[[], Any]]:
    """``make``, and how often it was called."""
    calls: list[int] = []

    def counting() -> Any:
        calls.append(1)
        return make()

    return calls, counting


def test_groups_are_read_back_to_the_token_with_every_field(tmp_path: Path) -> None:
    made = archive(tmp_path).groups(2, 5, PROMPTS, groups)
    assert made == groups()
    assert (tmp_path / "00002" / "responses" / "00005.parquet").is_file()
    again = archive(tmp_path).groups(2, 5, PROMPTS, never)
    assert again == groups()
    for group, original in zip(again, groups(), strict=True):
        assert group.prompt is next(p for p in PROMPTS if p.id == original.prompt.id)
        for read, there in zip(group.responses, original.responses, strict=True):
            assert type(read.token_ids) is type(there.token_ids)
            assert (read.text, read.token_ids, read.source) == (there.text, there.token_ids, there.source)
            assert (read.finished, read.segment) == (there.finished, there.segment)


def test_judgments_and_standings_are_read_back_to_the_bit(tmp_path: Path) -> None:
    assert archive(tmp_path).judged(0, 0, lambda: JUDGED) == JUDGED
    assert archive(tmp_path).judged(0, 0, never) == JUDGED


def test_judgments_without_standings_and_nothing_at_all_are_kept_too(tmp_path: Path) -> None:
    for number, made in enumerate([Judged(JUDGED.judgments), Judged([])]):
        assert archive(tmp_path).judged(number, 0, lambda made=made: made) == made  # type: ignore[misc]
        assert archive(tmp_path).judged(number, 0, never) == made
    assert archive(tmp_path).groups(0, 0, PROMPTS, list) == []
    assert archive(tmp_path).groups(0, 0, PROMPTS, never) == []


def test_each_shard_of_each_round_is_its_own(tmp_path: Path) -> None:
    kept = archive(tmp_path)
    for number in (0, 1):
        for shard in (0, 1):
            kept.groups(number, shard, PROMPTS[shard : shard + 1], lambda s=shard: groups()[s : s + 1])  # type: ignore[misc]
            kept.judged(number, shard, lambda n=number, s=shard: Judged([Judgment(n, s, 0, 0.5, "j")]))  # type: ignore[misc]
    for number in (0, 1):
        for shard in (0, 1):
            assert kept.groups(number, shard, PROMPTS[shard : shard + 1], never) == groups()[shard : shard + 1]
            (judgment,) = kept.judged(number, shard, never).judgments
            assert (judgment.prompt_id, judgment.a) == (number, shard)


def test_groups_come_in_the_order_of_their_prompts(tmp_path: Path) -> None:
    archive(tmp_path).groups(0, 0, PROMPTS, groups)
    again = archive(tmp_path).groups(0, 0, PROMPTS[::-1], never)
    assert [g.prompt.id for g in again] == [7, 0, 4]
    assert again == groups()[::-1]


def test_a_shard_of_another_state_is_made_anew_and_then_kept(tmp_path: Path) -> None:
    archive(tmp_path).groups(0, 0, PROMPTS, groups)
    archive(tmp_path).judged(0, 0, lambda: JUDGED)
    other = [Group(PROMPTS[0], (response([33, END], "policy@9"),))]
    calls, make = counted(lambda: other)
    assert archive(tmp_path, "update 9").groups(0, 0, PROMPTS, make) == other
    assert archive(tmp_path, "update 9").groups(0, 0, PROMPTS, make) == other
    assert len(calls) == 1
    calls, make = counted(lambda: Judged([]))
    assert archive(tmp_path, "update 9").judged(0, 0, make) == Judged([])
    assert archive(tmp_path, "update 9").judged(0, 0, never) == Judged([])
    assert len(calls) == 1
    calls, make = counted(groups)
    assert archive(tmp_path).groups(0, 0, PROMPTS, make) == groups()
    assert len(calls) == 1


def test_the_stamp_is_that_of_the_moment_of_writing(tmp_path: Path) -> None:
    step = 0
    kept = Archive(tmp_path, lambda: f"update {step}", Bars(quiet=True))
    kept.groups(0, 0, PROMPTS, groups)
    step = 1
    calls, make = counted(groups)
    kept.groups(0, 0, PROMPTS, make)
    assert len(calls) == 1
    assert parquet.about(tmp_path / "00000" / "responses" / "00000.parquet")["stamp"] == "update 1"


def test_a_half_written_file_is_no_file(tmp_path: Path) -> None:
    archive(tmp_path).groups(0, 0, PROMPTS, groups)
    archive(tmp_path).judged(0, 0, lambda: JUDGED)
    for name in ("responses", "judgments", "standings"):
        whole = tmp_path / "00000" / name / "00000.parquet"
        shutil.move(whole, f"{whole}.part")
        Path(f"{whole}.part").write_bytes(Path(f"{whole}.part").read_bytes()[:40])
    calls, make = counted(groups)
    assert archive(tmp_path).groups(0, 0, PROMPTS, make) == groups()
    assert archive(tmp_path).judged(0, 0, lambda: JUDGED) == JUDGED
    assert len(calls) == 1
    assert archive(tmp_path).groups(0, 0, PROMPTS, never) == groups()
    assert not list(tmp_path.rglob("*.part"))


def test_standings_alone_are_not_judgments(tmp_path: Path) -> None:
    archive(tmp_path).judged(0, 0, lambda: JUDGED)
    (tmp_path / "00000" / "judgments" / "00000.parquet").unlink()  # as a kill between the two leaves it
    other = Judged(JUDGED.judgments[:1], JUDGED.standings[1:])
    assert archive(tmp_path).judged(0, 0, lambda: other) == other
    assert archive(tmp_path).judged(0, 0, never) == other


def test_a_maker_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def breaks() -> Any:
        raise ConnectionError("the server is gone")

    with pytest.raises(ConnectionError):
        archive(tmp_path).groups(0, 0, PROMPTS, breaks)
    with pytest.raises(ConnectionError):
        archive(tmp_path).judged(0, 0, breaks)
    assert not list(tmp_path.rglob("*.parquet"))
    assert archive(tmp_path).groups(0, 0, PROMPTS, groups) == groups()


class Other(World):
    """A second process, which has to make what the first one has to make."""

    def __init__(self, there: bool) -> None:
        super().__init__(1, 2, 1)
        object.__setattr__(self, "there", there)

    def any(self, flag: bool) -> bool:
        assert not flag  # only the main process looks
        return bool(self.there)  # type: ignore[attr-defined]


def test_only_the_main_process_looks_and_writes_and_the_others_read_with_it(tmp_path: Path) -> None:
    calls, make = counted(groups)
    assert archive(tmp_path, world=Other(False)).groups(0, 0, PROMPTS, make) == groups()
    assert len(calls) == 1
    assert not list(tmp_path.iterdir())
    archive(tmp_path).groups(0, 0, PROMPTS, groups)
    assert archive(tmp_path, world=Other(True)).groups(0, 0, PROMPTS, never) == groups()


def test_the_file_says_what_a_person_looks_for(tmp_path: Path) -> None:
    archive(tmp_path).groups(0, 0, PROMPTS, groups)
    rows = list(parquet.read(tmp_path / "00000" / "responses" / "00000.parquet", Candidate))
    assert [(row.prompt_id, row.prompt, row.place) for row in rows][:4] == [
        (4, "5 10", 0),
        (4, "5 10", 1),
        (4, "5 10", 2),
        (0, "5 6", 0),
    ]


def test_a_prompt_of_which_nothing_was_kept_gives_no_group(tmp_path: Path) -> None:
    more: list[Prompt] = [*PROMPTS, prompt(99, [1])]
    archive(tmp_path).groups(0, 0, more, groups)
    assert archive(tmp_path).groups(0, 0, more, never) == groups()
