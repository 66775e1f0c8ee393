"""The reference for norm-separated quantization of LLM key/value caches (spec NSQ-1).

Examples
--------
>>> import numpy as np
>>> import nsq_ref as nsq
>>> keys = np.random.default_rng(0).standard_normal((8, 512, 64), dtype=np.float32)
>>> q = nsq.quantize(keys, nsq.Scheme.named("nsep+pchan4"))
>>> keys.astype(np.float16).nbytes / q.nbytes
3.73...
>>> restored = nsq.dequantize(q)
"""

import importlib
import sys
from typing import Any

from nsq_ref import attention, bounds, feedback
from nsq_ref.cache import KVCache
from nsq_ref.codec import Quantized, RangeError, dequantize, quantize
from nsq_ref.environment import CompilationWarning
from nsq_ref.feedback import Feedback
from nsq_ref.profiles import profile_names
from nsq_ref.renamed import Renamed
from nsq_ref.scheme import SPEC_VERSION, KeyValueSchemes, Scheme, scheme_names

__version__ = "0.1.0"

__all__ = [
    "SPEC_VERSION", "CompilationWarning", "Feedback", "KVCache", "KeyValueSchemes", "Quantized",
    "RangeError", "Scheme", "attention", "bounds", "conformance", "dequantize", "feedback",
    "profile_names", "quantize", "scheme_names",
]  # fmt: skip

RENAMED = {
    "nsq_ref.conformance.diagnose": "nsq_ref.conformance.judge.diagnose",
    "nsq_ref.conformance.exact": "nsq_ref.conformance.vectors.exact",
    "nsq_ref.conformance.flags": "nsq_ref.conformance.cases.flags",
    "nsq_ref.conformance.frames": "nsq_ref.conformance.ports.frames",
    "nsq_ref.conformance.pools": "nsq_ref.conformance.cases.pools",
    "nsq_ref.conformance.reference": "nsq_ref.conformance.mistakes.reference",
    "nsq_ref.conformance.worker": "nsq_ref.conformance.ports.worker",
    "nsq_ref.pages": "nsq_ref.cache.pages",
    "nsq_ref.sequence": "nsq_ref.cache.sequence",
    "nsq_ref.storage": "nsq_ref.files",
}
sys.meta_path.append(Renamed(RENAMED))


def __getattr__(name: str) -> Any:
    """Load `nsq_ref.conformance` when it is asked for: most who import nsq_ref do not need it."""
    if name == "conformance":
        return importlib.import_module("nsq_ref.conformance")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
