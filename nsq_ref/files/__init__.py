"""Files: quantized arrays in a checked safetensors container, and the arrays that users bring.

Files of `save` hold the parts of each `Quantized` as ``<name>.<part>``; those of `KVCache.save` and
of `save_feedback` are containers too. All are written whole or not at all.
"""

from nsq_ref.files.arrays import read_arrays, write_arrays
from nsq_ref.files.containers import holds_cache, is_quantized
from nsq_ref.files.errors import StorageError
from nsq_ref.files.feedback import load_feedback, save_feedback
from nsq_ref.files.quantized import load, save

__all__ = [
    "StorageError", "holds_cache", "is_quantized", "load", "load_feedback", "read_arrays", "save",
    "save_feedback", "write_arrays",
]  # fmt: skip
