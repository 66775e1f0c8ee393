"""The operators of the domain ``nsq`` as functions of standard ONNX operators."""

from __future__ import annotations

from nsq_ref.environment import extra
from onnx_export.attention_function import attention
from onnx_export.codec_functions import DOMAIN, VERSION, dequantize, quantize, scheme_attributes

with extra("onnx", __name__):
    import onnx

__all__ = ["DOMAIN", "VERSION", "functions", "scheme_attributes"]


def functions(opset: int = 21) -> list[onnx.FunctionProto]:
    """Return every function of the domain.

    A model that carries them runs wherever standard operators run; where a library has kernels of
    the same names, these run instead.

    Parameters
    ----------
    opset : int
        Of the standard operators, at least 21, as in the model.

    Returns
    -------
    list of onnx.FunctionProto

    Examples
    --------
    >>> [function.name for function in functions()]
    ['Quantize', 'Dequantize', 'Attention']
    """
    return [quantize(opset), dequantize(opset), attention(opset)]
