"""What mobius makes: Attention of opset 23, and static caches of opset 24.

    python mobius_onnx.py FOLDER_OF_FAMILIES

Flavour cpu is of `families.py FOLDER few`.

Made with mobius-onnx 0.1.0, onnx_ir 1.1.0, onnxscript 0.7.2 and transformers 5.24.0.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from one_file import keep

MADE = [
    ("llama", "default", []),
    ("llama", "static", ["--static-cache", "--max-seq-len", "96"]),
    ("llama", "cpu", ["--ep", "cpu"]),
    ("llama", "fp16", ["--dtype", "f16"]),
    ("qwen2", "default", []),
    ("qwen3", "default", []),
    ("qwen3", "static", ["--static-cache", "--max-seq-len", "96"]),
    ("gemma3", "default", []),
]


def main(families: Path) -> None:
    for family, flavour, options in MADE:
        with tempfile.TemporaryDirectory() as out:
            done = subprocess.run(
                [Path(sys.executable).parent / "mobius", "build", "--config", families / family,
                 out, *options],
                check=False, capture_output=True, text=True,
            )  # fmt: skip
            path = Path(out) / "model.onnx"
            if not path.exists():
                print(family, flavour, done.stderr[-2000:])
                continue
            keep(path, f"mobius-{family}-{flavour}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
