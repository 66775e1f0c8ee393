"""The command as users run it: a process, its exit code, and what it prints where."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsq_ref import (
    KeyValueSchemes,
    KVCache,
    Scheme,
    __version__,
    dequantize,
    files,
    profile_names,
    quantize,
)
from nsq_ref import scheme_names as names
from nsq_ref.cli import options as read
from nsq_ref.policy import scheme_text
from tests.support.command import NSQ, nsq, process, refused

RNG = np.random.default_rng(0)
KEYS = RNG.standard_normal((2, 20, 8), dtype=np.float32)
VALUES = RNG.standard_normal((2, 20, 8)).astype(np.float16)


@pytest.fixture
def folder(tmp_path) -> Path:
    np.savez(tmp_path / "kv.npz", keys=KEYS, values=VALUES)
    return tmp_path


def test_without_a_file_info_tells_versions_and_schemes(tmp_path):
    text = nsq("info", cwd=tmp_path).stdout
    assert f"nsq {__version__}, specification NSQ-1" in text
    result = json.loads(nsq("info", "--json", cwd=tmp_path).stdout)
    assert (result["version"], result["spec"]) == (__version__, "NSQ-1")
    assert [row["name"] for row in result["schemes"]] == names()
    for row in result["schemes"]:
        bits = Scheme.named(row["name"]).bits_per_element(4096, 128)
        assert row["bits_per_element"] == bits
        assert any(line.split() == [row["name"], f"{bits:.3f}"] for line in text.splitlines())
    assert [row["name"] for row in result["profiles"]] == profile_names()
    for row in result["profiles"]:
        key, value = (one.bits_per_element(4096, 128) for one in Scheme.named(row["name"]))
        assert row["bits_per_element"] == (key + value) / 2
        (line,) = (one.split() for one in text.splitlines() if one.split()[:1] == [row["name"]])
        assert line[1:4] == [f"{bits:.3f}" for bits in ((key + value) / 2, key, value)]
        assert row["wants_feedback"] == ("wants feedback" in " ".join(line))
        assert row["wants_feedback"] == row["name"].startswith("best")
    assert nsq("--version", cwd=tmp_path).stdout == f"nsq {__version__}\n"


def test_a_cache_goes_there_and_back(folder):
    options = ("--backend", "numpy", "--json")
    done = process("quantize", "kv.npz", "--output", "q.safetensors", *options, cwd=folder)
    assert done.stderr == ""
    written = json.loads(done.stdout)
    loaded = files.load(folder / "q.safetensors")
    assert [row["name"] for row in written["arrays"]] == list(loaded) == ["keys", "values"]
    for row in written["arrays"]:
        quantized = loaded[row["name"]]
        assert row == {
            "name": row["name"],
            "shape": [2, 20, 8],
            "dtype": quantized.dtype.name,
            "scheme": Scheme().to_dict(),
            "scheme_name": "nsep+pchan4",
            "bits_per_element": quantized.bits_per_element,
            "bytes": quantized.nbytes,
            "float16_bytes": 2 * 2 * 20 * 8,
            "collapsed_tokens": 0,
        }
    told = json.loads(process("info", "q.safetensors", "--json", cwd=folder).stdout)
    assert told["arrays"] == written["arrays"]
    done = process("dequantize", "q.safetensors", "-o", "x.safetensors", *options, cwd=folder)
    assert json.loads(done.stdout)["arrays"][0] == {
        "name": "keys",
        "shape": [2, 20, 8],
        "dtype": "float32",
    }
    restored = files.read_arrays(folder / "x.safetensors")
    for name, x in (("keys", KEYS), ("values", VALUES)):
        expected = dequantize(quantize(x, backend="numpy"), backend="numpy")
        np.testing.assert_array_equal(restored[name], expected)


@pytest.mark.parametrize("backend", ["numba", "numpy", "oracle"])
def test_every_backend_writes_the_same_file(backend, folder):
    files.save(folder / "expected", {"keys": quantize(KEYS), "values": quantize(VALUES)})
    output = ("--output", "q.safetensors", "--backend", backend)
    nsq("quantize", "kv.npz", *output, cwd=folder)
    assert (folder / "q.safetensors").read_bytes() == (folder / "expected").read_bytes()
    nsq("dequantize", "q.safetensors", "-o", "x.safetensors", "--backend", backend, cwd=folder)
    keys = files.read_arrays(folder / "x.safetensors")["keys"]
    np.testing.assert_array_equal(keys, dequantize(quantize(KEYS)))


def test_tables_say_what_json_says(folder):
    text = nsq("quantize", "kv.npz", "-o", "q.safetensors", "--backend", "numpy", cwd=folder).stdout
    assert text == nsq("info", "q.safetensors", cwd=folder).stdout
    keys = next(line.split() for line in text.splitlines() if line.startswith("keys"))
    assert keys[:6] == ["keys", "[2,", "20,", "8]", "float32", "nsep+pchan4"]
    assert keys[6:] == ["6.800", "272", "42.5%", "0"]
    text = nsq("info", "kv.npz", cwd=folder).stdout
    assert "float32  -       32.000  1,280  200.0%" in text
    assert "float16  -       16.000  640    100.0%" in text
    assert "\x1b" not in text
    text = nsq("dequantize", "q.safetensors", "-o", "x.safetensors", cwd=folder).stdout
    assert "keys    [2, 20, 8]  float32" in text


def test_info_tells_of_plain_arrays_and_of_collapsed_tokens(tmp_path):
    files.write_arrays(tmp_path / "x.safetensors", {"[red]k": KEYS.astype(ml_dtypes.bfloat16)})
    (row,) = json.loads(nsq("info", "x.safetensors", "--json", cwd=tmp_path).stdout)["arrays"]
    assert (row["name"], row["dtype"], row["scheme"]) == ("[red]k", "bfloat16", None)
    assert (row["bits_per_element"], row["bytes"], row["collapsed_tokens"]) == (16, 640, None)
    assert "[red]k" in nsq("info", "x.safetensors", cwd=tmp_path).stdout
    np.save(tmp_path / "k.npy", np.float32([[1, 0], [1e-30, 0]]))
    options = ("--output", "q.safetensors", "--backend", "numpy", "--json")
    (row,) = json.loads(nsq("quantize", "k.npy", *options, cwd=tmp_path).stdout)["arrays"]
    assert (row["name"], row["collapsed_tokens"]) == ("k", 1)


def test_info_tells_of_a_saved_cache(tmp_path):
    cache = KVCache(2, 1, 8, Scheme(block_size=4), Scheme.named("streaming3"), value_head_dim=6)
    values = RNG.standard_normal((2, 1, 20, 6))
    cache.append(KEYS[:, None], values, lengths=[20, 7])
    cache.save(tmp_path / "cache.safetensors")
    rows = json.loads(nsq("info", "cache.safetensors", "--json", cwd=tmp_path).stdout)["arrays"]
    assert [row["name"] for row in rows] == ["keys", "values"]
    assert [row["shape"] for row in rows] == [[2, 1, 20, 8], [2, 1, 20, 6]]
    assert sum(row["bytes"] for row in rows) == cache.nbytes
    assert rows[1]["bits_per_element"] == 32  # not one full block
    assert rows[1]["float16_bytes"] == 2 * 27 * 6
    assert rows[0]["lengths"] == [20, 7]
    assert "streaming3" in nsq("info", "cache.safetensors", cwd=tmp_path).stdout
    message = refused("dequantize", "cache.safetensors", "--output", "x.safetensors", cwd=tmp_path)
    assert "nsq_ref.KVCache.load" in message
    (tmp_path / "cache.safetensors").write_bytes(b"no such thing")
    assert "no safetensors file" in refused("info", "cache.safetensors", cwd=tmp_path)


# --- schemes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--scheme", "nsep4"], Scheme.named("nsep4"), Scheme.named("nsep4")),
        (["--scheme", "KIVI-K2V4"], *Scheme.named("KIVI-K2V4")),
        (["--value-scheme", "naive8"], Scheme(), Scheme.named("naive8")),
        (
            ["--scheme", "KIVI", "--value-scheme", "nsep8"],
            *(Scheme.named("pchan2"), Scheme.named("nsep8")),
        ),
        (
            ["--set", "block_size=16", "--set", "symmetric=false", "--set", "scale_dtype=bfloat16"],
            *[Scheme(block_size=16, symmetric=False, scale_dtype="bfloat16")] * 2,
        ),
        (
            ["--scheme", "streaming4", "--set", "block_size=None", "--set", "sink_tokens=3"],
            *[Scheme(symmetric=False, magnitude="lsq", sink_tokens=3)] * 2,
        ),
    ],
)  # fmt: skip
def test_options_choose_the_schemes(options, key, value, folder):
    output = ("--output", "q.safetensors", "--backend", "numpy")
    nsq("quantize", "kv.npz", *output, *options, cwd=folder)
    loaded = files.load(folder / "q.safetensors")
    assert (loaded["keys"].scheme, loaded["values"].scheme) == (key, value)


KEY_NAMES = ["k", "K", "key", "Keys", "layers.0.k", "layer_0_key", "k_cache", "key_cache.0", "k0"]
KEY_NAMES += ["past_key_values.3.key", "past_key_values/values/0/keys", "present.0.key"]
PAIR = KeyValueSchemes(*Scheme.named("KIVI-K2V4"))


@pytest.mark.parametrize("name", KEY_NAMES)
def test_names_tell_keys_from_values(name):
    value_name = (
        name.translate(str.maketrans("kK", "vV")).replace("vey", "value").replace("Vey", "Value")
    )
    if name.startswith("past"):
        value_name = name.rpartition("key")[0] + "value"
    assert read.scheme_of(name, PAIR) == PAIR.key
    assert read.scheme_of(value_name, PAIR) == PAIR.value


@pytest.mark.parametrize(
    "name", ["x", "past_key_values", "kv", "kcache", "0", "monkey", "v.key_value"]
)
def test_names_that_do_not_tell_are_refused(name):
    with pytest.raises(
        ValueError, match=f"array '{name}' is not named as keys or values, .*rename"
    ):
        read.scheme_of(name, PAIR)
    assert read.scheme_of(name, KeyValueSchemes(PAIR.key, PAIR.key)) == PAIR.key


@given(
    name=st.sampled_from(names()),
    bits=st.sampled_from([2, 3, 4, 8]),
    block_size=st.sampled_from([None, 1, 32]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_a_label_names_the_scheme(name, bits, block_size, dtype):
    changes = [f"bits={bits}", f"block_size={block_size}", f"scale_dtype={dtype}"]
    scheme = read.key_value_schemes(name, None, changes).key
    assert (scheme.bits, scheme.block_size, scheme.scale_dtype) == (bits, block_size, dtype)
    nearest, *differences = scheme_text(scheme).split()
    assert read.key_value_schemes(nearest, None, differences).key == scheme
    assert scheme_text(Scheme.named(name)) == name


@given(st.sampled_from(names()))
def test_a_label_says_the_scale_rule_rather_than_the_width(name):
    """S4: that streaming2 searches makes no other width of streaming one of its kind."""
    scheme = Scheme.named(name)
    other = "range" if scheme.scale_rule == "search" else "search"
    assert scheme_text(replace(scheme, scale_rule=other)) == f"{name} scale_rule={other}"


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "nope"], "unknown scheme name 'nope'; known are naive"),
        (["--value-scheme", "KIVI"], "--value-scheme KIVI is a pair; give it to --scheme"),
        (["--scheme", "best-3"], "best-3 is made for feedback of the keys, and there is none"),
        (["--set", "bits=5"], "bits=5 is not supported; choose one of 2, 3, 4, 8"),
        (["--set", "bits"], "--set 'bits' is not FIELD=VALUE with a field of bits, "),
        (["--set", "bit=4"], "--set 'bit=4' is not FIELD=VALUE with a field of bits, "),
        (["--set", "bits=" + "9" * 5000], "is not supported"),
        (["--set", "separate_norm=1"], "separate_norm=1 is not supported; choose one of True"),
        (["--scheme", "naive4", "--set", "magnitude=gain"], "has no effect with separate_norm=F"),
        (["--output", "q.npz"], "--output q.npz must end in .safetensors"),
        (["--output", "no/q.safetensors"], "there is no folder no; make it first"),
        (["--output", "dir.safetensors"], "dir.safetensors: exists and is not a regular file"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(options, message, folder):
    (folder / "dir.safetensors").mkdir()
    options = ("--output", "q.safetensors", "--backend", "numpy", *options)
    assert message in refused("quantize", "kv.npz", *options, cwd=folder)


def test_bad_input_is_one_line_and_exit_2(folder):
    output = ("--output", "q.safetensors", "--backend", "numpy")
    np.savez(folder / "nan.npz", good=KEYS, bad=np.float32([[1, 2], [np.nan, 3]]))
    line = refused("quantize", "nan.npz", *output, cwd=folder)
    assert "nan.npz: array 'bad': x[1, 0] is nan" in line
    np.savez(folder / "one.npz", k=np.ones(3))
    line = refused("quantize", "one.npz", *output, cwd=folder)
    assert "one.npz: array 'k': x has shape [3]; at least [tokens, head_dim]" in line
    np.savez(folder / "other.npz", keys=KEYS, other=KEYS)
    line = refused("quantize", "other.npz", *output, "--scheme", "KIVI", cwd=folder)
    assert "other.npz: array 'other' is not named as keys or values" in line
    np.savez(folder / "objects.npz", k=np.array([{}], dtype=object))
    assert "pickles are not read" in refused("quantize", "objects.npz", *output, cwd=folder)
    (folder / "cut.npz").write_bytes((folder / "kv.npz").read_bytes()[:-30])
    for verb, options in (("quantize", output), ("info", ())):
        assert "cut.npz is no .npz file" in refused(verb, "cut.npz", *options, cwd=folder)
        line = refused(verb, "none.npz", *options, cwd=folder)
        assert line == "nsq: none.npz: No such file or directory\n"
        assert "kv.txt must end in .npz, .npy" in refused(verb, "kv.txt", *options, cwd=folder)
        assert "two lines.txt must end" in refused(verb, "two\nlines.txt", *options, cwd=folder)
    files.write_arrays(folder / "plain.safetensors", {"k": KEYS})
    line = refused("dequantize", "plain.safetensors", *output, cwd=folder)
    assert "plain.safetensors is not a file of quantized arrays" in line


def test_a_damaged_file_is_refused_by_every_verb(folder):
    files.save(folder / "bad.safetensors", {"keys": quantize(KEYS, backend="numpy")})
    data = bytearray((folder / "bad.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "bad.safetensors").write_bytes(data)
    for arguments in (("info",), ("dequantize", "-o", "x.safetensors")):
        line = refused(*arguments, "bad.safetensors", cwd=folder)
        assert "bad.safetensors does not match its checksum" in line
    line = refused("quantize", "bad.safetensors", "-o", "x.safetensors", cwd=folder)
    assert "bad.safetensors holds quantized arrays" in line


@pytest.mark.parametrize("verb", ["quantize", "dequantize"])
@pytest.mark.parametrize("output", ["in.safetensors", "./in.safetensors", "link.safetensors"])
def test_the_input_is_never_the_output(verb, output, folder):
    files.write_arrays(folder / "in.safetensors", {"k": KEYS})
    os.symlink("in.safetensors", folder / "link.safetensors")
    line = refused(verb, "in.safetensors", "--output", output, cwd=folder)
    assert "is the input; choose another name" in line


def test_an_output_that_exists_is_replaced(folder):
    output = ("--output", "q.safetensors", "--backend", "numpy")
    nsq("quantize", "kv.npz", *output, "--scheme", "naive2", cwd=folder)
    nsq("quantize", "kv.npz", *output, "--scheme", "naive8", cwd=folder)
    assert files.load(folder / "q.safetensors")["keys"].scheme.bits == 8
    assert sorted(path.name for path in folder.iterdir()) == ["kv.npz", "q.safetensors"]


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
from nsq_ref.cli import main
main()
"""


def test_a_write_that_fails_leaves_the_old_output(folder):
    (folder / "q.safetensors").write_bytes(b"what was there")
    arguments = ["quantize", "kv.npz", "--output", "q.safetensors", "--backend", "numpy"]
    command = [sys.executable, "-c", LIMITED, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("nsq: ")
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (folder / "q.safetensors").read_bytes() == b"what was there"
    assert sorted(path.name for path in folder.iterdir()) == ["kv.npz", "q.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "frobnicate"),
        (["quantize", "kv.npz"], "--output"),
        (["quantize"], "INPUT"),
        (["quantize", "kv.npz", "-o", "q.safetensors", "--backend", "cuda"], "cuda"),
        (["info", "--nope"], "--nope"),
    ],
)
def test_bad_use_exits_2_and_says_why(arguments, message, folder):
    done = process(*arguments, cwd=folder, code=2)
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_every_verb_and_imports_no_kernels(tmp_path):
    text = process("--help", cwd=tmp_path).stdout
    for verb in ("info", "quantize", "dequantize"):
        assert verb in text
    code = "import sys; from nsq_ref import cli; print(*sorted(sys.modules))"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {"numba", "onnxruntime", "matplotlib", "safetensors"}.isdisjoint(loaded)


def test_the_bar_is_on_a_terminal_and_on_stderr_only(folder):
    ours, theirs = pty.openpty()
    command = [str(NSQ), "quantize", "kv.npz", "-o", "q.safetensors", "--json"]
    environment = {**os.environ, "TERM": "xterm"}
    done = subprocess.run(
        [*command, "--backend", "numpy"],
        cwd=folder, stdout=subprocess.PIPE, stderr=theirs, env=environment, check=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
    os.close(ours)
    assert b"quantizing kv.npz" in shown
    assert len(json.loads(done.stdout)["arrays"]) == 2


def test_the_command_is_installed():
    assert shutil.which("nsq", path=str(NSQ.parent)) == str(NSQ)
