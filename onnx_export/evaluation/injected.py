"""Decoders that are given what breaks other models, their own float32 output unchanged.

Attention sees keys only in their products with queries, through a softmax. So two things may be
done to a layer that no float32 logit shows:

- *An outlier.* A rotary pair of channels, ``i`` and ``i + head_dim / 2``, of the keys is multiplied
  by a factor, and that of all queries that read them divided by it. The rotation acts on the pair
  as a whole and commutes with a factor; the products are what they were.
- *A bias.* A constant is added to a channel of all keys after they rotate. It adds ``q * constant``
  to every score of a query, the same for all keys, which a softmax does not see.

A quantized cache sees both. So what an outlier or a bias does is told apart from all else in which
the models differ that have one: the model, its weights and the text stay the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nsq_ref.arrays import as_integer
from nsq_ref.extras import extra
from nsq_ref.feedback import Moments
from nsq_ref.files import atomic
from onnx_export.evaluation.fidelity import Transform
from onnx_export.models.built import WEIGHTS
from onnx_export.models.config import DecoderConfig
from onnx_export.models.decoder import KeyValueCache

with extra("onnx", __name__):
    import onnx
    from onnx import numpy_helper

__all__ = [
    "Change", "KeyBias", "KeyOutlier", "as_if_injected", "bias_for_ratio", "changed_keys",
    "changed_moments", "factor_for_ratio", "injected_onnx", "restored_keys",
]  # fmt: skip

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class KeyOutlier:
    """A rotary pair of key channels that is multiplied by a factor, its queries divided by it.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    layer, pair : int
        The pair is channels ``pair`` and ``pair + head_dim / 2``; the last pair rotates slowest.
    factor : float
        Positive.
    kv_head : int, optional
        All heads when not given.

    Examples
    --------
    >>> KeyOutlier(layer=0, pair=3, factor=16.0).channels(head_dim=8)
    [3, 7]
    """

    layer: int
    pair: int
    factor: float
    kv_head: int | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.factor) and self.factor > 0):
            raise ValueError(f"factor must be positive and finite, got {self.factor}")

    def channels(self, head_dim: int) -> list[int]:
        """Return the two channels of a head."""
        return [self.pair, self.pair + head_dim // 2]


@dataclass(frozen=True)
class KeyBias:
    """A constant that is added to a channel of all keys, after they rotate.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    layer, channel : int
    value : float
    kv_head : int, optional
        All heads when not given.

    Examples
    --------
    >>> KeyBias(layer=0, channel=7, value=-40.0).channels(head_dim=8)
    [7]
    """

    layer: int
    channel: int
    value: float
    kv_head: int | None = None

    def __post_init__(self) -> None:
        if not np.isfinite(self.value):
            raise ValueError(f"value must be finite, got {self.value}")

    def channels(self, head_dim: int) -> list[int]:
        """Return the channel of a head."""
        return [self.channel]


Change: TypeAlias = KeyOutlier | KeyBias


def factor_for_ratio(x: Float32, pair: int, ratio: float) -> float:
    """Return by which factor a pair of channels gives a head this `nsq_ref.metrics.outlier_ratio`.

    Parameters
    ----------
    x : numpy.ndarray
        Keys of a head, float ``[tokens, head_dim]``.
    pair : int
    ratio : float

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If no factor does: two channels alike reach half of ``head_dim``.

    Examples
    --------
    >>> from nsq_ref.metrics import outlier_ratio
    >>> x = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    >>> factor = factor_for_ratio(x, 31, 17.0)
    >>> x[:, [31, 63]] *= factor
    >>> round(float(outlier_ratio(x)), 4)
    17.0
    """
    largest = np.abs(x).max(axis=0).astype(np.float64)
    head_dim = len(largest)
    own = largest[[pair, pair + head_dim // 2]]
    room = own.max() * head_dim - ratio * own.sum()
    if room <= 0:
        limit = own.max() * head_dim / own.sum() if own.any() else 0.0
        raise ValueError(
            f"ratio={ratio:g} is more than the {limit:.1f} that pair {pair} can reach; give less"
        )
    return float(ratio * (largest.sum() - own.sum()) / room)


def bias_for_ratio(x: Float32, channel: int, ratio: float) -> float:
    """Return which constant, added to a channel, gives a head this `nsq_ref.metrics.outlier_ratio`.

    Parameters
    ----------
    x : numpy.ndarray
        Keys of a head, float ``[tokens, head_dim]``.
    channel : int
    ratio : float

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If no positive constant does.

    Examples
    --------
    >>> from nsq_ref.metrics import outlier_ratio
    >>> x = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    >>> x[:, 63] += bias_for_ratio(x, 63, 17.0)
    >>> round(float(outlier_ratio(x)), 4)
    17.0
    """
    largest = np.abs(x).max(axis=0).astype(np.float64)
    head_dim = len(largest)
    if ratio >= head_dim:
        raise ValueError(f"ratio={ratio:g} must be less than head_dim, which is {head_dim}")
    reached = ratio * (largest.sum() - largest[channel]) / (head_dim - ratio)
    value = float(reached - x[:, channel].max())
    if value <= 0:
        raise ValueError(f"ratio={ratio:g} is not more than what the head has; give more")
    return value


def changed_keys(keys: Float32, changes: Sequence[Change]) -> Float32:
    """Return the keys that the changed model has where the original has these.

    Parameters
    ----------
    keys : numpy.ndarray
        float32 ``[layers, batch, kv_heads, tokens, head_dim]``.
    changes : sequence of KeyOutlier or KeyBias
        Outliers are done first, as they are in the weights, then biases.

    Returns
    -------
    numpy.ndarray
        A new array.

    Examples
    --------
    >>> keys = np.ones((1, 1, 1, 2, 4), np.float32)
    >>> changed_keys(keys, [KeyOutlier(layer=0, pair=1, factor=8)])[0, 0, 0, 0]
    array([1., 8., 1., 8.], dtype=float32)
    """
    return _every(keys, _in_order(changes), lambda part, change: (
        part * np.float32(change.factor)
        if isinstance(change, KeyOutlier) else part + np.float32(change.value)
    ))  # fmt: skip


def restored_keys(keys: Float32, changes: Sequence[Change]) -> Float32:
    """Undo `changed_keys`.

    Parameters
    ----------
    keys : numpy.ndarray
        float32 ``[layers, batch, kv_heads, tokens, head_dim]``.
    changes : sequence of KeyOutlier or KeyBias

    Returns
    -------
    numpy.ndarray
        A new array.

    Examples
    --------
    >>> keys = np.ones((1, 1, 1, 2, 4), np.float32)
    >>> restored_keys(keys, [KeyBias(layer=0, channel=2, value=8)])[0, 0, 0, 0]
    array([ 1.,  1., -7.,  1.], dtype=float32)
    """
    return _every(keys, _in_order(changes)[::-1], lambda part, change: (
        part / np.float32(change.factor)
        if isinstance(change, KeyOutlier) else part - np.float32(change.value)
    ))  # fmt: skip


def changed_moments(moments: Moments, changes: Sequence[Change]) -> Moments:
    """Return the second moments of the changed model's queries.

    Parameters
    ----------
    moments : Moments
        Of the original's, as `onnx_export.evaluation.moments` makes them.
    changes : sequence of KeyOutlier or KeyBias
        A bias leaves queries as they are.

    Returns
    -------
    Moments

    Examples
    --------
    >>> moments = Moments({0: np.ones((1, 2, 2))})
    >>> changed_moments(moments, [KeyOutlier(layer=0, pair=0, factor=2)]).layers[0]
    array([[[0.25, 0.25],
            [0.25, 0.25]]])
    """
    layers = {layer: moment.copy() for layer, moment in moments.layers.items()}
    for change in changes:
        if isinstance(change, KeyOutlier) and change.layer in layers:
            moment = layers[change.layer]
            channels = change.channels(moment.shape[-1])
            for head in _heads(change, len(moment)):
                moment[head, channels] /= change.factor
                moment[head, :, channels] /= change.factor
    return Moments(layers)


def as_if_injected(transform: Transform, changes: Sequence[Change]) -> Transform:
    """Return what a transform in the changed model does, as a transform in the original.

    It costs no new model: the keys are changed, transformed and changed back, which is what the
    products with the changed model's queries amount to.

    Parameters
    ----------
    transform : callable
        ``transform(keys, values)``.
    changes : sequence of KeyOutlier or KeyBias

    Returns
    -------
    callable

    Examples
    --------
    >>> def rounds(keys, values):
    ...     return keys.round(), values
    >>> keys = np.full((1, 1, 1, 1, 2), 0.3, np.float32)
    >>> as_if_injected(rounds, [KeyOutlier(layer=0, pair=0, factor=10)])(keys, keys)[0].ravel()
    array([0.3, 0.3], dtype=float32)
    """

    def in_changed(keys: Float32, values: Float32) -> KeyValueCache:
        lossy, lossy_values = transform(changed_keys(keys, changes), values)
        return restored_keys(lossy, changes), lossy_values

    return in_changed


def injected_onnx(
    onnx_path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    changes: Sequence[Change],
) -> Path:
    """Write a decoder that is the same but for its keys: all files or none.

    Outliers go into the weights of the projections of keys and queries, or of their norms; a bias
    is one more node a layer. All other weights are linked where the file system has links.

    Parameters
    ----------
    onnx_path : str or os.PathLike
        A ``model.onnx`` with plain attention and float32 weights, as `cached_onnx` writes it.
    directory : str or os.PathLike
        Created where it does not exist; another one than that of ``onnx_path``.
    changes : sequence of KeyOutlier or KeyBias

    Returns
    -------
    pathlib.Path
        ``model.onnx`` in the directory.

    Raises
    ------
    ValueError
        If a layer, head, pair or channel is not there, or the model is another kind.
    FileNotFoundError
        If there is no such model.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.decoder import Decoder
    >>> from onnx_export.models.tiny import tiny_onnx
    >>> original = tiny_onnx()
    >>> changed = injected_onnx(original, tempfile.mkdtemp(), [KeyOutlier(0, pair=3, factor=32)])
    >>> logits = [Decoder(path).forward([[3, 1, 4]])[0] for path in (original, changed)]
    >>> bool(np.allclose(*logits, atol=1e-5))
    True
    """
    source, folder = Path(onnx_path), Path(directory)
    if not source.is_file():
        raise FileNotFoundError(
            f"there is no ONNX model {str(source)!r}; build it with cached_onnx"
        )
    if folder.resolve() == source.parent.resolve():
        raise ValueError(f"directory {str(folder)!r} is that of the model itself; give another one")
    model = onnx.load(source, load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    try:
        config = DecoderConfig.from_metadata(metadata)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source}: not a decoder of this package; use cached_onnx") from error
    edited = _Edited(source, model, config)
    for index, change in enumerate(changes):
        _require(index, change, config)
        if isinstance(change, KeyOutlier):
            edited.multiply(change)
        else:
            edited.add(change)

    def link(path: Path) -> None:
        path.unlink(missing_ok=True)
        try:
            os.link(source.with_name(WEIGHTS), path)
        except OSError:  # not every file system has links
            shutil.copyfile(source.with_name(WEIGHTS), path)

    files: list[tuple[Path, atomic.Content]] = [
        (folder / WEIGHTS, link),
        (folder / source.name, model.SerializeToString()),
    ]
    atomic.write(files, make_folders=True)
    return folder / source.name


class _Edited:
    """A model whose weights are changed in memory."""

    def __init__(self, source: Path, model: onnx.ModelProto, config: DecoderConfig) -> None:
        self._source, self._graph, self._config = source, model.graph, config
        self._tensors = {tensor.name: tensor for tensor in self._graph.initializer}
        self._biases = 0

    def multiply(self, change: KeyOutlier) -> None:
        """Multiply the columns of the keys, and divide those of the queries that read them."""
        config, block = self._config, f"blk.{change.layer}."
        group = config.heads // config.kv_heads
        keys = _heads(change, config.kv_heads)
        queries = [head * group + i for head in keys for i in range(group)]
        if config.norms_heads:
            if len(keys) != config.kv_heads:
                raise ValueError(
                    f"kv_head={change.kv_head}: this model has one norm for the keys of all heads; "
                    "leave kv_head out"
                )
            keys = queries = [0]
        names = ("attn_k_norm", "attn_q_norm") if config.norms_heads else ("attn_k", "attn_q")
        factors = (change.factor, 1 / change.factor)
        for name, heads, factor in zip(names, (keys, queries), factors, strict=True):
            own = change.channels(config.head_dim)
            columns = [head * config.head_dim + channel for head in heads for channel in own]
            self._scale(f"{block}{name}.weight", columns, factor)
            if f"{block}{name}.bias" in self._tensors:
                self._scale(f"{block}{name}.bias", columns, factor)

    def add(self, change: KeyBias) -> None:
        """Add a constant to what becomes of new keys, before they are cached."""
        config, present = self._config, f"present.{change.layer}.key"
        bias = np.zeros((config.kv_heads, 1, config.head_dim), np.float32)
        bias[_heads(change, config.kv_heads), 0, change.channel] = change.value
        self._biases += 1
        name = f"blk.{change.layer}.key_bias.{self._biases}"
        self._graph.initializer.append(numpy_helper.from_array(bias, f"{name}.constant"))
        index, node = self._node(present)
        added = onnx.helper.make_node("Add", [node.input[1], f"{name}.constant"], [name], name=name)
        node.input[1] = name
        self._graph.node.insert(index, added)

    def _node(self, output: str) -> tuple[int, onnx.NodeProto]:
        for index, node in enumerate(self._graph.node):
            if output in node.output and node.op_type == "Concat":
                return index, node
        raise ValueError(f"{self._source}: {output!r} is not from plain attention; build it so")

    def _scale(self, name: str, columns: list[int], factor: float) -> None:
        tensor = self._tensors.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT:
            raise ValueError(f"{self._source}: {name!r} is not float32; build it with such weights")
        values = self._values(tensor).copy()
        values[..., columns] = (values[..., columns].astype(np.float64) * factor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    def _values(self, tensor: onnx.TensorProto) -> Float32:
        told = {entry.key: entry.value for entry in tensor.external_data}
        if not told:
            return numpy_helper.to_array(tensor)
        # Not by `numpy_helper`, which refuses a file that has several links.
        path = self._source.with_name(told["location"])
        count, offset = int(told["length"]) // 4, int(told["offset"])
        return np.fromfile(path, "<f4", count, offset=offset).reshape(tuple(tensor.dims))


def _in_order(changes: Sequence[Change]) -> list[Change]:
    return sorted(changes, key=lambda change: isinstance(change, KeyBias))


def _heads(change: Change, kv_heads: int) -> list[int]:
    return list(range(kv_heads)) if change.kv_head is None else [change.kv_head]


def _require(index: int, change: Change, config: DecoderConfig) -> None:
    """Refuse what the model does not have."""
    place = (
        ("pair", change.pair, config.head_dim // 2)
        if isinstance(change, KeyOutlier)
        else ("channel", change.channel, config.head_dim)
    )
    sizes = [("layer", change.layer, config.layers), place]
    if change.kv_head is not None:
        sizes.append(("kv_head", change.kv_head, config.kv_heads))
    for name, value, size in sizes:
        if as_integer(f"changes[{index}].{name}", value, least=0) >= size:
            raise ValueError(f"changes[{index}].{name}={value} must be below {size} in this model")


def _parts(keys: Float32, change: Change) -> Iterator[tuple[Any, ...]]:
    """Yield where in a cache a change acts."""
    for head in _heads(change, keys.shape[2]):
        for channel in change.channels(keys.shape[-1]):
            yield change.layer, slice(None), head, slice(None), channel


def _every(
    keys: Float32, changes: Sequence[Change], act: Callable[[Float32, Change], Float32]
) -> Float32:
    result: Float32 = keys.copy()
    for change in changes:
        for part in _parts(keys, change):
            result[part] = act(result[part], change)
    return result
