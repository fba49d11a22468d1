"""A run that was killed and resumed equals the run that never stopped, to the bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import tiny_llama
from started import Started
from toyrun import toy_folder, write_pairs, write_rows

from sparring import checkpoint, folders
from sparring.buffer import Buffer
from sparring.checkpoint import TrainState
from sparring.methods.sapo import SAPO
from sparring.model.roles import Roles
from sparring.run import resume, train

COMMON = {
    "max_length": 96,
    "max_prompt_length": 48,
    "per_device_train_batch_size": 4,
    "learning_rate": "1e-3",
    "max_steps": 24,
    "save_steps": 4,
    "monitor_steps": 6,
}
METHODS = {
    "sapo": {"segment_tokens": 8, "ema_every": 2, "reference_every": 5, "buffer_size": 20, "generate_ahead": 3},
    "dpo": {"beta": 0.1},
    "sppo": {
        "beta": 0.05,
        "rounds": 3,
        "num_train_epochs": 2,
        "responses_per_prompt": 4,
        "max_new_tokens": 16,
        "shard_prompts": 4,
        "judge": "verifier",
        "judge_concurrency": 2,
        "judge_scale": 5,
        "eval_max_samples": 6,
    },
}
# Every call leaves a line, so that what was paid for twice is seen.
VERIFIER = """
import os, time
def score(prompt, response, row):
    line = repr((prompt, response, row["finished"])).encode() + b"\\n"
    log = os.open(os.environ["CALLS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, line)
    os.close(log)
    time.sleep(0.002)
    return len(set(response.split()) & set(row["completion"].split())) / 12
"""


def command(name: str, model: Path, data: Path, out: Path) -> list[str]:
    keys = {**COMMON, **METHODS[name], "model_name_or_path": model, "dataset_name": data, "output_dir": out}
    if name == "sppo":
        keys |= {"verifier": f"{data.parent / 'verifier.py'}:score", "eval_dataset_name": data}
    return ["-m", "sparring", name, *(word for k, v in keys.items() for word in (f"--{k}", str(v)))]


def state(folder: Path) -> dict[str, bytes]:
    """What must be identical: the result, the last checkpoint (weights, EMA, reference, optimizer, counters), metrics, rounds."""
    files = [
        *folder.glob("model*/*.safetensors"),
        *folders.checkpoints(folder / "checkpoints")[-1].iterdir(),
        *(file for file in folder.glob("rounds/**/*") if file.is_file()),
        *folder.glob("evaluation/*.parquet"),
        folder / "metrics.jsonl",
    ]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def kill_and_resume(name: str, inputs: tuple[Path, Path], folder: Path, rng: random.Random, kills: int) -> int:
    """Start a run, kill it ``kills`` times at random moments of its progress, resume each time; how many kills struck."""
    struck = 0
    words = command(name, *inputs, folder)
    for _ in range(kills):
        process = Started(words, env=environment(folder))
        _wait_for_progress(process, folder, rng)
        process.send_signal(signal.SIGKILL)
        struck += process.wait() == -signal.SIGKILL
        if (folder / "config.yaml").exists():
            words = ["-m", "sparring", "resume", str(folder)]
        elif folder.exists():
            shutil.rmtree(folder)
    by_itself(words, folder)
    return struck


def by_itself(words: list[str], folder: Path) -> None:
    """A process that draws anew what Python draws once a process, how strings are hashed."""
    subprocess.run([sys.executable, *words], check=True, capture_output=True, env=environment(folder), timeout=300)


def environment(folder: Path) -> dict[str, str]:
    """A cache and a log of the verifier's calls beside ``folder``."""
    return os.environ | {"SPARRING_CACHE": f"{folder}.cache", "CALLS": f"{folder}.calls"}


def calls(folder: Path) -> list[bytes]:
    """What the verifier was asked, call by call."""
    return Path(f"{folder}.calls").read_bytes().splitlines()


def _wait_for_progress(process: Started, folder: Path, rng: random.Random) -> None:
    """Until the run has made some more updates, and then a random moment."""
    metrics, log = folder / "metrics.jsonl", Path(f"{folder}.calls")

    def written() -> int:
        return sum(file.stat().st_size for file in (metrics, log) if file.exists())

    size = written()
    wanted = size + rng.randint(1, 4000)
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if not size <= written() < wanted:
            break
        time.sleep(0.002)
    time.sleep(rng.random() * 0.05)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "verifier.py").write_text(VERIFIER)
    model = toy_folder(folder / "model")
    return {
        "sapo": (model, write_rows(folder / "rows.jsonl", 40)),
        "dpo": (model, write_pairs(folder / "pairs.jsonl", 40)),
        "sppo": (model, folder / "rows.jsonl"),
    }


def unbroken(name: str, inputs: tuple[Path, Path], folder: Path) -> dict[str, bytes]:
    by_itself(command(name, *inputs, folder), folder)
    return state(folder)


def assert_same(mine: dict[str, bytes], theirs: dict[str, bytes]) -> None:
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []


def test_sapo_killed_three_times_ends_as_if_never_stopped(inputs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    expected = unbroken("sapo", inputs["sapo"], tmp_path / "whole")
    struck = kill_and_resume("sapo", inputs["sapo"], tmp_path / "broken", random.Random(7), 3)
    assert struck >= 2
    assert_same(state(tmp_path / "broken"), expected)


def test_sppo_killed_three_times_ends_as_if_never_stopped_and_pays_for_no_judgment_twice(
    inputs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = unbroken("sppo", inputs["sppo"], whole)
    assert {"rounds/00002/pairs.parquet", "rounds/00002/lineage.json", "metrics.jsonl"} <= expected.keys()
    assert (
        len([name for name in expected if name.startswith("evaluation/")]) >= 3
    )  # the start's, and that of each round with pairs
    struck = kill_and_resume("sppo", inputs["sppo"], broken, random.Random(11), 3)
    assert struck >= 2
    assert_same(state(broken), expected)
    once = set(calls(whole))
    assert len(calls(whole)) == len(once) >= 60
    assert set(calls(broken)) == once
    assert len(calls(broken)) <= len(once) + 2 * struck  # what two workers had in their hands at a kill


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_ten_kills_of_each_method_leave_no_trace(
    name: str, inputs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    expected = unbroken(name, inputs[name], tmp_path / "whole")
    rng, struck = random.Random(f"soak {name}"), 0
    for attempt in range(5):
        struck += kill_and_resume(name, inputs[name], tmp_path / f"broken{attempt}", rng, 4)
        assert_same(state(tmp_path / f"broken{attempt}"), expected)
    assert struck >= 10


@pytest.fixture(scope="module")
def whole_dpo(inputs: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A DPO run that nothing befell."""
    return unbroken("dpo", inputs["dpo"], tmp_path_factory.mktemp("whole") / "dpo")


def test_sigterm_finishes_the_update_saves_and_exits_0(
    inputs: dict[str, tuple[Path, Path]], whole_dpo: dict[str, bytes], tmp_path: Path
) -> None:
    process = Started(command("dpo", *inputs["dpo"], tmp_path / "run"))
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(_lines(tmp_path / "run")) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "sparring resume" in out
    steps = [line["step"] for line in _lines(tmp_path / "run") if "loss" in line]
    saved = folders.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert int(saved.name) == steps[-1] < 24
    assert resume(tmp_path / "run", quiet=True).state == "finished"
    assert_same(state(tmp_path / "run"), whole_dpo)


def test_a_full_disk_while_a_checkpoint_is_written_is_said_and_earlier_ones_stay_whole(
    inputs: dict[str, tuple[Path, Path]], whole_dpo: dict[str, bytes], tmp_path: Path
) -> None:
    words = command("dpo", *inputs["dpo"], tmp_path / "run")
    # Files of this process may grow to 90 kB: records and metrics fit, the weights do not.
    limited = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (90000, 90000)); sys.argv[1:] = {words[2:]!r}; "
        "from sparring.cli import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr
    assert "is the disk full?" in done.stderr
    assert "sparring resume" in done.stderr
    assert folders.checkpoints(tmp_path / "run" / "checkpoints") == []
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert resume(tmp_path / "run", quiet=True).state == "finished"
    assert_same(state(tmp_path / "run"), whole_dpo)


def test_what_another_process_is_still_writing_does_not_end_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = Roles(tiny_llama(), ema_decay=0.0, reference=False)
    state = TrainState(roles, [], Buffer(None, "epochs"))
    rest = checkpoint._write_rest

    def among_others(part: Path, state: TrainState) -> None:
        (part / ".tmpYaP1pQ").symlink_to("gone")  # listed, and no longer there when it is opened
        rest(part, state)
        (part / ".tmpYaP1pQ").unlink()

    monkeypatch.setattr(checkpoint, "_write_rest", among_others)
    saved = checkpoint.save(tmp_path, state, keep=1, frozen_reference=True)
    assert folders.checkpoints(tmp_path) == [saved]


def test_only_the_last_checkpoints_are_kept_and_no_pickle_is_among_them(
    inputs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    model, data = inputs["dpo"]
    from sparring.methods.offline import DPO

    run = train(DPO, model_name_or_path=model, dataset_name=data, output_dir=tmp_path / "run", quiet=True, **COMMON)
    names = [path.name for path in folders.checkpoints(run.folder / "checkpoints")]
    assert names == ["000016", "000020"]
    kinds = {file.suffix for file in (run.folder / "checkpoints").rglob("*") if file.is_file()}
    assert kinds == {".safetensors", ".parquet", ".json"}


def _lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


os.environ.setdefault(
    "PYTHONPATH", str(Path(__file__).parents[1] / "src")
)  # for the subprocesses, where it is not installed


def test_a_checkpoint_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    model, rows = toy_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 8)
    keys = {**COMMON, "max_steps": 8, "save_steps": 4}
    train(
        SAPO,
        model_name_or_path=str(model),
        dataset_name=str(rows),
        output_dir=str(tmp_path / "run"),
        quiet=True,
        **keys,
    )
    shutil.rmtree(tmp_path / "run" / "model")
    last = folders.checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (last / "ema.0-of-1.safetensors").rename(last / "ema.0-of-2.safetensors")
    with pytest.raises(ValueError, match="has 1 files of ema, and not all there have to be"):
        resume(tmp_path / "run", quiet=True)
