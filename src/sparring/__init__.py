"""Sparring aligns a language model by letting it spar with itself."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparring.journal import Run
    from sparring.methods.best_of_k import BestOfK
    from sparring.methods.ipr import IPR
    from sparring.methods.offline import DPO, DPOP, IPO, KTO, ORPO, SFT, Hinge, SimPO, SPPOOffline
    from sparring.methods.sapo import SAPO
    from sparring.methods.spin import SPIN
    from sparring.methods.sppo import SPPO
    from sparring.methods.tso import TSO
    from sparring.records import Pair, Prompt, Response
    from sparring.run import resume, train

__all__ = [
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
PLACES = {  # looked up when first used: `import sparring` costs nothing, and the command line starts without PyTorch
    "sparring.methods.offline": ("DPO", "DPOP", "Hinge", "IPO", "KTO", "ORPO", "SFT", "SPPOOffline", "SimPO"),
    "sparring.methods.best_of_k": ("BestOfK",),
    "sparring.methods.ipr": ("IPR",),
    "sparring.methods.sapo": ("SAPO",),
    "sparring.methods.spin": ("SPIN",),
    "sparring.methods.sppo": ("SPPO",),
    "sparring.methods.tso": ("TSO",),
    "sparring.records": ("Pair", "Prompt", "Response"),
    "sparring.run": ("resume", "train"),
    "sparring.journal": ("Run",),
}


def __getattr__(name: str) -> Any:
    for module, names in PLACES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'sparring' has no attribute {name!r}")
