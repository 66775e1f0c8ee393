"""One form of a policy: what is written is read again, and every reader means the same by it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsq_ref import KeyValueSchemes, Scheme, scheme_names
from nsq_ref.audit import audit
from nsq_ref.policy import Policy, changed_fields, policy_json, scheme_text
from onnx_export.evaluation.methods import Method
from onnx_export.rewrite import rewrite
from tests.support.exports import EXPORTS

SCHEMES = st.builds(
    replace,
    st.sampled_from([Scheme.named(name) for name in scheme_names()]),
    block_size=st.sampled_from([None, 32, 128]),
    sink_tokens=st.integers(0, 3),
    scale_dtype=st.sampled_from(["float16", "float32"]),
)
PAIRS = st.builds(KeyValueSchemes, SCHEMES, SCHEMES)


@given(PAIRS, st.dictionaries(st.integers(0, 5), st.none() | PAIRS))
def test_what_is_written_is_read(
    default: KeyValueSchemes, layers: dict[int, KeyValueSchemes | None]
) -> None:
    text = json.dumps(policy_json(default, layers))
    assert Policy.of(json.loads(text)).schemes(range(6)) == {
        number: layers.get(number, default) for number in range(6)
    }
    assert Policy.of(Policy.of(json.loads(text))).default == Policy.of(json.loads(text)).default


def test_a_recommended_policy_is_what_rewriting_and_evaluating_do(tmp_path: Path) -> None:
    """Layer by layer, by each of the three verbs that have policies."""
    keys, values = np.random.default_rng(0).standard_normal((2, 2, 1, 1, 160, 16))
    keys[1, ..., :2, :] *= 0.01  # two sinks, which is a scheme without a name
    found = audit(keys, values, schemes=["naive4"], default="streaming2").policy
    (tmp_path / "p.json").write_text(json.dumps(found.to_rewrite()))
    policy = Policy.read(tmp_path / "p.json")
    schemes = policy.schemes([0, 1])
    first, second = schemes[0], schemes[1]
    assert first is not None
    assert second is not None
    assert second.key.sink_tokens == 2
    path = EXPORTS / "optimum-llama-18.onnx"
    report = rewrite(path, tmp_path / "out.onnx", policy=policy, dry_run=True)
    assert [one.schemes for one in report.attentions] == [first, second]
    bound = Method.of(policy).bound(2)
    x = keys.astype(np.float32)
    for layer, schemes_of_layer in enumerate((first, second)):
        alone = Method.of(schemes_of_layer).bound(2).replaced(x, x)[0]
        for side, read in enumerate(bound.replaced(x, x)[0]):
            np.testing.assert_array_equal(read[layer], alone[side][layer])


def test_layers_without_a_word_have_the_default_of_every_verb() -> None:
    policy = {"layers": {"1": None}}
    report = rewrite(EXPORTS / "optimum-llama-18.onnx", "out.onnx", policy=policy, dry_run=True)
    usual = Scheme.named("streaming4")
    assert report.attentions[0].schemes == KeyValueSchemes(usual, usual)
    assert Method.of(policy).policy.schemes([0, 1]) == {0: (usual, usual), 1: None}
    assert Policy.of(policy, "streaming3").schemes([0, 1])[0] == (Scheme.named("streaming3"),) * 2


REFUSED = [
    ("[]", "a policy is an object with default and layers"),
    ("{", "Expecting property name"),
    ("[" * 100_000, "no JSON of so many levels"),
    ('{"layers": {"1": null, "1": "naive4"}}', "'1' is named twice"),
    ('{"layers": {"1": null, "01": null}}', "layer 1 is named twice"),
    ('{"layers": {"-1": null}}', "'-1' is no number of a layer"),
    ('{"layers": {"1": {"key": "naive4"}}}', "layer 1: has key; give key and value"),
    ('{"layers": {"1": {"key": {"bits": 4}, "value": null}}}', "layer 1: a scheme has the fields"),
    ('{"layers": {"1": ["naive4"]}}', "layer 1: must be null, a name, or key and value, got"),
    ('{"default": "naive4/nsep"}', "default: unknown scheme name 'nsep'"),
    ('{"rest": "naive4"}', "'rest' is unknown; there are default and layers"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[one for _, one in REFUSED])
def test_what_is_no_policy(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Policy.read(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("streaming4/float32", "policy: layer 0: value is null: keys and values of a layer are"),
        ("streaming4/q8_0", "policy: layer 0: value is a method of others, which no quantized"),
        ("float16", "policy: layer 0: key is float16, which no quantized cache has"),
    ],
)
def test_what_only_an_evaluation_stores(entry: Any, message: str) -> None:
    policy = Policy.of({"layers": {0: entry}})
    assert Method.of(policy).bound(1).runs
    with pytest.raises(ValueError, match=message):
        policy.schemes([0])


def test_names_of_schemes() -> None:
    streaming4 = Scheme.named("streaming4")
    assert scheme_text(streaming4) == "streaming4"
    assert scheme_text(replace(streaming4, block_size=64)) == "streaming4 block_size=64"
    assert scheme_text(Scheme.named("nsep+pchan4")) == "nsep+pchan4"
    balanced = replace(streaming4, **changed_fields(["norm_rule=balanced", "magnitude=gain"]))
    assert scheme_text(balanced) == "streaming4 norm_rule=balanced magnitude=gain"
