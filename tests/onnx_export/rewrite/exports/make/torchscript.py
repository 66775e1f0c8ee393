"""What optimum makes with TorchScript: the layout of the models of transformers.js.

    python torchscript.py FOLDER_OF_FAMILIES

Made with optimum-onnx 0.1.0, optimum 2.3.0, transformers 4.57.6 and torch 2.13.0.
"""

import sys
import tempfile
from pathlib import Path

from one_file import keep
from optimum.exporters.onnx import main_export

MADE = [("llama", 18), ("qwen3", 18), ("gemma2", 18), ("phi", 17)]


def main(families: Path) -> None:
    for family, opset in MADE:
        with tempfile.TemporaryDirectory() as out:
            main_export(
                str(families / family), out, task="text-generation-with-past", opset=opset,
                do_validation=False, no_post_process=False,
            )  # fmt: skip
            keep(Path(out) / "model.onnx", f"optimum-{family}-{opset}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
