"""How much fidelity a scheme costs on real models: protocols, figures, and the demonstrations.

`evaluate` measures any list of methods on any decoder that runs here; docs/evaluation.md tells how.
"""

from onnx_export.evaluation.core import evaluate
from onnx_export.evaluation.methods import Method
from onnx_export.evaluation.models import CausalModel, Opened, open_model
from onnx_export.evaluation.protocols import Decode, Free, Lengths, Prefill, Protocol, Windows
from onnx_export.evaluation.results import Difference, Evaluation, Figures
from onnx_export.evaluation.store import Store

__all__ = [
    "CausalModel", "Decode", "Difference", "Evaluation", "Figures", "Free", "Lengths", "Method",
    "Opened", "Prefill", "Protocol", "Store", "Windows", "evaluate", "open_model",
]  # fmt: skip
