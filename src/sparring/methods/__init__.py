"""The methods, by the name their command has. Looked up here, imported when used: the command line starts without PyTorch."""

from __future__ import annotations

import importlib

from sparring.keys import nearest

METHODS = {  # name: (module, class, what `sparring --help` says)
    "sapo": ("sapo", "SAPO", "Self-Augmented Preference Optimization, arXiv 2405.20830 (not 2511.20347)"),
    "sppo": ("sppo", "SPPO", "Self-Play Preference Optimization, arXiv 2405.00675"),
    "ipr": ("ipr", "IPR", "Iterative Pairwise Ranking with a budget (BCR), arXiv 2411.05875"),
    "tso": ("tso", "TSO", "Self-Training with Scaled Preference Optimization, arXiv 2409.02118"),
    "spin": ("spin", "SPIN", "Self-Play Fine-Tuning, arXiv 2401.01335"),
    "best_of_k": ("best_of_k", "BestOfK", "Fine-tuning on the judge's best of K (rejection sampling): the control"),
    "sft": ("offline", "SFT", "Supervised fine-tuning on prompts and responses"),
    "dpo": ("offline", "DPO", "Direct Preference Optimization on given pairs, arXiv 2305.18290"),
    "ipo": ("offline", "IPO", "Identity Preference Optimization on given pairs, arXiv 2310.12036"),
    "hinge": ("offline", "Hinge", "SLiC hinge on given pairs, arXiv 2309.06657"),
    "orpo": ("offline", "ORPO", "Odds Ratio Preference Optimization on given pairs, arXiv 2403.07691"),
    "simpo": ("offline", "SimPO", "Simple Preference Optimization on given pairs, arXiv 2405.14734"),
    "kto": ("offline", "KTO", "Kahneman-Tversky Optimization on given pairs, arXiv 2402.01306"),
    "sppo_offline": ("offline", "SPPOOffline", "SPPO's loss on given pairs with win rates, arXiv 2405.00675"),
    "dpop": ("offline", "DPOP", "DPO-Positive on given pairs, arXiv 2402.13228"),
}


def method(name: str) -> type:
    """The class of the method called ``name``; ValueError names the nearest one there is."""
    if name not in METHODS:
        raise ValueError(f"no method {name!r}{nearest(name, METHODS)} (there are {', '.join(METHODS)})")
    module, kind, _ = METHODS[name]
    found: type = getattr(importlib.import_module(f"sparring.methods.{module}"), kind)
    return found
