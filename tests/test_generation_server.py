"""Generation through servers: the tokens that a local writer writes, and every response asked for once, whatever dies."""

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faultserver import END, FaultServer, answer, written
from small import tiny_llama
from toyrun import toy_folder, write_rows
from toys import toy_tokenizer

from sparring.actors.launch import Launched, serving
from sparring.actors.local import LocalWriter
from sparring.actors.server import ServerWriter
from sparring.actors.servers import Running, ServerFailed, Servers, check_servers, running
from sparring.config import GenerationConfig, ModelConfig
from sparring.data.chat import Chat
from sparring.data.parquet import read
from sparring.methods.base import Request, Sampling, Writing
from sparring.methods.sppo import SPPO
from sparring.methods.tso import TSO
from sparring.model.policy import load_chat
from sparring.records import Candidate, Pair, tokens
from sparring.run import train

HERE = Path(__file__).parent
SAMPLED = Sampling(0.7, 0.9, 40)
FAST: dict[str, Any] = {"concurrency": 4, "timeout": 30.0, "retries": 3}
ONE_BY_ONE: dict[str, Any] = {"concurrency": 1, "timeout": 20.0, "retries": 9}


@pytest.fixture(scope="module")
def chat() -> Chat:
    made = Chat(toy_tokenizer("chatml"))
    assert END in made.end_ids
    return made


def requests(count: int, limit: int = 20) -> list[Request]:
    return [Request(tokens([5, 6, 7 + n]), limit, 2**40 + n) for n in range(count)]


def right(asked: list[Request]) -> list[Writing]:
    """What the fault server writes."""
    bodies = [{"prompt": list(r.token_ids), "seed": r.seed % 2**31, "max_tokens": r.max_new_tokens} for r in asked]
    return [Writing(tokens(ids), ids[-1] == END) for ids in map(written, bodies)]


def writer(chat: Chat, *servers: FaultServer, **more: Any) -> ServerWriter:
    return ServerWriter(Running([s.url for s in servers]), chat, **({"source": lambda: "policy@3"} | FAST | more))


def test_two_servers_share_the_requests_and_the_responses_are_the_servers_own_tokens_in_order(chat: Chat) -> None:
    def slow(number: int, body: dict[str, Any]) -> Any:
        time.sleep(0.02)
        return answer(body)

    asked, ticks = requests(30, limit=6), []
    with FaultServer(plan=slow) as a, FaultServer(plan=slow) as b:
        mine = writer(chat, a, b, tick=ticks.append)
        assert mine.write(asked, SAMPLED) == right(asked)
        assert len(a.asked) + len(b.asked) == 30
        assert min(len(a.asked), len(b.asked)) >= 10
        assert a.most_busy + b.most_busy <= FAST["concurrency"]
        assert sum(ticks) == mine.tally["requests"] == 30
    assert {w.finished for w in right(asked)} == {True, False}
    body = a.asked[0]
    assert (body["temperature"], body["top_p"], body["top_k"], body["stop_token_ids"]) == (0.7, 0.9, 40, [END])
    assert {r["seed"] for r in a.asked + b.asked} == set(range(30))  # 2^40 + n, mod 2^31
    assert body["model"] == "toy"  # the first that it lists


@pytest.mark.parametrize("fault", ["500", "429", "garbage", "nonsense", "drop", "stall", "drip"])
def test_a_request_that_fails_is_asked_again_and_no_other(chat: Chat, fault: str) -> None:
    faults = {"garbage": "<html>bad gateway</html>", "nonsense": {"choices": [{"text": "a"}]}}
    bad = (int(fault), "no") if fault.isdigit() else faults.get(fault, fault)
    asked, times = requests(8), dict[int, list[float]]()
    with FaultServer(plan=lambda number, body: bad if number == 3 else answer(body)) as server:
        mine = writer(chat, server, timeout=1.0 if fault in ("stall", "drip") else 30.0)
        assert mine.write(asked, SAMPLED) == right(asked)
        assert len(server.asked) == 9
        assert mine.tally["retries"] == 1
    for body in server.asked:
        times.setdefault(body["prompt"][-1], []).append(body["at"])
    [[first, second]] = [each for each in times.values() if len(each) > 1]
    # The first rest of a server, or as long as it asked for, or after the timeout.
    assert {"429": 0.9, "stall": 1.4, "drip": 1.4}.get(fault, 0.4) < second - first < 8.0


def test_a_dead_server_beside_a_living_one_costs_retries_only(chat: Chat) -> None:
    asked = requests(40)
    with FaultServer() as alive, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens
        dead = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        mine = ServerWriter(Running([dead, alive.url]), chat, source=str, **(FAST | {"retries": 1}))
        assert mine.write(asked, SAMPLED) == right(asked)
        assert len(alive.asked) == 40
        assert 1 <= mine.tally["retries"] <= 20


def test_a_server_that_never_answers_ends_the_round_and_says_so(chat: Chat, tmp_path: Path) -> None:
    with FaultServer(plan=lambda number, body: answer(body) if number < 2 else (503, "loading")) as server:
        mine = writer(chat, server, retries=1, concurrency=1, kept=tmp_path / "kept.jsonl")
        with pytest.raises(ServerFailed, match=r"2 tries.*503 loading"):
            mine.write(requests(4), SAMPLED)
        assert len(server.asked) == 4
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 2


def test_a_refused_request_is_not_asked_again(chat: Chat) -> None:
    def plan(number: int, body: dict[str, Any]) -> Any:
        return (400, "prompt is too long") if body["prompt"][-1] == 9 else answer(body)

    with FaultServer(plan=plan) as server:
        mine = writer(chat, server, concurrency=1)
        with pytest.raises(ValueError, match=r"refuses a request for toy: token ids: 400 prompt is too long"):
            mine.write(requests(5), SAMPLED)
        assert len(server.asked) == 3


def test_a_key_comes_from_the_environment_and_stands_in_no_error_and_no_file(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    monkeypatch.setenv("OPENAI_API_KEY", "not for you")
    said = iter([(400, "you sent s3cret"), (400, "s3cret"), (400, "s3cret"), (401, "s3cret"), (500, "s3cret")])
    with FaultServer(plan=lambda number, body: answer(body) if number == 0 else next(said)) as server:
        config = GenerationConfig(generation_backend="server", server_urls=server.url, server_api_key_env="MY_KEY")
        keyed = running(config)
        options: dict[str, Any] = {**FAST, "concurrency": 1, "retries": 0, "kept": tmp_path / "kept"}
        ServerWriter(keyed, chat, source=str, **options).write(requests(1), SAMPLED)
        for problem in (ValueError, ValueError, ServerFailed):
            with pytest.raises(problem) as error:
                ServerWriter(keyed, chat, source=str, **options).write(requests(2)[1:], SAMPLED)
            assert "s3cret" not in str(error.value) + repr(error.value.__cause__)
        assert server.keys == {"Bearer s3cret"}
        monkeypatch.delenv("MY_KEY")
        ServerWriter(running(config), chat, source=str, **FAST).write([], SAMPLED)
        assert running(config).api_key is None
        server.plan = lambda number, body: answer(body)
        ServerWriter(running(config), chat, source=str, **FAST).write(requests(1), SAMPLED)
        assert "Bearer not for you" not in server.keys
    assert "s3cret" not in (tmp_path / "kept").read_text()


def test_what_was_written_is_read_from_the_disk_unless_something_of_it_changed(chat: Chat, tmp_path: Path) -> None:
    file, asked = tmp_path / "deep" / "kept.jsonl", requests(6)
    with FaultServer() as server:
        assert writer(chat, server, kept=file).write(asked + asked[:2], SAMPLED) == right(asked + asked[:2])
        assert len(server.asked) == 6  # the same request twice is asked once
        again = writer(chat, server, kept=file)
        assert again.write(asked, SAMPLED) == right(asked)
        assert (len(server.asked), again.tally["kept"], again.tally["requests"]) == (6, 6, 0)
        others: list[tuple[dict[str, Any], list[Request], Sampling]] = [
            ({"source": lambda: "policy@4"}, asked, SAMPLED),
            ({"model_id": "other"}, asked, SAMPLED),
            ({}, asked, Sampling(0.7, 0.9, 41)),
            ({}, requests(6, limit=19), SAMPLED),
            ({}, [Request(r.token_ids, 20, r.seed + 100) for r in asked], SAMPLED),
        ]
        for number, (changes, rows, sampling) in enumerate(others, start=2):
            writer(chat, server, kept=file, **changes).write(rows, sampling)
            assert len(server.asked) == 6 * number
    # No server is asked, or there, where the disk has all.
    assert writer(chat, server, kept=file).write(asked, SAMPLED) == right(asked)


def test_a_torn_line_is_written_anew_and_spoils_no_other(chat: Chat, tmp_path: Path) -> None:
    file, asked = tmp_path / "kept.jsonl", requests(4)
    with FaultServer() as server:
        writer(chat, server, kept=file, concurrency=1).write(asked, SAMPLED)
        file.write_bytes(file.read_bytes()[:-9])
        assert writer(chat, server, kept=file).write(asked, SAMPLED) == right(asked)
        assert len(server.asked) == 5
        assert writer(chat, server, kept=file).write(asked, SAMPLED) == right(asked)
        assert len(server.asked) == 5


KILLED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from sparring.actors.server import ServerWriter
from sparring.actors.servers import Running
from sparring.methods.base import Request, Sampling
from sparring.methods.sppo import SPPO
from sparring.methods.tso import TSO
from sparring.model.policy import load_chat
from sparring.records import Candidate, Pair, tokens
from sparring.run import train

chat = SimpleNamespace(end_ids={1}, end_id=1)
asked = [Request(tokens([5, 6, 7 + n]), 20, 2**40 + n) for n in range(40)]
writer = ServerWriter(Running([sys.argv[1]]), chat, source=lambda: "policy@3", kept=Path(sys.argv[2]), concurrency=4)
writer.write(asked, Sampling(0.7, 0.9, 40))
"""


def test_after_a_kill_in_mid_write_only_the_rest_is_asked_for(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    with FaultServer(plan=lambda number, body: answer(body) if number < 20 else "stall") as server:
        process = subprocess.Popen([sys.executable, "-c", KILLED, server.url, str(file)])
        wait_until(lambda: file.exists() and len(file.read_bytes().splitlines()) == 20)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = [tuple(body["prompt"]) for body in server.answered]
        server.plan = lambda number, body: answer(body)
        assert writer(chat, server, kept=file).write(requests(40), SAMPLED) == right(requests(40))
        after = [tuple(body["prompt"]) for body in server.answered[20:]]
    assert (len(before), len(after)) == (20, 20)
    assert not set(before) & set(after)


def test_text_alone_is_tokenized_as_a_continuation_and_an_end_is_added_only_where_one_was_written(chat: Chat) -> None:
    def says(text: str, reason: str, count: int | None = None, **more: Any) -> Writing:
        def plan(number: int, body: dict[str, Any]) -> Any:
            if not isinstance(body["prompt"], str) or "generation_config" in body:
                return 422, "unknown field"
            usage = {} if count is None else {"usage": {"prompt_tokens": 3, "completion_tokens": count}}
            return {"choices": [{"text": text, "finish_reason": reason} | more]} | usage

        with FaultServer(plan=plan) as server:
            mine = writer(chat, server)
            [writing] = mine.write([Request(prompt, 20, 1)], SAMPLED)
            assert (len(server.asked), server.asked[2]["prompt"], server.asked[2]["top_k"]) == (3, text_of_prompt, 40)
            assert (mine.tally["text_only"], mine.tally["prompts_differ"]) == (1, 0)
        differs.append(mine.tally["differs"])
        return writing

    differs: list[int] = []
    text_of_prompt, prompt = chat.prompt("How many clips?")
    assert text_of_prompt.startswith("<|im_start|>user")
    clips = chat.continuation("She sold 48 clips")
    assert chat.decode(clips) == "She sold 48 clips"
    assert says("She sold 48 clips", "stop") == Writing(tokens([*clips, chat.end_id]), True)
    assert says("She sold 48 clips", "stop", len(clips) + 1) == Writing(tokens([*clips, chat.end_id]), True)
    assert says("She sold 48 clips", "length", len(clips)) == Writing(tokens(clips), False)
    assert says("She sold 48 clips", "stop", stop_reason="\n\n") == Writing(tokens(clips), False)  # a stop string
    assert says("", "stop", 1) == Writing(tokens([chat.end_id]), True)
    assert differs == [0] * 5
    assert says("She sold 48 clips", "length", len(clips) + 1) == Writing(tokens(clips), False)  # it wrote others
    spelled = says("She sold 48 clips<|im_end|> and", "stop")  # in its letters, not as the token
    assert spelled == Writing(tokens(clips), False)
    long = says("clips " * 40, "stop")
    assert (len(long.token_ids), long.finished) == (20, False)
    assert differs[5:] == [1, 1, 1]


def test_bos_is_not_put_twice_before_a_prompt_that_is_sent_as_text() -> None:
    made, sent = Chat(toy_tokenizer("llama3")), []

    def plan(number: int, body: dict[str, Any]) -> Any:
        sent.append(body["prompt"])
        return {"choices": [{"text": "4", "finish_reason": "stop"}]} if isinstance(body["prompt"], str) else (400, "")

    text, ids = made.prompt("What is two and two?")
    assert text.startswith("<|begin_of_text|>")
    with FaultServer(plan=plan) as server:
        mine = writer(made, server)
        mine.write([Request(ids, 5, 1)], SAMPLED)
        assert sent[1] == text.removeprefix("<|begin_of_text|>")
        assert list(made.tokenizer(sent[1])["input_ids"]) == list(ids)
        assert mine.tally["prompts_differ"] == 0
        mine.write([Request(ids[1:], 5, 1)], SAMPLED)  # the server puts a BOS there that was not asked for
        assert mine.tally["prompts_differ"] == 1


def test_a_server_that_only_chats_is_sent_the_messages_where_they_are_known(chat: Chat) -> None:
    def plan(number: int, body: dict[str, Any]) -> Any:
        said = {"choices": [{"message": {"content": "four"}, "finish_reason": "stop"}]}
        return said if body["path"] == "/v1/chat/completions" else (404, "no such page")

    question = [{"role": "user", "content": "What is two and two?"}]
    with FaultServer(plan=plan) as server:
        asked = [Request(chat.prompt(question)[1], 9, 1)]
        mine = writer(chat, server, messages=lambda ids: question if ids == asked[0].token_ids else None)
        assert mine.write(asked, SAMPLED) == [Writing(tokens([*chat.continuation("four"), chat.end_id]), True)]
        assert server.answered[0]["messages"] == question
        with pytest.raises(ValueError, match="404 no such page"):
            writer(chat, server).write(asked, SAMPLED)


def test_it_writes_in_a_notebook_whose_loop_runs_already(chat: Chat) -> None:
    async def cell() -> list[Writing]:
        return writer(chat, server).write(requests(3), SAMPLED)

    with FaultServer() as server:
        assert asyncio.run(cell()) == right(requests(3))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "give either server_urls or server_command; neither is given"),
        ({"server_urls": "http://a/v1", "server_command": "vllm"}, "both are given"),
        ({"server_urls": "localhost:8000"}, "write a base URL"),
        ({"server_urls": "http://me:s3cret@a/v1"}, "more than the address of a: leave out user, password"),
        ({"server_command": "vllm serve --port {port}"}, r"without \{model\}"),
        ({"server_command": "python serve {model} --port {port}"}, r"open to the network: add --host \{host\}"),
        ({"server_command": "no-such {model} {host} {port}"}, "no program 'no-such'"),
        ({"server_command": "vllm '{model} {host} {port}"}, "No closing quotation"),
    ],
)
def test_keys_that_cannot_work_are_refused_before_time_is_spent(keys: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_servers(GenerationConfig(generation_backend="server", **keys))  # type: ignore[arg-type]
    assert "s3cret" not in str(error.value)


def wait_until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if Path("/proc").exists() else True
    )


def command(*ways: str) -> str:
    """The fault server as a command that Sparring starts."""
    return f"{sys.executable} -S {HERE / 'faultserver.py'} {{port}} {{model}} {' '.join(ways)} 127.0.0.1"


def launched(folder: Path, *ways: str, **more: Any) -> Launched:
    return Launched(command(*ways), folder, folder / "log" / "server.log", **({"model": "toy", "retries": 5} | more))


def pids(folder: Path, name: str = "starts") -> list[int]:
    return [int(line) for line in (folder / name).read_text().splitlines()]


def test_a_server_that_dies_in_mid_round_is_started_again_and_asked_for_what_is_missing(
    chat: Chat, tmp_path: Path
) -> None:
    config = GenerationConfig(
        generation_backend="server", server_command=command("die:12"), server_model="toy", server_retries=5
    )
    asked = requests(40)
    with serving(config, tmp_path, tmp_path / "server.log") as servers:
        mine = ServerWriter(servers, chat, source=lambda: "policy@3", **FAST)
        assert not (tmp_path / "starts").exists()  # nothing was asked yet
        assert mine.write(asked, SAMPLED) == right(asked)
        assert len(pids(tmp_path)) == 4  # 12 answers each
        assert alive(pids(tmp_path)[-1])
    assert not any(map(alive, pids(tmp_path)))
    answered = Counter((tmp_path / "answered").read_text().splitlines())
    assert len(answered) == 40
    # What was under way when it died may have been answered without our hearing of it; nothing else was asked again.
    assert answered.total() <= 40 + 3 * FAST["concurrency"]


def test_a_server_that_dies_too_often_ends_the_round_with_the_end_of_its_log(chat: Chat, tmp_path: Path) -> None:
    server = launched(tmp_path, "die:3", retries=1)
    mine = ServerWriter(server, chat, source=str, kept=tmp_path / "kept", **ONE_BY_ONE)
    with pytest.raises(ServerFailed, match=r"died \(code 137\) after 1 restarts.*(?s:.)*started as"):
        mine.write(requests(40), SAMPLED)
    assert len(pids(tmp_path)) == 2
    assert len((tmp_path / "kept").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("way", "message", "starts"),
    [
        ("broken", "ended with code 1 before it answered", 1),
        ("deaf", "did not answer within server_start_timeout, 2 s", 1),
    ],
)
def test_a_server_that_does_not_come_up_is_an_error_with_the_end_of_its_log(
    way: str, message: str, starts: int, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")  # as torchrun sets it for us
    left: list[float] = []
    server = launched(tmp_path, way, "--key", "{token}", start_timeout=2.0, waiting=left.append)
    with pytest.raises(ServerFailed, match=message) as error:
        ServerWriter(server, chat, source=str, **FAST).write(requests(1), SAMPLED)
    assert "'--key', '***'" in str(error.value)
    assert "with ['VLLM_API_KEY']" in str(error.value)
    assert ("CUDA out of memory" in str(error.value)) == (way == "broken")
    assert server.api_key not in str(error.value)
    assert len(pids(tmp_path)) == starts
    assert not alive(pids(tmp_path)[0])
    assert left == sorted(left, reverse=True)
    assert left[0] == pytest.approx(2.0, abs=0.2)
    assert len(left) > 2 or way == "broken"


def test_stopping_leaves_no_process_behind_even_one_that_left_the_group(tmp_path: Path) -> None:
    server = launched(tmp_path, "child")
    wait_until(server.up)
    server_pid, child_pid = pids(tmp_path)[0], pids(tmp_path, "child")[0]
    assert alive(server_pid)
    assert alive(child_pid)
    server.stop()
    assert not alive(server_pid)
    if sys.platform == "linux":
        assert not alive(child_pid)
    server.stop()  # a second time is nothing


ORPHANS = """
import sys, time
from pathlib import Path
from sparring.actors.launch import Launched
server = Launched(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[2]) / "server.log")
while not server.up():
    time.sleep(0.05)
print("up", flush=True)
time.sleep(60)
"""


def test_a_server_outlives_no_kill_of_its_owner(tmp_path: Path) -> None:
    words = [sys.executable, "-c", ORPHANS, command("child"), str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        assert alive(pids(tmp_path)[0])
        owner.kill()
    wait_until(lambda: not alive(pids(tmp_path)[0]))
    if sys.platform == "linux":
        wait_until(lambda: not alive(pids(tmp_path, "child")[0]))


SERVE = f"{sys.executable} -m transformers.cli.transformers serve {{model}} --host {{host}} --port {{port}}"
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Chat, Servers]]:
    """A small model whose tokens are single characters, as a folder, and `transformers serve` on it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = toy_tokenizer("chatml", kind="metaspace", vocab_size=10)
    made = Chat(tokenizer)
    model = tiny_llama(vocab_size=len(tokenizer), pad_token_id=made.pad_id, eos_token_id=made.end_id)
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight[made.end_id] = 1.5 * weight[5]  # some rows then end before their limit
    model.generation_config.update(do_sample=True, top_k=3, repetition_penalty=1.3)  # none of which we ask for
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    keys = {"server_command": f"{SERVE} --device cpu --dtype float32", "generation_backend": "server"}
    with serving(GenerationConfig(**keys), folder, folder / "server.log") as servers:  # type: ignore[arg-type]
        yield model, made, servers


def questions(made: Chat, limit: int) -> list[Request]:
    words = "What is two and two? How many clips did she sell in May?"
    return [Request(made.prompt(words[n : n + 20])[1], limit, n) for n in range(8)]


def test_transformers_serve_writes_greedily_what_the_local_writer_does(served: tuple[Any, Chat, Servers]) -> None:
    model, made, servers = served
    asked = questions(made, 24)
    local = LocalWriter(
        lambda: contextlib.nullcontext(model),
        source=str,
        decode=made.decode,
        end_ids=made.end_ids,
        pad_id=made.pad_id,
        batch_size=8,
    )
    mine = ServerWriter(servers, made, source=str, **ONE_BY_ONE)
    same, ends = 0, set()
    for request, theirs in zip(asked, local.write(asked, GREEDY), strict=True):
        before = mine.tally["differs"]
        [ours] = mine.write([request], GREEDY)
        sure = mine.tally["differs"] == before
        assert (ours == theirs) == sure  # what could not be told is counted, and nothing else
        same += sure
        ends |= {ours.finished} if sure else set()
    assert same >= 5
    assert ends == {True, False}
    assert (mine.tally["requests"], mine.tally["text_only"], mine.tally["prompts_differ"]) == (8, 8, 0)
    assert mine.tally["prompt_tokens"] == sum(len(request.token_ids) for request in asked)


def test_transformers_serve_draws_by_the_seed_where_it_is_asked_one_by_one(served: tuple[Any, Chat, Servers]) -> None:
    _, made, servers = served
    asked = questions(made, 12)[:4]
    first, second = (ServerWriter(servers, made, source=str, **ONE_BY_ONE).write(asked, SAMPLED) for _ in range(2))
    assert first == second
    others = [Request(request.token_ids, 12, request.seed + 50) for request in asked]
    assert ServerWriter(servers, made, source=str, **ONE_BY_ONE).write(others, SAMPLED) != first


def test_a_run_has_a_server_of_its_own_in_each_round_with_that_rounds_weights(tmp_path: Path) -> None:
    model, data = toy_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 12)
    log, script = tmp_path / "log", tmp_path / "serve.py"
    script.write_text(
        "import hashlib, pathlib, runpy, sys\n"
        "weights = pathlib.Path(sys.argv[2], 'model.safetensors').read_bytes()\n"
        f"with open({str(log)!r}, 'a') as file: file.write(hashlib.md5(weights).hexdigest() + '\\n')\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        f"runpy.run_path({str(HERE / 'faultserver.py')!r}, run_name='__main__')\n"
    )
    verifier = tmp_path / "verifier.py"
    verifier.write_text("def score(prompt, response, row): return len(set(response)) / 100\n")
    keys: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "monitor_steps": 0, "quiet": True}
    keys |= {"max_length": 96, "max_prompt_length": 48, "judge": "verifier", "verifier": f"{verifier}:score"}
    keys |= {"generation_backend": "server", "server_model": "toy", "eval_dataset_name": str(data)}
    keys["server_command"] = f"{sys.executable} {script} {{port}} {{model}} 127.0.0.1"
    sppo = SPPO(rounds=2, responses_per_prompt=3, max_new_tokens=12, beta=0.05)
    run = train(sppo, model_name_or_path=str(model), dataset_name=str(data), output_dir=str(tmp_path / "run"), **keys)
    assert run.state == "finished"
    served = log.read_text().split()
    weights = [hashlib.md5(f.read_bytes()).hexdigest() for f in sorted(run.folder.glob("models/*/model.safetensors"))]
    assert list(dict.fromkeys(served))[1:] == weights  # the start's, which are written anew for a server, come first
    assert len(served) == 3  # the start's and each round's: what is evaluated after a round writes the next one too
    sources = [
        {c.response.source for file in run.folder.glob(f"rounds/{n:05d}/responses/*") for c in read(file, Candidate)}
        for n in (0, 1)
    ]
    assert sources == [{"policy@0"}, {f"policy@{run.metrics[-1]['step'] // 2:.0f}"}]


def test_a_server_stands_in_a_matrix_and_its_text_is_tokenized_as_ours(tmp_path: Path) -> None:
    model, data = toy_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 8)

    def chats(number: int, body: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": 0, "message": {"role": "assistant", "content": "one two ten"}, "finish_reason": "stop"}
        return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": 4}}

    keys: dict[str, Any] = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "monitor_steps": 0, "quiet": True}
    keys |= {"max_length": 96, "max_prompt_length": 48, "dataset_name": str(data), "output_dir": str(tmp_path / "run")}
    with FaultServer(plan=chats) as server:
        entry = f"{server.url}#big"
        matrix = TSO(rounds=2, positives=("human",), negatives=(entry,), pairs_of_prompt=1, max_new_tokens=20)
        run = train(matrix, model_name_or_path=str(model), **keys)
    assert run.state == "finished"
    assert {body["model"] for body in server.asked} == {"big"}
    assert {body["messages"][0]["content"].partition(" to ")[0] for body in server.asked} == {"count"}
    assert len(server.asked) == 8  # each prompt once
    chat = load_chat(ModelConfig(model_name_or_path=str(model)))
    expected = [*chat.continuation("one two ten"), chat.end_id]
    theirs = [pair.rejected for file in run.folder.glob("rounds/*/pairs.parquet") for pair in read(file, Pair)]
    assert theirs
    assert all(r is not None and list(r.token_ids) == expected and r.finished for r in theirs)
    assert {r.source for r in theirs if r is not None} == {"big@0"}
