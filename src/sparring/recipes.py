"""Recipes: YAML files of flat keys, one for each published setting and for the demo. A run's config.yaml is one for its method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sparring.keys import nearest

HERE = Path(__file__).parent
FOLDERS = (HERE / "recipes", HERE.parents[1] / "recipes")  # in a wheel, in a checkout
ABOUT = (  # lines of a run's config.yaml that are no keys
    "versions",
    "changes",
    "start_fingerprint",
    "data_fingerprint",
    "evaluation_fingerprint",
    "judge_fingerprint",
)


def read_recipe(name: str | Path) -> dict[str, Any]:
    """The keys of a recipe, its ``method`` line included: a YAML file, or the name of one that comes with Sparring.

    Of a run's ``config.yaml``, which names the versions that it ran with, the lines that are no keys are left out.
    Raises ValueError where there is none of that name, or where it is no list of ``key: value`` lines.
    """
    shipped = [folder / f"{Path(name).stem}.yaml" for folder in FOLDERS]
    file = next((path for path in (Path(name), *shipped) if path.is_file()), None)
    if file is None:
        names = sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})
        raise ValueError(f"no recipe {name}{nearest(str(name), names)} (a YAML file, or one of {', '.join(names)})")
    try:
        keys = yaml.safe_load(file.read_text())
    except yaml.YAMLError as problem:
        raise ValueError(f"{file} is not YAML: {problem}") from problem
    if not isinstance(keys, dict):
        raise ValueError(f"{file} holds no keys: a recipe is a list of `key: value` lines")
    written_by_a_run = isinstance(keys.get("versions"), dict)
    return {key: value for key, value in keys.items() if not (written_by_a_run and key in ABOUT)}
