"""A program that answers frames, in the way that its argument says."""

from __future__ import annotations

import io
import os
import signal
import sys
import time

import numpy as np

from nsq_ref.conformance.operations import Answer
from nsq_ref.conformance.ports import reply_of
from nsq_ref.conformance.ports.frames import read_frame, write_frame

what = sys.argv[1]
requests, answers = sys.stdin.buffer, sys.stdout.buffer
if what == "exits at the start":
    sys.exit("no licence was found")
header = read_frame(requests)
if what == "greets":
    answers.write(b"Welcome to the quantizer, version 1.0\n")
    answers.flush()
if what == "cannot start":
    write_frame(answers, {"status": np.int32([3]), "message": np.frombuffer(b"no GPU", np.uint8)})
    sys.exit()
if what == "answers the header":
    header = {"hello": np.zeros(3, np.uint8)}
if what == "is slow to start":
    time.sleep(1000)
if what == "hangs":
    sys.stderr.write("waiting for a lock\n")
    sys.stderr.flush()
if what == "answers without reading":  # at once, so that no answer can come too late
    both = io.BytesIO()
    write_frame(both, header)
    write_frame(both, reply_of(0, Answer(0, {})))
    answers.write(both.getvalue())
    answers.flush()
    time.sleep(1000)
write_frame(answers, header)

if what == "reads nothing":
    time.sleep(1000)
if what == "writes before it reads":
    write_frame(answers, reply_of(0, Answer(0, {"packed": np.zeros(1 << 22, np.uint8)})))

while (request := read_frame(requests)) is not None:
    number = int(request["case"][0])
    reply = reply_of(number, Answer(0, {"packed": request["x"].view(np.uint8)}))
    if what == "hangs":
        time.sleep(1000)
    elif what == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "crashes at odd cases" and number % 2:
        os.abort()
    elif what == "exits":
        sys.stderr.write("line\n" * 100_000 + "out of memory\n")
        sys.exit(3)
    elif what == "closes its output":
        os.close(1)
        time.sleep(1000)
    elif what == "writes text":
        answers.write(b"norm = 3.5\xff\n")
        answers.flush()
        time.sleep(1000)
    elif what == "writes text for ever":
        while True:
            answers.write(b"no end\n" * 1000)
    elif what == "claims much":
        answers.write(b"NSQ1" + np.uint32([1]).tobytes() + b"packed".ljust(32, b"\0"))
        answers.write(np.uint32([0, 4, *[1 << 31] * 4]).tobytes())
        answers.flush()
        time.sleep(1000)
    elif what == "stops within an answer":
        os.write(1, b"NSQ1\1")
        sys.exit(2)
    elif what == "answers another case":
        reply["case"] += 1
    elif what == "gives no status":
        del reply["status"]
    elif what == "gives a status that is none":
        reply["status"] += 9
    elif what == "says that it failed":
        reply = {**reply, "status": np.int32([3]), "message": np.frombuffer(b"no \xe9", np.uint8)}
    elif what == "leaves a child":
        watched = os.open(sys.argv[2], os.O_WRONLY)
        if os.fork():
            sys.exit(7)
        time.sleep(20)
        os.write(watched, b"alive")
    elif what == "leaves a child in a session of its own":
        if os.fork():
            sys.exit(8)
        os.setsid()
        time.sleep(8)
        sys.exit()
    elif what == "writes before it reads":
        sys.exit()
    elif what == "tells its process":
        reply["packed"] = np.int32([os.getpid()])
    write_frame(answers, reply)
    if what == "goes on":
        answers.write(b"done.\n")
        answers.flush()
