"""Ports as Python functions: a right one, and what can go wrong."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np

import nsq_ref as nsq
from nsq_ref.cache.pages import Change
from nsq_ref.cache.sequence import Sequence, Side

print("printed while importing")


def encode(x, scheme):
    return nsq.quantize(x, scheme)


def feedback(x, scheme, *, feedback):
    return nsq.quantize(x, scheme, feedback=feedback)


def decode(parts, scheme, shape):
    kind = parts["sinks"].dtype if "sinks" in parts else np.dtype(np.float32)
    return nsq.dequantize(nsq.Quantized(scheme, shape, kind, **parts))


def attend(query, keys, values, key_scheme, value_scheme, **options):
    decoded = [
        decode(
            {name: part for name, part in parts.items() if name != "shape"}, scheme, parts["shape"]
        )
        for parts, scheme in ((keys, key_scheme), (values, value_scheme))
    ]
    output = nsq.attention.attend(query[None], *(x[None] for x in decoded), **options).output
    return output[0].astype(np.float32)


def stream(x, scheme, steps, row, *, feedback=None):
    if not np.isfinite(x[row].astype(np.float32)).all():
        raise ValueError("x is not finite (I2)")
    if feedback is not None and feedback.kv_heads > 1:  # here each row is a sequence of one head
        own = slice(row, row + 1)
        feedback = nsq.Feedback(feedback.order[own], feedback.factor[own])
    sequence, used = Sequence.empty(Side(scheme, 1, x.shape[2], feedback=feedback)), 0
    for kind, *numbers in steps.tolist():
        if kind:
            sequence = sequence.cropped(min(numbers[row], sequence.length))
        else:
            with Change() as change:
                sequence = sequence.grown(x[row : row + 1, used : used + numbers[row]], change)
                change.write()
            used += numbers[row]
    stored = sequence.stored(x.dtype)
    sealed = {} if stored.sealed is None else stored.sealed.parts
    sinks = {"sinks": stored.sinks} if scheme.sink_tokens else {}
    parts = {**sealed, **sinks, "tail": stored.tail}
    return {name: part[0] for name, part in parts.items()}


stream_feedback = stream


def prints(x, scheme):
    print("to standard output")
    os.write(1, b"and past Python\n")
    sys.stdin.read()
    return encode(x, scheme)


def attributes(x, scheme):
    q = encode(x, scheme)
    return SimpleNamespace(packed=q.packed, scale=q.scale, norm=q.norm, zero=None)


def raises(x, scheme):
    return {}["no such key"]


def exits(x, scheme):
    sys.exit(4)


def exits_at_once(x, scheme):
    os._exit(5)


def crashes(x, scheme):
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(x, scheme):
    time.sleep(1000)


def closes_all_files(x, scheme):
    os.closerange(0, 100)
    time.sleep(1000)


def leaves_a_child(x, scheme):
    if os.fork():
        os._exit(6)
    time.sleep(1000)


def too_large(x, scheme):
    raise OverflowError("x is too large")


def not_yet(x, scheme):
    raise NotImplementedError("later")


def a_list(x, scheme):
    return [1, 2, 3]


def float64_scale(x, scheme):
    q = encode(x, scheme)
    return {**q.parts, "scale": q.scale.astype(np.float64)}


def an_object(x, scheme):
    return {**encode(x, scheme).parts, "norm": object()}


def wrong_name(x, scheme):
    return {"codes": np.zeros(3, np.uint8)}


def wrong_shape(x, scheme):
    return {**encode(x, scheme).parts, "packed": np.zeros((1, 2, 3), np.uint8)}


def endless(x, scheme):
    return {"packed": np.broadcast_to(np.uint8(0), (1 << 20, 1 << 20))}


def writes_to_x(x, scheme):
    q = encode(x, scheme)
    x[0, 0] += 1
    return q


def writes_to_packed(parts, scheme, shape):
    parts["packed"] ^= 0x88
    return zeros(parts, scheme, shape)


def zeros(parts, scheme, shape):
    return np.zeros(shape, np.float32)
