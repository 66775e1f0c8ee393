"""`evaluate`: every method on every passage by a protocol, but for what was done already."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nsq_ref import __version__
from nsq_ref.arrays import as_integer, as_integer_array
from nsq_ref.files import atomic
from onnx_export.evaluation.methods import Bound, KeyValueCache, Method, Spec, methods_of
from onnx_export.evaluation.models import (
    CausalModel,
    Opened,
    PathLike,
    as_model,
    require_vocabulary,
)
from onnx_export.evaluation.passages import CALIBRATED
from onnx_export.evaluation.protocols import Protocol, Record, Unit, prefilled, protocol_named
from onnx_export.evaluation.results import Evaluation, collected
from onnx_export.evaluation.store import Store
from onnx_export.models.built import Progress
from onnx_export.models.decoder import Decoder

__all__ = ["Job", "evaluate"]

Ids = NDArray[np.int64]

RECORDS = 2  # what records hold; other ones are measured anew
PROBED = 16  # tokens that are read both at once and in pieces, before all else
SAME = 0.05  # share by which logits may then differ: caches may be float16, activations quantized


@dataclass(frozen=True)
class Job:
    """What one model does by one protocol."""

    protocol: Protocol
    methods: tuple[Method, ...]
    calibration: tuple[Ids, ...]
    fingerprint: str

    def task(self, unit: Unit, method: Method | None) -> dict[str, Any]:
        """Return by what the figures of a method (None: the float32 cache) are known again."""
        return {
            "records": RECORDS,
            "versions": {name: importlib.metadata.version(name) for name in ("numpy",)}
            | {"nsq-ref": __version__, "onnxruntime": importlib.metadata.version("onnxruntime")},
            "model": self.fingerprint,
            "protocol": {**self.protocol.to_dict(), "context": unit.context},
            "tokens": _sha256([unit.tokens]),
            "method": None if method is None else method.to_dict(),
            "calibration": (
                _sha256(self.calibration) if method is not None and method.needs_calibration else ""
            ),
        }

    def same(self, other: Job) -> bool:
        """Whether it is the same work, as it is known again.

        Arrays of two jobs are not compared by ``==``, so that this is.
        """
        return self._known() == other._known()

    def _known(self) -> tuple[Any, ...]:
        methods = [(one.name, one.to_dict()) for one in self.methods]
        return self.protocol, methods, _sha256(self.calibration), self.fingerprint

    def missing(self, unit: Unit, store: Store) -> list[Method]:
        """Return the methods without figures; that of the float32 cache comes with the first."""
        known = store.get(self.task(unit, None)) is not None
        return [one for one in self.methods if not known or store.get(self.task(unit, one)) is None]


class Worker:
    """A model at work: what it needs for all passages is made once."""

    def __init__(self, model: CausalModel, job: Job) -> None:
        self.model, self.job = model, job
        self._bound: dict[str, Bound] = {}
        self._calibration: KeyValueCache | None = None
        self._layers: Sequence[int] = ()

    def measured(
        self, unit: Unit, methods: Iterable[Method]
    ) -> Iterator[tuple[Method | None, Record]]:
        """Yield figures as they are finished, those of the float32 cache first."""
        if not self._layers:
            self._layers = _layers(self.model, unit.tokens[:PROBED])
        reference, record = self.job.protocol.reference(self.model, unit)
        yield None, record
        for method in methods:
            try:
                bound = self._method(method)
                yield method, self.job.protocol.measured(self.model, unit, reference, bound)
            except ValueError as error:
                yield method, {"refused": " ".join(str(error).split())}

    def _method(self, method: Method) -> Bound:
        if method.name not in self._bound:
            if method.needs_calibration and self._calibration is None and self.job.calibration:
                caches = [prefilled(self.model, one) for one in self.job.calibration]
                every = zip(*caches, strict=True)
                first, second = (np.concatenate(side, axis=-2) for side in every)
                self._calibration = first, second
            self._bound[method.name] = method.bound(self._layers, self._calibration)
        return self._bound[method.name]


def evaluate(
    model: CausalModel | Decoder | Opened | PathLike,
    tokens: ArrayLike | Sequence[ArrayLike],
    entries: Mapping[str, Spec] | Iterable[Spec],
    *,
    protocol: Protocol | str = "prefill",
    calibration: ArrayLike | Sequence[ArrayLike] | None = None,
    store: Store | str | os.PathLike[str] | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure what each method of storing the cache costs a model, by a protocol.

    The float32 logits of a passage are computed once for all methods. Figures are kept as they are
    finished, by everything that they depend on: whoever calls again with the same `store` goes on.

    Parameters
    ----------
    model : CausalModel, Decoder, Opened, str or os.PathLike
        The model, or its file as `open_model` takes it.
    tokens : array_like of int, or sequence of such
        Passages, ``[passages, tokens]`` or rows of several lengths.
    entries : sequence or mapping
        Methods, as `Method.of` takes them; a mapping gives them names.
    protocol : Protocol or str
        One of `onnx_export.evaluation.protocols`, or its name.
    calibration : array_like of int, or sequence of such, optional
        Passages of other text, for methods with static scales.
    store : Store, str or os.PathLike, optional
        A folder in which figures are kept; in memory when not given.
    workers : int
        Processes; more than one need a model that is given by its file.
    scheduler : str, optional
        Address of a dask scheduler, whose workers find the model's file at the same place.
    progress : callable, optional
        Called as ``progress(what, done, total)`` after every figure.

    Returns
    -------
    Evaluation

    Raises
    ------
    TypeError, ValueError
        For unknown methods and protocols, a profile that is made for feedback and has none, tokens
        that the model does not know, and passages that are too short: before any work.
    OSError
        Where the model cannot be read or figures cannot be written. What was kept before stays.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> from onnx_export.evaluation import Prefill, open_model
    >>> folder = tempfile.mkdtemp()
    >>> model = open_model(tiny_gguf(folder), cache_dir=folder)
    >>> found = evaluate(
    ...     model,
    ...     np.arange(3 * 30).reshape(3, 30),
    ...     ["naive4", "naive8"],
    ...     protocol=Prefill(prefill_length=16, continuation_length=8),
    ... )
    >>> found.compare("naive4", "naive8").told_apart
    True
    >>> found.figures("naive4").size.to_dict()["bits_per_element"]
    6.0
    """
    methods, protocol = methods_of(entries), protocol_named(protocol)
    workers = as_integer("workers", workers, least=1)
    source = _source(model) if workers > 1 or scheduler is not None else None
    opened = as_model(model)
    rows = _rows("tokens", tokens, opened)
    calibrating = () if calibration is None else _rows("calibration", calibration, opened)
    calibrating = tuple(row[:CALIBRATED] for row in calibrating)
    for one in methods:
        one.require_feedback()
        if one.needs_calibration and not calibrating:
            raise ValueError(
                f"{one.name} has static scales; give calibration, tokens of other text"
            )
    units = protocol.checked(rows, opened.context_length)
    job, name = Job(protocol, methods, calibrating, opened.fingerprint), opened.name
    kept = store if isinstance(store, Store) else Store(store)
    total = len(units) * (1 + len(methods))
    missing = [job.missing(unit, kept) for unit in units]
    done = total - sum(len(some) + bool(some) for some in missing)
    todo = [(unit, some) for unit, some in zip(units, missing, strict=True) if some]
    if todo and kept.folder is not None:
        atomic.require_writable(kept.folder / "figures.json", make_folders=True)
    refused: dict[str, str] = {}

    def keep(unit: Unit, method: Method | None, record: Record) -> None:
        nonlocal done
        done += 1
        if method is not None and "refused" in record:
            refused.setdefault(method.name, record["refused"])
        else:
            kept.put(job.task(unit, method), record)
        if progress is not None:
            what = "float32" if method is None else method.name
            progress(f"{name}, passage {unit.passage + 1}: {what}", done, total)

    if workers == 1 and scheduler is None:
        worker = Worker(opened, job)
        for unit, some in todo:
            for method, record in worker.measured(
                unit, [one for one in some if one.name not in refused]
            ):
                keep(unit, method, record)
    elif todo and source is not None:
        from onnx_export.evaluation.workers import spread  # noqa: PLC0415

        del opened, model  # of which each process opens its own
        spread(source, job, todo, keep, folder=kept.folder, workers=workers, scheduler=scheduler)
    return _evaluation(name, job, rows, units, kept, refused)


def _layers(model: CausalModel, tokens: Ids) -> Sequence[int]:
    """Return the numbers of the layers, if what is in their caches is all that is read again."""
    cut = -(-len(tokens) // 2)
    whole, keys, _ = model.forward(tokens[None])
    if not np.isfinite(whole).all():
        raise ValueError(f"{model.name}: logits are not finite, with the float32 cache already")
    if len(tokens) > 1:
        _, *past = model.forward(tokens[None, :cut], num_logits=0)
        pieces, _, _ = model.forward(tokens[None, cut:], (past[0], past[1]))
        own = whole[0, cut:]
        spread = np.linalg.norm(own - own.mean(axis=-1, keepdims=True))
        apart = float(np.linalg.norm(pieces[0] - own) / max(spread, 1e-9))
        if apart > SAME:
            raise ValueError(
                f"{model.name} reads a text in pieces otherwise than at once (logits differ by "
                f"{apart:.0%}): it is no decoder, or its cache is not all that it remembers"
            )
    numbers: Sequence[int] = getattr(model, "layer_numbers", range(len(keys)))
    return numbers


def _evaluation(
    name: str,
    job: Job,
    rows: Sequence[Ids],
    units: Sequence[Unit],
    store: Store,
    refused: dict[str, str],
) -> Evaluation:
    records: dict[str, dict[str, tuple[Record, ...]]] = {}
    for method in job.methods:
        if method.name not in refused:
            found = [_found(store, job.task(unit, method)) for unit in units]
            records[method.name] = collected(units, found)
    return Evaluation(
        model={"name": name, "fingerprint": job.fingerprint},
        protocol=job.protocol.to_dict(),
        text={
            "passages": len(rows),
            "tokens": _sha256(rows),
            "calibration": _sha256(job.calibration) if job.calibration else None,
        },
        methods={method.name: method.to_dict() for method in job.methods},
        baseline=collected(units, [_found(store, job.task(unit, None)) for unit in units]),
        records=records,
        refused=dict(sorted(refused.items())),
    )


def _found(store: Store, task: dict[str, Any]) -> Record:
    record = store.get(task)
    if record is None:
        raise OSError("figures that were kept are gone; run again, and leave the folder alone")
    return record


def _rows(name: str, tokens: Any, model: CausalModel) -> tuple[Ids, ...]:
    """Take passages, and refuse tokens that the model does not know."""
    try:
        ragged = np.ndim(tokens) != 2
    except ValueError:
        ragged = True
    given = [as_integer_array(f"{name}[{i}]", row) for i, row in enumerate(tokens)]
    if not given or any(row.ndim != 1 for row in given):
        shape = "ragged" if ragged else np.shape(tokens)
        raise ValueError(f"{name} must be passages, [passages, tokens], got {shape}")
    for number, row in enumerate(given):
        require_vocabulary(f"{name}[{number}]", row, model.vocab_size, model.name)
    return tuple(np.ascontiguousarray(row, np.int64) for row in given)


def _source(model: Any) -> Opened:
    """Return how other processes open the model."""
    if isinstance(model, Opened):
        return model
    if isinstance(model, str | os.PathLike):
        return Opened(os.path.abspath(model))
    raise ValueError(
        f"workers of other processes open the model anew; give its file, not a "
        f"{type(model).__name__}"
    )


def _sha256(rows: Sequence[Ids]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{len(row)} ".encode())
        digest.update(np.ascontiguousarray(row, "<i8").tobytes())
    return digest.hexdigest()
