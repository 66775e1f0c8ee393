"""ONNX decoders, tokenizers and fidelity measurements for real language models."""

import sys

from nsq_ref.renamed import Renamed

RENAMED: dict[str, str] = {}
sys.meta_path.append(Renamed(RENAMED))
