"""The ways to an implementation: Python callables, programs, libraries, models, files, a stream.

All but `Callables` speak the frames of `frames`; libraries, models and Python code of others run in
a process of their own, `worker`, so that the kit outlives whatever they do.
"""

from nsq_ref.conformance.ports.files import HEADER_FILE, Folder, write_files
from nsq_ref.conformance.ports.functions import Callables
from nsq_ref.conformance.ports.messages import (
    Hello,
    hello_frame,
    read_hello,
    reply_of,
    request_of,
    write_requests,
)
from nsq_ref.conformance.ports.process import Process
from nsq_ref.conformance.ports.stream import Stream
from nsq_ref.conformance.ports.targets import open_port, target_kind

__all__ = [
    "HEADER_FILE", "Callables", "Folder", "Hello", "Process", "Stream", "hello_frame", "open_port",
    "read_hello", "reply_of", "request_of", "target_kind", "write_files", "write_requests",
]  # fmt: skip
