"""CUDA paths on a simulated device: where tensors lie, what is waited for, the recorded step; but none of its kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="the device is a C++ extension"),
]
TESTS = Path(__file__).parent
FILES = [  # of which whole runs, and judges, are on the device that auto then finds
    "simulated/on_cuda.py",
    *(f"test_{name}.py" for name in ("loop", "run", "stages", "evaluator", "reference", "stopping", "lora")),
    *(f"test_judges_{name}.py" for name in ("models", "policy", "blender")),
]


@pytest.mark.parametrize(("file", "devices"), [*((file, 1) for file in FILES), ("test_two_processes.py", 2)])
def test_these_pass_where_there_are_simulated_devices(file: str, devices: int, tmp_path: Path) -> None:
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tests'}", str(TESTS / file)]
    # The plain form of FlexAttention, which it is computed by without a compiler, warns of itself.
    quiet = ["-W", "ignore:flex_attention called without torch.compile:UserWarning"]
    path = f"{TESTS / 'simulated'}:{TESTS.parent / 'src'}"
    done = subprocess.run(
        [sys.executable, *words, *quiet],
        env=os.environ | {"SIMCUDA": "1", "SIMCUDA_DEVICES": str(devices), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
