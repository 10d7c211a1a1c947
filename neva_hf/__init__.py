"""neva-hf: dial the values of a language model.

Importing this package makes the method `NEVA` known to PEFT, so that PEFT and transformers load neuron maps too.
"""

from ._version import __version__
from .base import DEFAULT_BASE, load_base
from .config import NeVAConfig
from .dial import dialled, get_strengths, set_strengths
from .errors import NeVAError
from .identify import identify_neurons
from .layer import NeVALayer
from .model import NeVAModel
from .neuron_map import NeuronMap
from .scenarios import Scenario, load_scenarios
from .tuner import NeVATuner
from .values import Value, ValueSystem, load_value_system

__all__ = [
    "DEFAULT_BASE",
    "NeVAConfig",
    "NeVAError",
    "NeVALayer",
    "NeVAModel",
    "NeVATuner",
    "NeuronMap",
    "Scenario",
    "Value",
    "ValueSystem",
    "__version__",
    "dialled",
    "get_strengths",
    "identify_neurons",
    "load_base",
    "load_scenarios",
    "load_value_system",
    "set_strengths",
]
