"""The command line: thin, with heavy imports inside the commands."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from sparring.config import PARTS, Config, keys_of, resolve
from sparring.keys import Flags, flags, nearest, read
from sparring.methods import METHODS, method
from sparring.recipes import read_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 1 failed or stopped, 2 wrong input."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, tuple[Callable[[list[str]], int], str]] = {
        **{name: (partial(_train, name), about) for name, (_, _, about) in METHODS.items()},
        "run": (
            _run,
            "The method of a recipe from its prompts to its model: generate, rank, pair, train, round after round",
        ),
        "generate": (partial(_stage, "generate"), "Responses of a model to prompts, as Parquet"),
        "rank": (partial(_stage, "rank"), "Responses with their ranks and win rates by a judge, as Parquet"),
        "pairs": (partial(_stage, "pairs"), "Pairs of ranked responses, as Parquet that the training commands read"),
        "demo": (_demo, "Make data, train a tiny model, align it, and print what it gained"),
        "plan": (_plan, "What a run would take of the device's memory, and whether it fits"),
        "evaluate": (_evaluate, "Held-out likelihood, samples, and a verifier's score of a model"),
        "judge-report": (_judge_report, "Whether a judge agrees with given pairs: people's, or another judge's"),
        "resume": (_resume, "Continue an interrupted run exactly where it would be"),
        "merge": (_merge, "Add a LoRA adapter into its base: an ordinary Hugging Face folder"),
        "status": (_status, "Where a run stands"),
        "inspect": (_inspect, "A run's pairs, the regenerated segment coloured against the human one"),
        "init-model": (_init_model, "Make a small model and its tokenizer from a data set, to start from nothing"),
        "doctor": (_doctor, "What this machine can do, and how a data set looks to a model"),
    }
    if not words or words[0] in ("-h", "--help", "help"):
        _overview({name: about for name, (_, about) in commands.items()})
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"sparring {version('sparring')}")
        return 0
    try:
        if words[0] not in commands:
            raise ValueError(f"no command {words[0]!r}{nearest(words[0], commands)} `sparring --help` lists them")
        return commands[words[0]][0](words[1:])
    except ValueError as problem:
        Console(stderr=True).print(f"[bold red]error:[/] {_escaped(str(problem))}", highlight=False, soft_wrap=True)
        return 2
    except OSError as problem:
        Console(stderr=True).print(f"[bold red]failed:[/] {_escaped(str(problem))}", highlight=False, soft_wrap=True)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def command() -> NoReturn:
    """The process's whole life: run a command and end with its exit code.

    One of several processes ends without Python's own clearing up: threads of collectives that outlive it sometimes abort the
    process then, and the launcher would call a finished run failed.
    """
    code = main()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _train(name: str, words: list[str]) -> int:
    kind = method(name)
    if _wants_help(words, kind, tuple(PARTS)):
        return 0
    given = _keys(name, flags(words))
    from sparring.run import train

    return _ended(train(kind, **given))


def _keys(name: str, given: Flags) -> Flags:
    """The keys of the recipe that is given, under those that are given beside it; ValueError for one that ``name`` lacks."""
    kind, recipe = method(name), _recipe(given)
    named = recipe.pop("method", name)
    if named != name:
        raise ValueError(f"the recipe is for {named}: run `sparring {named}` with it")
    known = keys_of(kind)
    unknown = next((key for key in given if key not in known), None)
    if unknown:
        raise ValueError(
            f"unknown key {unknown!r} for {name}{nearest(unknown, known)}; `sparring {name} --help` lists them"
        )
    return {**recipe, **given}


def _plan(words: list[str]) -> int:
    if not words or {"-h", "--help"} & set(words):
        print("sparring plan [METHOD] [--config RECIPE.yaml] [--key value ...] [--processes N] [--json]")
        print("What `sparring METHOD` with these words takes of the device's memory. Exit code 1: it does not fit.")
        return 0
    named = words.pop(0) if not words[0].startswith("--") else None
    given = flags(words)
    as_json = read("json", given.pop("json", False), bool)
    processes = read("processes", given.pop("processes", 1), int)
    name = named or _recipe(dict(given)).get("method")
    if name is None:
        raise ValueError("no method: write `sparring plan sapo ...`, or give a recipe with a method line by --config")
    keys = _keys(name, given)
    from sparring.report.plan import plan_json, plan_of, plan_view

    config = resolve(method(name), keys)
    with Console(stderr=True).status("going through the model without its weights"):
        plan = plan_of(config, processes)
    if as_json:
        print(json.dumps(plan_json(plan)))
    else:
        Console().print(plan_view(plan, config))
    return 0 if plan.fits else 1


def _resume(words: list[str]) -> int:
    from sparring.failures import CHANGEABLE

    about = f"Continue an interrupted run. Keys that may change on the way: {', '.join(CHANGEABLE)}."
    parser = argparse.ArgumentParser("sparring resume", "sparring resume RUN [--key value ...]", about)
    parser.add_argument("run", help="the run's folder, before any key")
    given = parser.parse_args(words[:1])
    from sparring.run import resume

    return _ended(resume(given.run, changes=flags(words[1:])))


def _ended(run: Any) -> int:
    from sparring.model.parallel import ALONE, launched

    world, _ = launched(os.environ) or (ALONE, "")
    console = Console(highlight=False, soft_wrap=True, quiet=not world.main)
    if run.state == "finished":
        console.print(f"[bold green]finished[/]  {run.model}")
        return 0
    console.print(f"[bold yellow]{run.state}[/]  {_escaped(run.message)}")
    return 0 if run.state == "interrupted" else 1


def _run(words: list[str]) -> int:
    if not words or {"-h", "--help"} & set(words):
        print("sparring run [METHOD] [--config RECIPE.yaml] [--key value ...]")
        print("The method, named or from the recipe, in one command: `sparring METHOD --help` lists its keys.")
        return 0
    named = words.pop(0) if not words[0].startswith("--") else None
    name = named or _recipe(dict(flags(words))).get("method")
    if name is None:
        raise ValueError("no method: write `sparring run sppo ...`, or give a recipe with a method line by --config")
    return _train(name, words)


def _stage(name: str, words: list[str]) -> int:
    from sparring import stages
    from sparring.progress import Bars

    kind, parts, work = stages.STAGES[name]
    if _wants_help(words, kind, parts):
        return 0
    given = flags(words)
    recipe = _recipe(given)
    folder = work(resolve(kind, recipe, given, parts=parts), Bars())
    Console(highlight=False, soft_wrap=True).print(f"[bold green]written[/]  {_escaped(str(folder))}")
    return 0


def _evaluate(words: list[str]) -> int:
    from sparring.evaluate.held_out import Evaluate

    def view(config: Config) -> Any:
        from sparring.report.evaluation import evaluation_report

        return evaluation_report(config)

    return _shown(words, Evaluate, ("model", "data", "generation"), view)


def _judge_report(words: list[str]) -> int:
    from sparring.evaluate.agreement import JudgeReport
    from sparring.report.agreement import judge_report

    return _shown(words, JudgeReport, ("judging", "model"), judge_report)


def _demo(words: list[str]) -> int:
    parser = argparse.ArgumentParser("sparring demo", description="The whole story on a tiny model, in a few minutes.")
    parser.add_argument("--output_dir", default="runs/demo", help="where everything goes (runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="root of every random stream (0)")
    given = parser.parse_args(words)
    from sparring.demo.play import play_demo

    return play_demo(Path(given.output_dir), given.seed)


def _merge(words: list[str]) -> int:
    parser = argparse.ArgumentParser("sparring merge", description="Add a LoRA adapter into its base.")
    parser.add_argument("adapter", help="a run's folder, an adapter's folder, or its name on the hub")
    parser.add_argument("--output_dir", type=Path, required=True, help="the Hugging Face folder to write; new or empty")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the base")
    given = parser.parse_args(words)
    from sparring.merge import merge

    done = merge(given.adapter, given.output_dir, trust_remote_code=given.trust_remote_code)
    Console(highlight=False, soft_wrap=True).print(f"[bold green]merged[/]  {_escaped(done)}")
    return 0


def _status(words: list[str]) -> int:
    parser = argparse.ArgumentParser("sparring status", description="Where a run stands.")
    parser.add_argument("run", type=Path, help="the run's folder")
    given = parser.parse_args(words)
    from sparring.report.terminal import status_view

    Console().print(status_view(given.run))
    return 0


def _inspect(words: list[str]) -> int:
    parser = argparse.ArgumentParser("sparring inspect", description="A run's pairs, side by side.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--round", type=int, default=None, help="which round; the last one where not given")
    parser.add_argument("--count", type=int, default=5, help="how many pairs (5)")
    given = parser.parse_args(words)
    from sparring.report.terminal import inspect_view

    Console().print(inspect_view(given.run, round=given.round, count=given.count))
    return 0


def _init_model(words: list[str]) -> int:
    from sparring.model.create import InitModel, init_model_from

    if _wants_help(words, InitModel, ("data",)):
        return 0
    config = resolve(InitModel, flags(words), parts=("data",))
    Console(highlight=False).print(f"[bold green]made[/]  {init_model_from(config)}")
    return 0


def _doctor(words: list[str]) -> int:
    from sparring.report.doctor import Doctor, doctor_report

    return _shown(words, Doctor, ("model", "data"), doctor_report)


def _shown(words: list[str], kind: type, parts: tuple[str, ...], view: Callable[[Config], Any]) -> int:
    """Print what ``view`` makes of the keys of ``kind`` and ``parts``, or their help."""
    if _wants_help(words, kind, parts):
        return 0
    given = flags(words)
    recipe = _recipe(given)
    Console().print(view(resolve(kind, recipe, given, parts=parts)))
    return 0


def _recipe(given: Flags) -> dict[str, Any]:
    name = given.pop("config", None)
    return read_recipe(name) if name else {}


def _wants_help(words: Sequence[str], kind: type, parts: Sequence[str]) -> bool:
    if not {"-h", "--help"} & set(words):
        return False
    from sparring.report.terminal import help_view

    Console().print(help_view(kind, parts))
    return True


def _overview(commands: dict[str, str]) -> None:
    console = Console()
    console.print("[bold]sparring[/] aligns a language model by letting it spar with itself.\n", highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, about in commands.items():
        table.add_row(f"  [bold cyan]{name}[/]", about)
    console.print(table)
    console.print("\n`sparring COMMAND --help` explains a command's keys.", highlight=False)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
