"""The one list of what can be asked: our schemes and the methods of others, all in one form."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nsq_ref.arrays import as_float_array, as_integer
from nsq_ref.feedback import Feedback
from nsq_ref.profiles import wants_feedback
from nsq_ref.rivals.codebooks import NsnQuant, TurboQuant
from nsq_ref.rivals.codec import Codec, NormFirst, SchemeCodec, Stored
from nsq_ref.rivals.ggml import GgmlBlocks
from nsq_ref.rivals.grouped import KiviKeys, KiviValues
from nsq_ref.rivals.kvarn import Kvarn
from nsq_ref.rivals.lowrank import Gear, LowRank
from nsq_ref.rivals.nvfp4 import Nvfp4
from nsq_ref.rivals.oscar import Oscar
from nsq_ref.rivals.rotation import Rotated
from nsq_ref.rivals.scaled import Smoothed, StaticChannels
from nsq_ref.scheme import KeyValueSchemes, Scheme, as_scheme, scheme_names

__all__ = ["Entry", "entries", "entry", "entry_of"]


@dataclass(frozen=True)
class Entry:
    """A way to store keys and values: who published it, with what parameters, and how it differs.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    name, title : str
    key, value : Codec
    source : str
        Paper or repository, and the place of the formula there.
    differs : str
        What is not as published.
    ours : bool
        Whether it is a scheme of NSQ-1.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((2, 512, 64), dtype=np.float32)
    >>> kivi = entry("kivi2")
    >>> stored = kivi.key(x)
    >>> stored.bits_per_element, kivi.value(x).bits_per_element
    (3.0, 6.25)
    >>> stored.x_hat.shape
    (2, 512, 64)
    """

    name: str
    title: str
    key: Codec
    value: Codec
    source: str
    differs: str = ""
    ours: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Whether `calibrated` must be called before anything is stored.

        Examples
        --------
        >>> [name for name, one in entries().items() if one.needs_calibration]
        ['onnxruntime-int4', 'onnxruntime-int8']
        """
        return any(
            isinstance(side, StaticChannels) and side.scale is None
            for side in (self.key, self.value)
        )

    @property
    def wants_feedback(self) -> bool:
        """Whether `with_feedback` must be called before anything is stored.

        Examples
        --------
        >>> entry("best-3").wants_feedback, entry("small-3").wants_feedback
        (True, False)
        """
        return isinstance(self.key, SchemeCodec) and self.key.wants_feedback

    def with_feedback(self, feedback: Feedback) -> Entry:
        """Return the entry with feedback of the keys of a layer (F1).

        Raises
        ------
        ValueError
            For a method of others, which takes none.

        Examples
        --------
        >>> import numpy as np
        >>> feedback = Feedback.from_queries(np.eye(64)[None], kv_heads=1)
        >>> entry("best-3").with_feedback(feedback).wants_feedback
        False
        """
        if not isinstance(self.key, SchemeCodec):
            raise ValueError(f"{self.name} codes keys by no scheme of NSQ-1, which feedback is for")
        return replace(self, key=replace(self.key, feedback=feedback))

    def calibrated(self, keys: Any, values: Any) -> Entry:
        """Return the entry with scales from keys and values of other text.

        An entry without such scales is returned as it is.

        Parameters
        ----------
        keys, values : float arrays, shape [..., T, D]
            The axes before the tokens as in what will be stored.

        Examples
        --------
        >>> import numpy as np
        >>> x = np.ones((2, 9, 4), np.float32)
        >>> entry("onnxruntime-int4").calibrated(x, x).value(x).x_hat[0, 0, 0].item()
        0.875
        """
        key, value = self.key, self.value
        keys, values = as_float_array("keys", keys), as_float_array("values", values)
        if isinstance(key, StaticChannels):
            key = key.calibrated(keys)
        if isinstance(value, StaticChannels):
            value = value.calibrated(values)
        return replace(self, key=key, value=value)

    def store(self, keys: Any, values: Any) -> tuple[Stored, Stored]:
        """Store both sides.

        Examples
        --------
        >>> import numpy as np
        >>> keys, values = entry("q4_0").store(np.ones((4, 64)), np.ones((4, 64)))
        >>> keys.sealed_bits, values.kept_bits
        (1152, 0)
        """
        return self.key(as_float_array("keys", keys)), self.value(as_float_array("values", values))

    def bits_per_element(self, tokens: int, head_dim: int, heads: int = 8) -> tuple[float, float]:
        """Return bits an element of one layer, keys and values together: all, and sealed ones.

        The second leaves sinks and tail out, and is 0 if there is nothing else.

        Examples
        --------
        >>> entry("kivi2").bits_per_element(tokens=512, head_dim=64)
        (4.625, 3.0)
        """
        shape = [
            as_integer(name, size, least=1)
            for name, size in (("heads", heads), ("tokens", tokens), ("head_dim", head_dim))
        ]
        nothing = np.zeros(shape, np.float32)
        one = self.calibrated(nothing, nothing)
        if one.wants_feedback:  # which changes no size
            one = one.with_feedback(Feedback.from_moment(np.eye(head_dim)[None]))
        stored = one.store(nothing, nothing)
        sealed = sum(side.sealed_bits for side in stored)
        elements = sum(side.sealed_elements for side in stored)
        total = sealed + sum(side.kept_bits for side in stored)
        return total / (2 * nothing.size), sealed / elements if elements else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all but the numbers, as plain values, ready for JSON.

        Examples
        --------
        >>> entry("kivi2").to_dict()["key"]
        {'codec': 'KiviKeys', 'bits': 2, 'group': 32, 'residual': 128}
        """
        return {
            "name": self.name, "title": self.title, "source": self.source,
            "differs": self.differs, "ours": self.ours,
            "key": self.key.to_dict(), "value": self.value.to_dict(),
        }  # fmt: skip


def entry(name: str) -> Entry:
    """Return what a name means: one of `entries`, or any name of `nsq_ref.Scheme.named`.

    Raises
    ------
    TypeError, ValueError
        For no string, and for an unknown name.

    Examples
    --------
    >>> entry("turboquant4").source
    'arXiv 2504.19874, Algorithm 1 (TurboQuant_mse)'
    >>> entry("nsep+pchan4").ours
    True
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'kivi2', got {name!r:.80}")
    if name in (known := entries()):
        return known[name]
    try:
        return _of_schemes(name, Scheme.named(name))
    except ValueError:
        rivals = ", ".join(one for one, what in known.items() if not what.ours)
        raise ValueError(
            f"unknown scheme name {name!r}; known are the names of Scheme.named, such as "
            f"'nsep+pchan4', and {rivals}"
        ) from None


def entry_of(schemes: Entry | Scheme | KeyValueSchemes | str) -> Entry:
    """Return the entry of whatever stands for one.

    Examples
    --------
    >>> entry_of(Scheme(bits=3)).key.to_dict()["bits"]
    3
    """
    if isinstance(schemes, Entry):
        return schemes
    if isinstance(schemes, str):
        return entry(schemes)
    if isinstance(schemes, KeyValueSchemes):
        return _of_schemes("schemes", schemes)
    return _of_schemes("scheme", as_scheme("schemes", schemes))


@functools.cache
def entries() -> Mapping[str, Entry]:
    """Return every entry by its name: our schemes first, then methods of others, then both at once.

    Examples
    --------
    >>> len(entries()), [name for name in entries() if "kivi" in name]
    (69, ['kivi2', 'kivi3', 'kivi4', 'nsep+kivi2', 'nsep+kivi4'])
    """
    ours = [_of_schemes(name, Scheme.named(name)) for name in scheme_names()]
    ours += [_of_schemes(name, Scheme.named(name)) for name in ("KIVI-K2V4", "nsep+KIVI-K2V4")]
    for family, title in (("outlier", "naive"), ("nsep+out", "norm-separated")):
        eight = replace(as_scheme("family", f"{family}4"), outlier_channels=8)
        one = _of_schemes(f"{family}4-8ch", eight)
        ours.append(replace(one, title=f"{title} 4 bits, 8 outlier channels in float16"))
    listed = [*ours, *_rivals()]
    listed += [_norm_first(one) for one in listed if one.name in COMPOSED]
    return {one.name: one for one in listed}


COMPOSED = ("kivi2", "kivi4", "gear2", "gear4", "smoothquant4", "pca16", "pca32", "pca48")

PAPER = "Sato 2026, DOI 10.5281/zenodo.19602981, metaSATOKEN/norm-separated-quantization"
KIVI = "arXiv 2402.02750; jy-yuan/KIVI quant/new_pack.py, residual of models/llama_kivi.py"
GGML = "ggml-org/llama.cpp ggml/src/ggml-quants.c; gguf.quants"
LLAMA_ROTATION = "ggml-org/llama.cpp pull 21038, src/llama-kv-cache.cpp"
OSCAR = "arXiv 2605.19660; ZunhaiSu/OScaR-KV-Quant kv_cache_compression/quarot_utils.py, qpack.h"
KVARN = "arXiv 2606.03458; huawei-csl/KVarN ascend_kernel/kvarn_store_tile_k/api_test.py"
NSN = "arXiv 2505.18231 (NSNQuant), the three steps of the abstract"
GEAR = "arXiv 2403.05527; opengear-project/GEAR GEARLM/Simulated/compress_function.py"
ORT = "microsoft/onnxruntime-genai kv_cache_calibration.py; onnxruntime GroupQueryAttention"
SMOOTH = "arXiv 2211.10438, equation 4; on keys as arXiv 2405.04532 (QServe), section 5.2"
HALF = "arithmetic in float32; what is stored is float16 all the same"


def _rivals() -> list[Entry]:
    both: list[Entry] = []

    def add(
        name: str, title: str, key: Codec, value: Codec, source: str, differs: str = ""
    ) -> None:
        both.append(Entry(name, title, key, value, source, differs))

    for rank in (16, 32, 48):
        add(
            f"pca{rank}",
            f"{rank} principal components a head",
            LowRank(rank),
            LowRank(rank),
            f"{PAPER} phase4b_cross_model.py, pca_truncate",
            "factors in float16, as they would be stored; the paper keeps them in float32",
        )
    for bits in (2, 3, 4):
        add(
            f"kivi{bits}",
            f"KIVI, {bits} bits, groups of 32, residual 128",
            KiviKeys(bits),
            KiviValues(bits),
            KIVI,
            HALF + ("; 3 bits are not published" if bits == 3 else ""),
        )
    for kind in ("q4_0", "q5_0", "q8_0"):
        codec = GgmlBlocks(kind)
        add(kind, f"ggml {kind}", codec, codec, GGML, "nothing: values equal gguf's")
        add(
            f"hadamard+{kind}",
            f"ggml {kind} behind a Hadamard rotation",
            Rotated(codec),
            Rotated(codec, largest=64),
            LLAMA_ROTATION,
            "arithmetic in float32, by butterflies",
        )
    for bits in (2, 4):
        add(
            f"oscar{bits}",
            f"OScaR, {bits} bits, groups of 32, residual 128",
            Oscar("key", bits),
            Oscar("value", bits),
            OSCAR,
            HALF,
        )
    for key, value in ((4, 4), (4, 2), (3, 3), (2, 2)):
        add(
            f"kvarn-k{key}v{value}",
            f"KVarN, keys {key} bits, values {value}, tiles of 128",
            Kvarn("key", key),
            Kvarn("value", value),
            KVARN,
            f"values, and 128 sinks in float16, as in ports of its vLLM code; {HALF}",
        )
    for bits in (1, 2):
        add(
            f"nsnquant{bits}",
            f"NSNQuant, {bits} bits, chunks of 64",
            NsnQuant(bits),
            NsnQuant(bits),
            NSN,
            "no published code could be read: codebook by k-means without fine-tuning, scales in "
            "float16 and not quantized again, chunk of 64 and tail are a choice, keys after "
            "the rotary embedding",
        )
    for bits in (2, 3, 4):
        add(
            f"turboquant{bits}",
            f"TurboQuant, {bits} bits, norms corrected",
            TurboQuant(bits),
            TurboQuant(bits),
            "arXiv 2504.19874, Algorithm 1 (TurboQuant_mse)",
            "norm correction, which implementations add; no residual of signs, which they drop",
        )
    add(
        "nvfp4",
        "NVFP4: E2M1, E4M3 scales of 16, float32 scale a tensor",
        Nvfp4(),
        Nvfp4(),
        "NVIDIA, Pretraining LLMs with NVFP4, arXiv 2509.25149, appendix C",
        "the tensor scale is from the tensor itself, not from calibration",
    )
    for bits in (4, 8):
        add(
            f"onnxruntime-int{bits}",
            f"onnxruntime, {bits} bits a channel, static scales",
            StaticChannels("key", bits),
            StaticChannels("value", bits),
            ORT,
            "percentile of each head and channel over all tokens given; scales are counted once a "
            "sequence, though a model has them once",
        )
    for bits in (2, 4):
        add(
            f"gear{bits}",
            f"GEAR on KIVI, {bits} bits, groups of 64, 2% outliers, rank 4",
            Gear("key", bits),
            Gear("value", bits),
            GEAR,
            "outliers a channel are 2% of its tokens, as in the paper (the code takes the count of "
            f"a token); the start of the power iteration has a fixed seed; {HALF}",
        )
    naive = SchemeCodec(Scheme.named("naive4"))
    add(
        "smoothquant4",
        "SmoothQuant on keys, then naive 4 bits a token",
        Smoothed(naive),
        naive,
        SMOOTH,
        "factors from the keys themselves, as no queries are given, and counted",
    )
    return both


def _norm_first(one: Entry) -> Entry:
    return Entry(
        f"nsep+{one.name}", f"norms apart, then {one.title}", NormFirst(one.key),
        NormFirst(one.value), f"{PAPER}, as preprocessing of: {one.source}", one.differs,
    )  # fmt: skip


def _of_schemes(name: str, schemes: Scheme | KeyValueSchemes) -> Entry:
    pair = schemes if isinstance(schemes, KeyValueSchemes) else (schemes, schemes)
    key, value = (SchemeCodec(as_scheme("schemes", one)) for one in pair)
    if wants_feedback(name):
        key = replace(key, made_for_feedback=name)
    return Entry(name, f"{name} of NSQ-1", key, value, "docs/spec.md", ours=True)
