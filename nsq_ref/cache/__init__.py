"""`KVCache`: keys and values of a running model, quantized block by block as tokens arrive.

A cache is rows (`state`); a row is two sequences that never change (`sequence`), in memory that is
written once and shared (`pages`). All that changes is one reference to them, by compare and swap.
"""

from nsq_ref.cache.kv_cache import KVCache
from nsq_ref.cache.state import StoredRow

__all__ = ["KVCache", "StoredRow"]
