"""Numba twins of `spec`, compiled when they are first called; `attention` is imported by its user.

`rows` and `codec` are held by bits, `attention` by a tolerance (A3). `compilation` says how all of
them are compiled and kept, `threads` who does the work.
"""

from nsq_ref.kernels.codec import decode, encode

__all__ = ["decode", "encode"]
