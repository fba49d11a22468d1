"""What has to stand in the environment before PyTorch and the Hugging Face libraries are imported."""

import os
import tempfile

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # the tests run side by side, one thread each
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["SPARRING_CACHE"] = tempfile.mkdtemp(prefix="sparring-cache-")  # not the home folder's
