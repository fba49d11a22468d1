"""What has to stand in the environment before PyTorch and the Hugging Face libraries are imported, and what they leave behind."""

import gc
import os
import tempfile

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # the tests run side by side, one thread each
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["SPARRING_CACHE"] = tempfile.mkdtemp(prefix="sparring-cache-")  # not the home folder's


def pytest_collection_finish() -> None:
    """Half a million imported objects are not gone through again by each collection of garbage, 0.2 s every time."""
    gc.collect()
    gc.freeze()
