"""``python -m benchmarks.results measure [GROUP ...]`` or ``pages``."""

from __future__ import annotations

import argparse
import functools
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import facts, measure, needles, plans, structure
from nsq_ref.feedback import Moments
from onnx_export.evaluation.injected import changed_moments, injected_onnx
from onnx_export.evaluation.moments import query_moments
from onnx_export.evaluation.passages import reporting
from onnx_export.models.decoder import Decoder, cached_onnx
from onnx_export.models.json_tokenizer import tokenizer_of
from onnx_export.models.sources import gemma3_gguf, smollm2_gguf
from onnx_export.models.texts import passages
from onnx_export.models.tokenizer import Tokenizer

FACTS, NEEDLES, STRUCTURE = "facts", "needles", "structure"
GROUPS = [*plans.GROUPS, FACTS, NEEDLES, STRUCTURE]


def say(text: str) -> None:
    """Tell progress."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


@functools.cache
def moments_of(gguf: Path) -> Moments:
    """Return the second moments of a model's queries, which are had once for all its plans."""
    say(f"{gguf.name}: calibrating")
    return query_moments(gguf)


class Model(NamedTuple):
    """A model as plans take it."""

    gguf: Path
    path: Path  # of its ONNX file
    tokenizer: Tokenizer
    decoder: Decoder

    @classmethod
    def of(cls, gguf: Path, threads: int | None) -> Model:
        """Open one."""
        path = cached_onnx(gguf)
        return cls(gguf, path, Tokenizer(gguf), Decoder(path, threads=threads))


def measure_groups(groups: list[str], threads: int | None, most: int | None) -> None:
    """Run what is missing of these groups of plans."""
    smollm2 = Model.of(smollm2_gguf(), threads)
    tokenizer, decoder = smollm2.tokenizer, smollm2.decoder
    chosen = passages(tokenizer, 641, 1)
    _, keys, values = decoder.forward(chosen[:, :512], num_logits=0)
    static = plans.RIVALS if "rivals" in groups else ()
    calibration = measure.calibrated(static, keys, values)
    for group in groups:
        if group == NEEDLES:
            needles.run_needles(decoder, tokenizer, keys, say)
            continue
        if group == FACTS:
            facts.run_facts(decoder, tokenizer, keys, say)
            continue
        if group == STRUCTURE:
            structure.run_structure(decoder, tokenizer, say)
            continue
        for plan in plans.GROUPS[group](keys):
            count = plan.passages if most is None else min(most, plan.passages)
            if len(measure.read(measure.DATA / f"{plan.name}.json", plan)["baseline"]) >= count:
                continue
            one = smollm2
            if plan.model == measure.GEMMA3:
                one = Model.of(gemma3_gguf(), threads)
            tokens = reporting(tokenizer_of(one.gguf), 641, count)
            with tempfile.TemporaryDirectory(dir=one.path.parent.parent) as folder:
                own, entries = one.decoder, dict(calibration)
                if plan.changes:
                    path = injected_onnx(one.path, folder, plan.changes)
                    own = Decoder(path, threads=threads)
                if plan.wants_feedback:
                    moments = changed_moments(moments_of(one.gguf), plan.changes)
                    entries |= measure.fed_back(plan, moments.feedback())
                measure.run(plan, own, tokens, say, calibration=entries)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("measure", help="run what is missing of the experiments")
    verb.add_argument("groups", nargs="*", choices=[*GROUPS, []], metavar="GROUP")
    verb.add_argument("--threads", type=int, default=1)
    verb.add_argument("--passages", type=int, help="no more than so many of each plan")
    verbs.add_parser("pages", help="write docs/results from what was measured")
    args = parser.parse_args()
    if args.verb == "pages":
        from benchmarks.results.pages import write_pages  # which needs matplotlib

        say(f"wrote {', '.join(write_pages())}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that folders are removed
    measure_groups(args.groups or GROUPS, args.threads, args.passages)


if __name__ == "__main__":
    main()
