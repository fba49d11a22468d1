"""With SIMCUDA=1 and this folder in PYTHONPATH every process of a run has the simulated device."""

import os

if os.environ.get("SIMCUDA") == "1":
    import simcuda
    import torch

    torch.set_num_threads(1)
    simcuda.install()
