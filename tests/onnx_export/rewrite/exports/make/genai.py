"""What the model builder of onnxruntime-genai makes.

    python genai.py FOLDER_OF_FAMILIES

The folder is that of `families.py FOLDER few`.

Made with onnxruntime-genai 0.18.0, onnx_ir 1.1.0, onnxruntime 1.32.0, torch 2.13.0 and
transformers 5.24.0.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from one_file import keep

MADE = [
    ("llama", "fp32", "cpu", []),
    ("llama", "fp16", "cuda", []),
    ("llama", "int4", "cpu", []),
    ("qwen2", "fp32", "cpu", []),
    ("qwen3", "fp32", "cpu", []),
    ("phi3", "int4", "cpu", []),
    ("phi", "fp32", "cpu", []),
    ("gemma2", "fp32", "cpu", []),
    ("mistral", "fp32", "cpu", []),
    ("phi3long", "fp32", "cpu", []),
    ("gptoss", "fp16", "cuda", []),
    ("qwen3", "int4", "webgpu", ["use_webgpu_fp32=true"]),  # norms within the attention
    ("qwen3", "int4", "webgpu", ["use_webgpu_fp32=true", "fuse_qk_norm_gqa=false"], "-apart"),
]


def main(families: Path) -> None:
    for family, precision, provider, options, *suffix in MADE:
        with tempfile.TemporaryDirectory() as out:
            done = subprocess.run(
                [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", families / family,
                 "-o", out, "-p", precision, "-e", provider, "-c", out]
                + (["--extra_options", *options] if options else []),
                check=False, capture_output=True, text=True,
            )  # fmt: skip
            path = Path(out) / "model.onnx"
            if not path.exists():
                print(family, precision, provider, done.stderr[-2000:])
                continue
            keep(path, f"genai-{family}-{provider}-{precision}{''.join(suffix)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
