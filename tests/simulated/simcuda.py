"""A simulated CUDA device for PyTorch's CPU build: ``install()`` before anything asks for one. Values are real.

Tensors say cuda:0 and lie in the host's memory. What mixes devices raises what CUDA raises; what would wait for the
device is counted in ``waits``; a CUDA graph runs its kernels again on the memory that they had. ``torch.compile`` gives
functions back as they are, or traces them for the backend that SIMCUDA_COMPILE names: eager, aot_eager.
"""

import collections
import contextlib
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed

HERE, TOTAL = Path(__file__).parent, int(os.environ.get("SIMCUDA_MEMORY", 2**34))  # bytes that the device has
WATCHED = os.environ.get("SIMCUDA_WATCH", "/sparring/")  # in the path of code whose lines waits are counted by

COUNT = int(os.environ.get("SIMCUDA_DEVICES", 1))
OWN = int(os.environ.get("LOCAL_RANK", 0)) if COUNT > 1 else 0  # each process of a job has its own

waits: collections.Counter[tuple[str, str]] = collections.Counter()  # (operation, place in the code)
mode = "default"  # of set_sync_debug_mode
compiler = torch.compile


@functools.cache
def install() -> Any:
    """Make ``cuda`` a device of this process; the extension."""
    core: Any = built()
    core.listen(heard)
    patch(core)
    return core


def built() -> Any:
    """The extension, compiled where it has not been from this source."""
    from torch.utils.cpp_extension import include_paths

    source = HERE / "simcuda.cpp"
    digest = hashlib.blake2b(source.read_bytes() + torch.__version__.encode() + sys.version.encode(), digest_size=8)
    made = Path(os.environ.get("SIMCUDA_BUILT", tempfile.gettempdir())) / f"simcuda_{digest.hexdigest()}.so"
    if not made.exists():
        folders = [*include_paths(), sysconfig.get_paths()["include"]]
        library, half = Path(torch.__file__).parent / "lib", made.with_suffix(f".{os.getpid()}")
        words = ["-O1", "-shared", "-fPIC", "-std=c++20", "-DTORCH_EXTENSION_NAME=simcuda_core", str(source)]
        words += [
            *(f"-isystem{folder}" for folder in folders),
            f"-L{library}",
            "-lc10",
            "-ltorch_cpu",
            "-ltorch",
            "-ltorch_python",
        ]
        subprocess.run([os.environ.get("CXX", "c++"), *words, "-o", str(half)], check=True)
        half.rename(made)
    spec = importlib.util.spec_from_file_location("simcuda_core", made)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def heard(operation: str) -> None:
    """Count a wait by the innermost line of the watched code, or else of what is not PyTorch's."""
    place, frame = "", sys._getframe().f_back
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/_higher_order_ops/" in file:  # FlexAttention's plain form, which no device computes
            return
        if WATCHED in file or (not place and "/torch/" not in file):
            name = file.rpartition("/src/")[2].rpartition("site-packages/")[2]
            place = f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = None if WATCHED in file else frame.f_back
    waits[operation, place or "autograd's thread"] += 1
    if mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation ({operation}, {place})")


def patch(core: Any) -> None:
    """Let ``torch.cuda`` answer for one device."""
    cuda: Any = torch.cuda
    about = {"name": "simulated", "total_memory": TOTAL, "major": 9, "minor": 0, "multi_processor_count": 132}
    stream, random = Stream(), core.generator()
    allocated, most = (lambda *given: core.memory()[0]), (lambda *given: core.memory()[1])
    answers = {
        "is_available": True, "device_count": COUNT, "current_device": OWN, "is_initialized": True, "is_bf16_supported": True,
        "get_device_name": "simulated", "get_device_capability": (9, 0), "current_stream": stream,
        "get_device_properties": types.SimpleNamespace(**about), "_is_in_bad_fork": False, "_exchange_device": OWN,
        "_maybe_exchange_device": OWN, "is_current_stream_capturing": False,
    }  # fmt: skip
    nothing = ("_lazy_init", "init", "empty_cache", "set_device", "_lazy_call", "ipc_collect")
    for name, answer in (answers | dict.fromkeys(nothing)).items():
        setattr(cuda, name, lambda *given, answer=answer, **more: answer)
    cuda.memory_allocated = cuda.memory_reserved = allocated
    cuda.max_memory_allocated, cuda.mem_get_info = most, lambda *given: (TOTAL - allocated(), TOTAL)
    cuda.reset_peak_memory_stats = lambda *given: core.reset_peak()
    cuda.waits = waits  # which no real device has
    cuda.synchronize, cuda.set_sync_debug_mode = lambda *given: heard("synchronize"), debug
    cuda.get_rng_state = lambda *given: random.get_state()
    cuda.set_rng_state = lambda state, *given: random.set_state(state)
    cuda.manual_seed = cuda.manual_seed_all = random.manual_seed
    cuda.default_generators, cuda._initialized = (random,) * COUNT, True
    cuda.stream = cuda.device = lambda *given, **more: contextlib.nullcontext()
    cuda.CUDAGraph, cuda.graph, cuda.Stream, cuda.Event = core.Graph, recorded, Stream, Event
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
    torch.compile, clone = compiled, torch.UntypedStorage.clone
    resize = torch.UntypedStorage.resize_
    torch.UntypedStorage.resize_ = lambda storage, size: (
        resize(storage, size) if storage.device.type == "cpu" else core.resize(storage, size) or storage
    )
    dist: Any = torch.distributed
    dist.init_process_group = functools.partial(initialised, begin=dist.init_process_group)
    torch.UntypedStorage.clone = lambda storage: clone(storage) if storage.device.type == "cpu" else copied(storage)


class Stream:
    """One of many that are one: what was launched on any of them is done."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.device = torch.device("cuda", OWN)

    def wait_stream(self, other: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Any = None) -> Any:
        """What has happened already."""
        return event or Event()


class Event:
    """What has happened already."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Nothing to mark."""


def initialised(backend: str, *args: Any, begin: Any = None, **options: Any) -> None:
    """As ``init_process_group``, with gloo in NCCL's place, which takes its name for what asks."""
    begin(backend.replace("nccl", "gloo"), *args, **options)
    torch.distributed.get_backend_config = lambda group=None: backend  # type: ignore[assignment]


def debug(wanted: Any) -> None:
    """As ``torch.cuda.set_sync_debug_mode``."""
    globals()["mode"] = wanted


@contextlib.contextmanager
def recorded(graph: Any, *args: Any, **options: Any) -> Any:
    """As ``torch.cuda.graph``, except that what is recorded runs, too."""
    graph.record(True)
    try:
        yield
    finally:
        graph.record(False)


def copied(storage: Any) -> Any:
    """A storage like it on the device, as ``copy.deepcopy`` wants."""
    return torch.empty(storage.nbytes(), dtype=torch.uint8, device="cuda").untyped_storage().copy_(storage)


def compiled(model: Any = None, **options: Any) -> Any:
    """As ``torch.compile``, without a compiler; what asks for the backend eager, as FlexAttention does, has it."""
    backend = options.get("backend") or os.environ.get("SIMCUDA_COMPILE")
    if model is None:
        return lambda function: compiled(function, **options)
    return compiler(model, **options | {"backend": backend, "mode": None}) if backend else model
