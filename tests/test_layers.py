"""Imports run one way: a module imports, also lazily, only from layers above its own or from its own sub-package."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = """
    records seeds folders transfer
    keys
    losses ranking pairing config data.chat
    bounds
    data
    model methods.base buffer recipes
    methods.preference
    methods.rounds
    metrics model.dry progress interrupt
    methods actors judges archive learner model.parts checkpoint journal monitor card
    failures model.plan
    evaluate.held_out evaluate.agreement probe reference merge writers
    evaluate loop
    results
    savepoints chronicle
    session
    run stages
    report annotate demo __init__
    cli
    __main__
"""
RANK = {name: rank for rank, line in enumerate(LAYERS.split("\n")) for name in line.split()}
SRC = Path(__file__).parents[1] / "src" / "sparring"
MODULES = {".".join(p.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): p for p in SRC.rglob("*.py")}
HEAVY = ["torch", "transformers", "peft", "datasets"]


def layer(module: str) -> str:
    """The name in LAYERS under which a module of ours, ``methods.base`` say, stands."""
    names = [".".join(module.split(".")[:2]), module.split(".")[0]]
    found = [name for name in names if name in RANK]
    assert found, f"src/sparring/{names[1]} stands in no layer: add it to LAYERS in tests/test_layers.py"
    return found[0]


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write it out from sparring"
            names = [f"{node.module}.{name}" for name in names]
        for name in names:
            if name.split(".")[0] == "sparring":
                inner = name.partition(".")[2]
                yield inner if inner in MODULES else inner.rpartition(".")[0] or "__init__"


def allowed(module: str, target: str) -> bool:
    """Whether ``module`` may import ``target``: methods never import each other, except for the list of them."""
    here, there = layer(module), layer(target)
    return module in ("__init__", target) or RANK[there] < RANK[here] or here == there != "methods" or module == there


def test_imports_run_one_way() -> None:
    edges = [(module, target) for module, path in MODULES.items() for target in imported(path)]
    assert edges
    wrong = [f"{module} imports {target}" for module, target in edges if not allowed(module, target)]
    assert not wrong, "\n".join(wrong)


def test_every_module_stands_in_a_layer() -> None:
    assert all(layer(module) for module in MODULES)


def test_a_method_may_not_import_a_method_an_actor_a_judge_or_the_learner() -> None:
    assert not any(allowed("methods.sapo", t) for t in ("methods.dpo", "actors.local", "judges.llm", "learner", "run"))
    assert all(allowed("methods.sapo", target) for target in ("methods.base", "losses", "data.chat", "model.logps"))


def test_no_file_is_over_300_lines_without_saying_why() -> None:
    long = [path for path in MODULES.values() if len(path.read_text("utf-8").splitlines()) > 300]
    why = {path: ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "" for path in long}
    wrong = [str(path) for path in long if "over 300 lines because" not in " ".join(why[path].split())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        ([], []),
        (["status", "RUN"], []),
        (["sapo", "--help"], ["torch"]),  # for the losses
        (["plan", "--help"], []),
    ],
)
def test_what_only_tells_starts_without_what_takes_seconds_to_import(
    words: list[str], heavy: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("method: sapo\n")
    (tmp_path / "status.json").write_text(json.dumps({"state": "finished", "step": 1, "total_steps": 1, "message": ""}))
    given = [str(tmp_path) if word == "RUN" else word for word in words]
    code = (
        f"import sys, sparring.cli; c = sparring.cli.main({given}); print([n for n in {HEAVY} if n in sys.modules], c)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == [f"{heavy} 0"], done.stdout + done.stderr
