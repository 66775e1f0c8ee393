"""What a rewrite did, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nsq_ref.scheme import KeyValueSchemes

__all__ = ["Attention", "Change", "RewriteReport"]


class Attention(NamedTuple):
    """One attention of the model, and what became of it.

    Nothing changes one, so that threads may share it.

    Attributes
    ----------
    layer : int or None
        As the policy counts; None where it was not understood.
    node : str
    pattern : str
        Of which it is, or the operator where it was refused.
    schemes : KeyValueSchemes or None
        Of its cache now; None for one that stays as it was.
    reason : str or None
        Why it was refused.
    key_feedback : str or None
        Digest of the feedback with which its keys are coded.
    """

    layer: int | None
    node: str
    pattern: str
    schemes: KeyValueSchemes | None
    reason: str | None = None
    key_feedback: str | None = None


class Change(NamedTuple):
    """Another node that reads something else than before.

    Nothing changes one, so that threads may share it.

    Attributes
    ----------
    node, what : str
    """

    node: str
    what: str


@dataclass(frozen=True)
class RewriteReport:
    """What `rewrite` did.

    Nothing changes one, so that threads may share it.

    Attributes
    ----------
    attentions : tuple of Attention
        Of the whole model, in its order.
    changes : tuple of Change
        Of nodes that are no attention.
    removed : tuple of str
        Nodes that nobody reads any longer, those of the attentions left out.
    inputs : tuple of str
        That the model did not have before, the caches left out.
    opset : (int, int)
        Of the standard operators, before and after.
    files : tuple of Path
        That were written or linked; none where only told, or where nothing could be rewritten.

    Examples
    --------
    >>> RewriteReport((Attention(None, "a", "Attention", None, "it has no past"),)).complete
    False
    """

    attentions: tuple[Attention, ...]
    changes: tuple[Change, ...] = ()
    removed: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    opset: tuple[int, int] = (0, 0)
    files: tuple[Path, ...] = field(default=())

    @property
    def rewritten(self) -> int:
        """Attentions that have a quantized cache now."""
        return sum(one.schemes is not None for one in self.attentions)

    @property
    def complete(self) -> bool:
        """Whether nothing was refused."""
        return all(one.reason is None for one in self.attentions)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        result = asdict(self)
        result["attentions"] = [
            one._asdict()
            | {
                "schemes": one.schemes
                and {side: scheme.to_dict() for side, scheme in one.schemes._asdict().items()}
            }
            for one in self.attentions
        ]
        result["changes"] = [one._asdict() for one in self.changes]
        result["files"] = [str(path) for path in self.files]
        return result | {"rewritten": self.rewritten, "complete": self.complete}
