"""What an older model builder of onnxruntime-genai makes, MultiHeadAttention among it.

    python genai_older.py FOLDER_OF_FAMILIES FOLDER_OF_FAMILIES_FEW

The folders are those of `families.py FOLDER` and `families.py FOLDER few`.

Made with onnxruntime-genai 0.11.4, onnx_ir 1.1.0, onnxruntime 1.32.0, torch 2.13.0 and
transformers 4.57.6.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from one_file import keep

MADE = [
    ("llama", "fp16", "cpu", 0),  # which repeats heads before the attention
    ("phi", "fp32", "cuda", 0),
    ("gemma3small", "fp32", "cpu", 1),
]


def main(folders: list[Path]) -> None:
    for family, precision, provider, folder in MADE:
        with tempfile.TemporaryDirectory() as out:
            subprocess.run(
                [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i",
                 folders[folder] / family, "-o", out, "-p", precision, "-e", provider, "-c", out],
                check=True,
            )  # fmt: skip
            keep(Path(out) / "model.onnx", f"genai011-{family}-{provider}-{precision}")


if __name__ == "__main__":
    main([Path(one) for one in sys.argv[1:]])
