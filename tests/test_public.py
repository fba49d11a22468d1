"""The public surface is small, sorted, resolvable and documented. Changing it starts with changing PUBLIC here."""

import ast
from pathlib import Path

import pytest

import sparring

PUBLIC = [
    "BestOfK",
    "DPO",
    "DPOP",
    "Hinge",
    "IPO",
    "IPR",
    "KTO",
    "ORPO",
    "Pair",
    "Prompt",
    "Response",
    "Run",
    "SAPO",
    "SFT",
    "SPIN",
    "SPPO",
    "SPPOOffline",
    "SimPO",
    "TSO",
    "resume",
    "train",
]
SRC = Path(__file__).parents[1] / "src" / "sparring"


def undocumented(path: Path) -> list[str]:
    """The public functions and classes at the top of a file that have no docstring, and the file itself."""
    tree = ast.parse(path.read_text("utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    missing = [f"{path.relative_to(SRC)}:{node.lineno} {node.name}" for node in nodes if not ast.get_docstring(node)]
    return missing if ast.get_docstring(tree) else [f"{path.relative_to(SRC)}:1 the module", *missing]


def test_all_is_exactly_the_public_list_in_sorted_order() -> None:
    assert sparring.__all__ == PUBLIC == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves_to_something_documented(name: str) -> None:
    doc = getattr(sparring, name).__doc__ or ""
    assert doc
    assert not doc.startswith(f"{name}("), f"{name} has only the docstring that dataclass made up"


def test_every_public_function_and_class_has_a_docstring() -> None:
    files = sorted(SRC.rglob("*.py"))
    assert files
    missing = [line for path in files for line in undocumented(path)]
    assert not missing, "\n".join(missing)
