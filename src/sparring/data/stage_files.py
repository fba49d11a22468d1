"""The files between the stages of a round: Parquet, complete or absent, with the field's column names.

    responses  prompt, completion, prompt_id, place, finished, source, prompt_token_ids, completion_token_ids, row
    ranked     the same with rank (0 is the best), win_rate, score; and judgments/, a row for each comparison
    pairs      prompt, chosen, rejected, chosen_probs_win, chosen_probs_lose, prompt_id, *_source, *_finished, *_token_ids, row

A row of responses is one response. ``prompt`` is what the data set had, text or messages; ``row`` its whole row as JSON.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparring.config import Config
from sparring.data.datasets import question
from sparring.records import Group, Pair, Prompt, Response, tokens

Row = dict[str, Any]
FREE = {
    "output_dir",
    "device",
    "generation_batch_size",
    "cache_implementation",
    "server_urls",
    "server_command",
    "server_api_key_env",
    "server_concurrency",
    "server_timeout",
    "server_start_timeout",
    "server_retries",
    "verifier_timeout",
    "judge_base_url",
    "judge_api_key_env",
    "judge_concurrency",
    "judge_timeout",
    "judge_retries",
    "judge_max_calls",
    "judge_max_tokens",
    "judge_price_in",
    "judge_price_out",
    "judge_batch_tokens",
    "judge_cache",
}
NEEDS = ("prompt", "completion", "prompt_id", "place")


def rows_of(group: Group) -> Iterator[Row]:
    """A row for each response of a group."""
    prompt = group.prompt
    for place, response in enumerate(group.responses):
        yield {
            "prompt": prompt.content if prompt.content is not None else prompt.text,
            "completion": response.text,
            "prompt_id": prompt.id,
            "place": place,
            "finished": response.finished,
            "source": response.source,
            "prompt_token_ids": list(prompt.token_ids),
            "completion_token_ids": list(response.token_ids),
            "row": json.dumps(dict(prompt.row), ensure_ascii=False, default=str),
        }


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Rows of responses, which stand in the order of their prompts, as groups; ValueError where places do not count from 0."""
    groups = []
    for number, each in itertools.groupby(rows, key=lambda row: row["prompt_id"]):
        mine = list(each)
        if [row["place"] for row in mine] != list(range(len(mine))):
            raise ValueError(
                f"prompt_id {number}: places are {[row['place'] for row in mine]}: they have to count from 0"
            )
        responses = tuple(
            Response(
                row["completion"] or "",
                tokens(row.get("completion_token_ids") or ()),
                row.get("source") or "given",
                row.get("finished", True) is not False,
            )
            for row in mine
        )
        content = mine[0]["prompt"]
        about = json.loads(mine[0].get("row") or "{}")
        ids = tokens(mine[0].get("prompt_token_ids") or ())
        asked = question(content)
        groups.append(Group(Prompt(number, asked, ids, row=about, question=asked, content=content), responses))
    return groups


def pair_row(pair: Pair, prompt: Prompt) -> Row:
    """A pair under the field's column names."""
    assert pair.rejected is not None
    return {
        "prompt": prompt.content,
        "chosen": pair.chosen.text,
        "rejected": pair.rejected.text,
        "chosen_probs_win": pair.chosen_win_rate,
        "chosen_probs_lose": pair.rejected_win_rate,
        "prompt_id": pair.prompt_id,
        "chosen_source": pair.chosen.source,
        "rejected_source": pair.rejected.source,
        "chosen_finished": pair.chosen.finished,
        "rejected_finished": pair.rejected.finished,
        "prompt_token_ids": list(pair.prompt_token_ids),
        "chosen_token_ids": list(pair.chosen.token_ids),
        "rejected_token_ids": list(pair.rejected.token_ids),
        "row": json.dumps(dict(prompt.row), ensure_ascii=False, default=str),
    }


def keys_as_text(config: Config) -> str:
    """The keys that a folder's files depend on, as JSON: not those of speed, place, patience and money."""
    keys = {name: value for name, value in config.flat().items() if name not in FREE}
    return json.dumps(keys, indent=1, default=str)


def opened(name: str, about: str) -> Path:
    """The output folder; ValueError where it was begun with other keys, or holds something else."""
    if not name:
        raise ValueError("output_dir is missing: name the folder to write")
    folder, note = Path(name), Path(name) / ".keys.json"
    if note.exists() and note.read_text() != about:
        before, now = json.loads(note.read_text()), json.loads(about)
        differ = [k for k in now if before.get(k) != now[k]]
        raise ValueError(f"{folder} was begun with other keys ({', '.join(differ)}): choose another output_dir")
    if not note.exists() and folder.exists() and any(file.name != f"{note.name}.part" for file in folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    if not note.exists():
        part = note.with_name(f"{note.name}.part")
        part.write_text(about)
        part.replace(note)
    return folder


def shard(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"{number:05d}.parquet"


def shards_of(name: str, what: str) -> list[Path]:
    """The files of a folder, or the file; ValueError, which says ``what`` they are, where there is none."""
    path = Path(name) if name else None
    found = [path] if path and path.is_file() else sorted(path.glob("*.parquet")) if path else []
    if not found:
        raise ValueError(f"{what} is {name!r}: it has to be a Parquet file, or a folder with some")
    return found


def read(file: Path, needs: Sequence[str]) -> list[Row]:
    """A file's rows; ValueError where it lacks a column."""
    rows: list[Row] = pq.read_table(file).to_pylist()
    missing = [name for name in needs if rows and name not in rows[0]]
    if missing:
        raise ValueError(f"{file} has no column {', '.join(missing)}: it has {', '.join(rows[0])}")
    return rows


def write(file: Path, rows: Iterable[Row]) -> None:
    """Write rows; the file appears when it is whole."""
    part = file.with_name(f".{file.name}.part")
    pq.write_table(pa.Table.from_pylist(list(rows)), part, compression="zstd")
    part.replace(file)
