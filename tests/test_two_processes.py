"""Two real processes: the same update as one, the same run after a kill, resumed by another number of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import started
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small import made_once, tiny_llama
from started import Started
from toyrun import toy_folder, write_rows
from two import CASES, DEVICE, METHODS, play

from sparring.config import AdapterConfig, ModelConfig
from sparring.folders import checkpoints
from sparring.model import policy
from sparring.model.adapters import with_adapter
from sparring.model.parallel import ALONE, World, joined, launched
from sparring.model.sharding import divide, empty, gathered, shard

CPU, RANK_4 = torch.device("cpu"), AdapterConfig(use_peft=True, lora_r=4)
TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}
KEYS = {
    "max_length": 96,
    "max_prompt_length": 48,
    "per_device_train_batch_size": 4,
    "learning_rate": "1e-3",
    "max_steps": 10,
    "save_steps": 2,
    "monitor_steps": 5,
    "segment_tokens": 8,
    "ema_every": 2,
    "reference_every": 3,
    "buffer_size": 20,
    "generate_ahead": 2,
    "device": DEVICE.type,
}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every case."""

    def make(out: Path) -> None:
        done = torchrun([str(TESTS / "two.py"), str(out)])
        assert done.returncode == 0, done.stderr[-3000:]

    return made_once(tmp_path_factory, "by-two", make)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_make_the_updates_of_one_with_ema_and_moving_reference_and_write_as_one(
    name: str, case: str, by_two: Path
) -> None:
    mine = play(name, ALONE, **CASES[case] | {"cache": "dynamic"})
    theirs = load_file(by_two / f"{name}-{case}.safetensors")
    assert mine.keys() == theirs.keys()
    assert mine["figures"][0, 0] != mine["figures"][3, 0]  # it learns something
    assert len(mine["written"].unique(dim=0)) > len(mine["written"]) / 3
    half = "bf16" in case  # sums in bfloat16 depend on who adds up which, and so may what is written
    both = theirs.pop("written"), mine.pop("written")
    assert half or torch.equal(*both)
    for key in mine:
        torch.testing.assert_close(
            theirs[key].float(), mine[key].float(), rtol=2e-2 if half else 1e-5, atol=5e-3 if half else 1e-5
        )


def words(model: Path, data: Path, out: Path) -> list[str]:
    keys = {**KEYS, "model_name_or_path": model, "dataset_name": data, "output_dir": out}
    return ["-m", "sparring", "sapo", *(word for k, v in keys.items() for word in (f"--{k}", str(v)))]


def torchrun(words: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*TORCHRUN, *words], capture_output=True, text=True, env=QUIET, timeout=300)


def figures(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    def make(folder: Path) -> None:
        toy_folder(folder / "model")
        write_rows(folder / "rows.jsonl", 12)

    folder = made_once(tmp_path_factory, "two-inputs", make)
    return folder / "model", folder / "rows.jsonl"


@pytest.fixture(scope="module")
def whole_run(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing befell."""

    def make(folder: Path) -> None:
        done = torchrun(words(*inputs, folder / "run"))
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("finished") == 1

    return made_once(tmp_path_factory, "two-whole", make) / "run"


def test_a_run_of_two_processes_is_a_run(whole_run: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    assert started.run(words(*inputs, tmp_path / "one")).returncode == 0
    ours, one = figures(whole_run), figures(tmp_path / "one")
    assert [line.keys() for line in ours] == [line.keys() for line in one]
    for mine, other in zip(ours, one, strict=True):  # generation in other batches may round one draw another way
        if "loss" in mine and mine["step"] <= 2:
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
    names = {path.name for path in (whole_run / "model").iterdir()}
    assert names == {path.name for path in (tmp_path / "one" / "model").iterdir()}
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (whole_run, tmp_path / "one"))
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    last = checkpoints(whole_run / "checkpoints")[-1]
    assert len(list(last.glob("policy.*-of-2.safetensors"))) == 2


# Two processes, of which one or both find the static cache to be faster.
CLOCKS = """
import functools, os, torch
from sparring.cli import command
from sparring.model import compiling

torch.compile = functools.partial(torch.compile, backend="eager")  # traced and run as it is
compiling.MEASURED = {"cpu", "cuda"}
compiling.fastest = lambda what, ways, device, say: "static" if os.environ["RANK"] in os.environ["STATIC"] else "dynamic"
command()
"""


@pytest.mark.parametrize(("static", "found"), [("01", "static"), ("0", "dynamic")])
def test_the_cache_is_static_where_all_processes_found_it_faster(
    static: str, found: str, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clocks.py").write_text(CLOCKS)
    monkeypatch.setenv("STATIC", static)
    given = words(*inputs, tmp_path / "run")[2:]  # without -m sparring
    done = started.run([str(tmp_path / "clocks.py"), *given, "--torch_compile", "false"], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"cache_implementation: {found}\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert [line["step"] for line in figures(tmp_path / "run") if "loss" in line][-1] == KEYS["max_steps"]


def test_what_is_gathered_reads_the_same_every_time_and_is_empty_afterwards(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}  # its frequencies change with what is read
    start = tiny_llama(max_position_embeddings=8, rope_parameters=rope)
    ids = torch.tensor([list(range(3, 23))])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        whole = shard(start, World(0, 1, 0), torch.device("cpu"), computes=torch.float32)
        with torch.no_grad():
            expected = start(ids).logits
            for _ in range(2):
                with gathered(whole) as alone:
                    torch.testing.assert_close(alone(ids).logits, expected)
            with pytest.raises((RuntimeError, NotImplementedError)):
                alone(ids).logits.sum().item()
    finally:
        dist.destroy_process_group()


def test_no_more_than_one_layer_is_whole_while_a_model_is_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tiny_llama(num_hidden_layers=6, tie_word_embeddings=False)
    sent: weakref.WeakSet[object] = weakref.WeakSet()
    most = 0

    def broadcast(value: torch.Tensor, source: int) -> None:
        nonlocal most
        sent.add(value.untyped_storage())
        most = max(most, sum(storage.nbytes() for storage in sent))  # type: ignore[attr-defined]

    monkeypatch.setattr(dist, "broadcast", broadcast)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        shard(start, World(0, 1, 0), CPU, computes=torch.float32)
    finally:
        dist.destroy_process_group()
    layer = sum(4 * p.numel() for p in start.model.layers[0].parameters())
    around = sum(4 * p.numel() for p in start.parameters()) - 6 * layer
    assert max(layer, around) <= most < max(layer, around) + layer


def test_a_weight_of_two_layers_is_refused(tmp_path: Path) -> None:
    start = tiny_llama(tie_word_embeddings=False)
    start._no_split_modules = ["LlamaDecoderLayer", "Embedding"]
    start.config.tie_word_embeddings = True
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        made, alone = empty(start, torch.float32), empty(start, torch.float32)
        made._no_split_modules = start._no_split_modules
        with pytest.raises(ValueError, match=r"lm_head.weight is a weight of two layers"):
            divide(made, alone, start, World(0, 1, 0), CPU)
    finally:
        dist.destroy_process_group()


def test_a_killed_process_ends_the_job_with_a_clear_error_and_the_run_resumes_to_the_bit(
    whole_run: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    job = subprocess.Popen([*TORCHRUN, *words(*inputs, folder)], stderr=subprocess.PIPE, text=True, env=QUIET)
    until = time.monotonic() + 120
    while not checkpoints(folder / "checkpoints") and time.monotonic() < until and job.poll() is None:
        time.sleep(0.01)
    victim = _worker(job.pid, rank=1)
    os.kill(victim, signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "exitcode  : -9" in errors  # torchrun's own words for who was killed
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] in ("failed", "interrupted")  # torchrun may stop the other process before it notices
    assert not (folder / "model").exists()
    done = torchrun(["-m", "sparring", "resume", str(folder)])
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("model/model.safetensors", "model_ema/model.safetensors", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (whole_run / name).read_bytes(), name


def test_a_run_of_two_goes_on_as_one_and_a_run_of_one_as_two(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    for processes in (2, 1):
        folder = tmp_path / f"from-{processes}"
        command = words(*inputs, folder)
        job: Any = (
            Started(command)
            if processes == 1
            else subprocess.Popen([*TORCHRUN, *command], stderr=subprocess.PIPE, text=True, env=QUIET)
        )
        until = time.monotonic() + 120
        while not checkpoints(folder / "checkpoints") and time.monotonic() < until and job.poll() is None:
            time.sleep(0.01)
        job.send_signal(signal.SIGINT if processes == 1 else signal.SIGTERM)
        job.communicate(timeout=120)
        assert not (folder / "model").exists()
        before = figures(folder)
        goes_on = torchrun if processes == 1 else started.run
        done = goes_on(["-m", "sparring", "resume", str(folder)])
        assert done.returncode == 0, done.stderr[-3000:]
        after = figures(folder)
        shared = min(len(before), len(after))
        assert [line for line in after if "loss" in line][-1]["step"] == KEYS["max_steps"]
        kept = [line for line in before[:shared] if line.get("step", 0) <= 2]
        assert after[: len(kept)] == kept


def test_a_divided_base_changes_nothing_also_where_it_starts_from_an_adapter_and_is_resumed(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    adapted = with_adapter(
        policy.load_model(ModelConfig(str(inputs[0])), CPU), RANK_4, None, ModelConfig(str(inputs[0])), 3
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    launches = {}
    for name, divided in (("whole", "false"), ("divided", "true")):
        launches[name] = words(tmp_path / "adapter", inputs[1], tmp_path / name)
        launches[name] += ["--use_peft", "--lora_shard_base", divided]
    done = started.run(launches["whole"], 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the base is divided" not in done.stderr
    job = Started(launches["divided"], 2)
    until = time.monotonic() + 120
    while not checkpoints(tmp_path / "divided" / "checkpoints") and time.monotonic() < until and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert "the base is divided over 2 processes" in job.communicate(timeout=120)[1]
    assert not (tmp_path / "divided" / "model").exists()
    done = torchrun(["-m", "sparring", "resume", str(tmp_path / "divided")])
    assert done.returncode == 0, done.stdout + done.stderr
    files = (
        "model/adapter_model.safetensors",
        "model/adapter_config.json",
        "model_ema/adapter_model.safetensors",
        "metrics.jsonl",
    )
    for file in files:
        assert (tmp_path / "divided" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def _worker(launcher: int, rank: int) -> int:
    """The pid of the process of ``rank`` under a torchrun."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int(re.search(r"PPid:\s+(\d+)", (entry / "status").read_text())[1])  # type: ignore[index]
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, TypeError):
            continue
        if parent == launcher and f"RANK={rank}".encode() in environment:
            return int(entry.name)
    raise AssertionError("no such process")


def test_the_launchers_environments_are_read() -> None:
    assert launched({}) is None
    assert launched({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}) is None
    torchrun = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launched(torchrun) == (World(5, 8, 1), "env://")
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70001", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    assert launched(slurm) is None  # a batch script: the job has tasks, this process is none of them
    assert launched({**slurm, "SLURM_STEP_NUM_TASKS": "4"}) == (World(3, 4, 1), "tcp://10.0.0.1:20001")
    with joined("cpu", {}) as world:
        assert world is ALONE


@pytest.mark.parametrize(
    ("launcher", "local_rank", "devices", "found"),
    [
        ("srun", 1, 8, 1),
        ("srun", 3, 1, None),
        ("srun, --gpus-per-task 1", 3, 1, 0),  # each task is shown its own device alone
        ("srun, --gpus-per-task 2", 1, 2, 0),
        ("srun, bound", 3, 1, 0),
        ("srun, bound", 2, 0, None),
        ("torchrun", 1, 8, 1),
        ("torchrun", 3, 1, None),
    ],
)
def test_each_process_takes_its_own_device(
    launcher: str, local_rank: int, devices: int, found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def begin(backend: str, **words: object) -> None:
        assert backend == "cpu:gloo,cuda:nccl"
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "init_process_group", begin)
    rank = str(local_rank)
    names = {
        "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    }
    environment = dict(zip(names[launcher.partition(",")[0]], (rank, "8", rank), strict=True))
    if "gpus-per-task" in launcher:
        environment["SLURM_GPUS_PER_TASK"] = launcher[-1]
    if "bound" in launcher:
        environment["SLURM_GPUS_ON_NODE"] = "4"
    environment |= {"SLURM_JOB_ID": "7", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    with pytest.raises(InterruptedError if found is not None else ValueError), joined("cuda", environment):
        pass
    assert taken == ([] if found is None else [found])


def test_work_is_dealt_evenly_and_whole() -> None:
    shares = World(0, 3).deal([9, 1, 1, 8, 7, 1, 1])
    assert shares == [[0, 6], [2, 3], [1, 4, 5]]  # 9 and 1; 8 and 1; 7 and two of 1


@pytest.mark.parametrize("judge", ["verifier", "policy"])
def test_rounds_with_a_judge_are_played_by_two_processes_as_by_one(
    judge: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "check.py").write_text("def score(prompt, response, row):\n    return len(set(response.split()))\n")
    keys: dict[str, object] = {
        "model_name_or_path": toy_folder(tmp_path / "model", max_position_embeddings=1024),
        "dataset_name": inputs[1],
        "judge": judge,
        "judge_cache": False,
        "rounds": 2,
        "responses_per_prompt": 3,
        "max_new_tokens": 12,
        "shard_prompts": 4,
        "beta": 0.05,
        "learning_rate": "1e-3",
        "per_device_train_batch_size": 4,
        "max_length": 96 if judge == "verifier" else 1024,
        "max_prompt_length": 48,
        "report_to": "none",
        "eval_dataset_name": inputs[1],
        "eval_max_samples": 5,
        "device": DEVICE.type,
    }
    extra = (
        {"verifier": f"{tmp_path / 'check.py'}:score"}
        if judge == "verifier"
        else {"judge_by": "logprobs", "judge_orders": "given"}
    )
    if judge == "policy":
        (template := tmp_path / "short.jinja").write_text("{{ question }} {{ a }} {{ b }}")
        extra |= {"judge_template": str(template)}
    for name, played in (("one", started.run), ("two", torchrun)):
        given = {**keys, **extra, "output_dir": tmp_path / name}
        command = ["-m", "sparring", "sppo", *(word for k, v in given.items() for word in (f"--{k}", str(v)))]
        done = played(command)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = figures(tmp_path / "one"), figures(tmp_path / "two")
    begun = one.pop(0), two.pop(0)
    assert begun[1] == pytest.approx(begun[0], rel=1e-4)  # the start on held-out prompts
    assert [line["eval/win_rate"] for line in two if "eval/win_rate" in line]
    assert one[0]["judge/comparisons"] == two[0]["judge/comparisons"] > 0
    assert one[0]["judge/failures"] == two[0]["judge/failures"] == 0
    first = [next(line for line in lines if "loss" in line) for lines in (one, two)]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-3)
    assert {line["round"] for line in two if "round" in line} == {0, 1}
    assert (tmp_path / "two" / "models" / "round-00002").is_dir()
