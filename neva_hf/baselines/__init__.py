"""What people use instead of a neuron map, behind one small interface.

A new method is one function `(Evidence) -> Method` and one line in [`METHODS`].
"""

from .caa import caa
from .calibrate import calibrated
from .cna import cna
from .conva import conva
from .damage import damage_of
from .dpn_le import dpn_le
from .from_model import from_model
from .method import At, Dials, Evidence, Fit, Method
from .npti import npti
from .random_neurons import random_neurons
from .repe import repe
from .system_prompt import system_prompt

METHODS: dict[str, Fit] = {
    "System prompt": system_prompt,
    "CAA": caa,
    "RepE": repe,
    "ConVA": conva,
    "CNA": cna,
    "NPTI": npti,
    "DPN-LE": dpn_le,
    "Random neurons": random_neurons,
}
"""All baselines by the names that they have in tables."""

__all__ = [
    "METHODS",
    "At",
    "Dials",
    "Evidence",
    "Fit",
    "Method",
    "caa",
    "calibrated",
    "cna",
    "conva",
    "damage_of",
    "dpn_le",
    "from_model",
    "npti",
    "random_neurons",
    "repe",
    "system_prompt",
]
