"""The conformance kit: tell any implementer which rule they broke, where and why.

`check` takes Python callables; ``nsq check`` takes shared libraries, programs and ONNX models too.

Examples
--------
>>> import nsq_ref as nsq
>>> from nsq_ref import conformance
>>> report = conformance.check(encode=nsq.quantize, scheme="naive4")
>>> print(conformance.as_text(report).splitlines()[-2])
CONFORMS SO FAR to naive4: encode ... cases.
"""

from nsq_ref.conformance.check import check
from nsq_ref.conformance.findings import Report
from nsq_ref.conformance.report import as_json, as_junit, as_text

__all__ = ["Report", "as_json", "as_junit", "as_text", "check"]
