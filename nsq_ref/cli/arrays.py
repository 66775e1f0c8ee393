"""``nsq info``, ``quantize`` and ``dequantize``: files of arrays."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nsq_ref.cli.errors import about
from nsq_ref.cli.options import JsonOption, file_name, key_value_schemes, scheme_of
from nsq_ref.cli.output import print_json, print_table, progress

if TYPE_CHECKING:
    from nsq_ref import Quantized, Scheme

Backend = Literal["numba", "numpy", "oracle"]
BackendOption = Annotated[Backend, typer.Option(help="All give the same bytes; oracle is slow.")]
OutputOption = Annotated[
    Path,
    typer.Option(
        "--output", "-o", callback=file_name, help="A .safetensors file; replaced if it exists."
    ),
]


def info(
    file: Annotated[
        Path | None, typer.Argument(help="Quantized or plain arrays; checked in full.")
    ] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Show what a file holds; without a file, versions and schemes."""
    if file is None:
        _show_library(as_json)
        return
    from nsq_ref import files

    rows: list[dict[str, Any]]
    with progress(f"reading {file.name}", 1) as advance:
        if file.suffix.lower() == ".safetensors" and files.holds_cache(file):
            rows = _describe_cache(file)
        elif file.suffix.lower() == ".safetensors" and files.is_quantized(file):
            rows = _describe(files.load(file))
        else:
            rows = [
                _row(name, array.shape, array.dtype.name, None, 8.0 * array.itemsize,
                     array.nbytes, array.size, None)
                for name, array in files.read_arrays(file).items()
            ]  # fmt: skip
        advance()
    _show_arrays(file, rows, as_json)


def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A .npz, .npy or .safetensors of [..., T, D].")
    ],
    *,
    output: OutputOption,
    scheme: Annotated[
        str, typer.Option(help="A name of `nsq info`, or a pair such as small-3 or KIVI-K2V4.")
    ] = "nsep+pchan4",
    value_scheme: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another scheme for the values.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Change a field, as in --set block_size=128."
        ),
    ] = None,
    backend: BackendOption = "numba",
    as_json: JsonOption = False,
) -> None:
    """Quantize every array of a file.

    Where keys and values have different schemes, arrays are told apart by name: k, key or keys,
    and v, value or values, as in layers.0.keys.
    """
    schemes = key_value_schemes(scheme, value_scheme, changes or [])
    _require_output(source, output)
    from nsq_ref import codec, files

    arrays = files.read_arrays(source)
    chosen = {}
    for name in arrays:
        with about(str(source)):
            chosen[name] = scheme_of(name, schemes)
    quantized: dict[str, Quantized] = {}
    with progress(f"quantizing {source.name}", len(arrays)) as advance:
        for name, array in arrays.items():
            with about(f"{source}: array {name!r}"):
                quantized[name] = codec.quantize(array, chosen[name], backend=backend)
            advance()
        files.save(output, quantized)
    _show_arrays(output, _describe(quantized), as_json)


def dequantize(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A file that `nsq quantize` wrote.")
    ],
    *,
    output: OutputOption,
    backend: BackendOption = "numba",
    as_json: JsonOption = False,
) -> None:
    """Reconstruct every array of a file as float32."""
    _require_output(source, output)
    from nsq_ref import codec, files

    quantized = files.load(source)
    restored = {}
    with progress(f"dequantizing {source.name}", len(quantized)) as advance:
        for name, one in quantized.items():
            restored[name] = codec.dequantize(one, backend=backend)
            advance()
        files.write_arrays(output, restored)
    rows = [
        {"name": name, "shape": list(array.shape), "dtype": array.dtype.name}
        for name, array in restored.items()
    ]
    if as_json:
        print_json({"file": str(output), "arrays": rows})
    else:
        print_table(
            ("array", "shape", "dtype"), [(r["name"], r["shape"], r["dtype"]) for r in rows]
        )


def _require_output(source: Path, output: Path) -> None:
    if output.suffix.lower() != ".safetensors":
        raise ValueError(f"--output {output} must end in .safetensors, the format that is written")
    from nsq_ref.files import atomic

    atomic.require_writable(output)
    if source.exists() and output.exists() and os.path.samefile(source, output):
        raise ValueError(f"--output {output} is the input; choose another name, to keep both")


def _describe(arrays: Mapping[str, Quantized]) -> list[dict[str, Any]]:
    return [
        _row(name, one.shape, one.dtype.name, one.scheme, one.bits_per_element, one.nbytes,
             math.prod(one.shape), one.collapsed_tokens)
        for name, one in arrays.items()
    ]  # fmt: skip


def _row(
    name: str, shape: Sequence[int], dtype: str, scheme: Scheme | None, bits: float, size: int,
    elements: int, collapsed: int | None,
) -> dict[str, Any]:  # fmt: skip
    from nsq_ref.policy import scheme_text

    return {
        "name": name,
        "shape": list(shape),
        "dtype": dtype,
        "scheme": None if scheme is None else scheme.to_dict(),
        "scheme_name": None if scheme is None else scheme_text(scheme),
        "bits_per_element": bits,
        "bytes": size,
        "float16_bytes": 2 * elements,
        "collapsed_tokens": collapsed,
    }


def _describe_cache(file: Path) -> list[dict[str, Any]]:
    """Keys and values of a saved `KVCache`; what pads shorter rows is not stored nor counted."""
    from nsq_ref.cache import KVCache

    cache = KVCache.load(file)
    stored = [cache.stored(row) for row in range(cache.batch)]
    rows = []
    for side, scheme, channels in (
        ("keys", cache.key, cache.head_dim),
        ("values", cache.value, cache.value_head_dim),
    ):
        sides = [getattr(row, side) for row in stored]
        size = sum(one.nbytes for one in sides)
        elements = int(cache.lengths.sum()) * cache.kv_heads * channels
        shape = cache.batch, cache.kv_heads, len(cache), channels
        dtype = "-" if cache.dtype is None else cache.dtype.name
        bits = 8 * size / elements if elements else 0.0
        collapsed = sum(int(one.collapsed.sum()) for one in sides)
        row = _row(side, shape, dtype, scheme, bits, size, elements, collapsed)
        rows.append({**row, "lengths": cache.lengths.tolist()})
    return rows


def _show_library(as_json: bool) -> None:
    from nsq_ref import SPEC_VERSION, Scheme, __version__, profile_names, scheme_names
    from nsq_ref.profiles import wants_feedback

    tokens, head_dim = 4096, 128
    schemes = [
        (name, Scheme.named(name).bits_per_element(tokens, head_dim)) for name in scheme_names()
    ]
    profiles: list[dict[str, Any]] = []
    for name in profile_names():
        key, value = (one.bits_per_element(tokens, head_dim) for one in Scheme.named(name))
        profiles.append(
            {
                "name": name,
                "key_bits_per_element": key,
                "value_bits_per_element": value,
                "bits_per_element": (key + value) / 2,
                "wants_feedback": wants_feedback(name),
            }
        )
    if as_json:
        print_json(
            {
                "version": __version__,
                "spec": SPEC_VERSION,
                "tokens": tokens,
                "head_dim": head_dim,
                "schemes": [{"name": n, "bits_per_element": bits} for n, bits in schemes],
                "profiles": profiles,
            }
        )
        return
    typer.echo(f"nsq {__version__}, specification {SPEC_VERSION}")
    typer.echo(f"bits per element at {tokens} tokens of {head_dim} channels:")
    print_table(("scheme", "bits"), [(name, f"{bits:.3f}") for name, bits in schemes])
    typer.echo("Profiles, for keys and values; the number is bits with 64 channels:")
    print_table(
        ("profile", "bits", "of keys", "of values", ""),
        [
            (
                one["name"],
                *(f"{one[f'{of}bits_per_element']:.3f}" for of in ("", "key_", "value_")),
                "wants feedback: nsq onnx calibrate" if one["wants_feedback"] else "",
            )
            for one in profiles
        ],
    )
    typer.echo("Pairs for keys and values: KIVI-K2V4 and nsep+KIVI-K2V4, with any two widths.")


def _show_arrays(file: Path, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json({"file": str(file), "arrays": rows})
        return
    print_table(
        ("array", "shape", "dtype", "scheme", "bits", "bytes", "of float16", "collapsed tokens"),
        [
            (
                row["name"],
                row["shape"],
                row["dtype"],
                row["scheme_name"] or "-",
                f"{row['bits_per_element']:.3f}",
                f"{row['bytes']:,}",
                f"{row['bytes'] / row['float16_bytes']:.1%}" if row["float16_bytes"] else "-",
                "-" if row["collapsed_tokens"] is None else row["collapsed_tokens"],
            )
            for row in rows
        ],
    )
