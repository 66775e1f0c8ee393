"""Chat templates: what is rendered, what is refused, and where they are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnx_export.models.chat_template import ChatTemplate, read_chat_template
from onnx_export.models.json_tokenizer import JsonTokenizer, read_tokenizer, tokenizer_files
from onnx_export.models.tokenizer import Tokenizer, byte_symbols
from tests.support.chat import CHATML, chat_gguf

HELLO = [{"role": "user", "content": "Hello <&> 'é'"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def rendered(source: str) -> str:
    return ChatTemplate(source, TOKENS).render(HELLO)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, "<|im_start|>user\nHello <&> 'é'<|im_end|>\n<|im_start|>assistant\n"),
        ("{{ bos_token }}{% if tools is none %}none{% endif %}{{ eos_token }}", "<s>none</s>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello <&> \'é\'"}]'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=True) }}", '{\n "a": 2,\n "b": 1\n}'),
        # Blocks on lines of their own leave none, as in transformers.
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}.", "user."),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ missing }}{{ strftime_now('%%') }}", "%"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
    ],
)
def test_what_templates_use(source: str, expected: str) -> None:
    assert rendered(source) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles\nmust alternate') }}", "refuses: roles must alternate$"),
        ("{% if %}", "fails: Expected an expression"),
        ("{{ messages[0].content + 1 }}", "fails: can only concatenate str"),
        ("{{ missing.role }}", "fails: 'missing' is undefined"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ range(10 ** 9) | list }}", "fails: Range too big"),
        ("{{ messages.append(1) }}", "fails: .* unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails: .* unsafe"),
        ("{% include '/etc/passwd' %}", "fails: "),
        ("{{ messages | nothing }}", "fails: No filter named 'nothing'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: maximum recursion"),
    ],
)
def test_a_template_that_fails_is_one_line(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"the chat template {message}") as error:
        rendered(source)
    assert "\n" not in str(error.value)


def test_where_templates_are(tmp_path: Path) -> None:
    def render(config: object, own: str | None = None) -> str | None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if own is not None:
            (tmp_path / "chat_template.jinja").write_text(own)
        found = read_chat_template(tmp_path)
        return None if found is None else found.render(HELLO)

    assert read_chat_template(tmp_path) is None
    assert render({"bos_token": "<s>"}) is None
    assert render({"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}"}) == "<s>"
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert render({"chat_template": several}) == "d"
    assert render({"chat_template": several[:1]}) is None
    assert render({"chat_template": "old", "eos_token": "!"}, "new{{ eos_token }}") == "new!"
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is no JSON object"):
        render([])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is no JSON: "):
        read_chat_template(tmp_path)


def test_a_gguf_file_and_what_is_built_of_it_say_the_same(tmp_path: Path) -> None:
    path = chat_gguf(tmp_path)
    for name, content in tokenizer_files(Tokenizer(path)).items():
        (tmp_path / name).write_bytes(content)
    one, other = read_tokenizer(path), JsonTokenizer(tmp_path / "tokenizer.json")
    expected = "<|im_start|>user\non<|im_end|>\n<|im_start|>assistant\n"
    ids = Tokenizer(path).encode(expected).tolist()
    messages = [{"role": "user", "content": "on"}]
    assert one.encode_chat(messages).tolist() == other.encode_chat(messages).tolist() == ids
    # Of the turn first, then of what else ends one.
    assert one.stop_tokens == other.stop_tokens == (2, 0)
    assert other.decode([*ids, 2]) == "user\non\nassistant\n"


def test_bytes_that_the_vocabulary_lacks_are_refused_in_messages_too(tmp_path: Path) -> None:
    symbols = byte_symbols()
    symbols[4] = "never"
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *symbols, "th"]
    tokenizer = read_tokenizer(chat_gguf(tmp_path, changes={"tokenizer.ggml.tokens": tokens}))
    known, unknown = ([{"role": "user", "content": text}] for text in ("a\x05", "a\x04"))
    assert "a\x05" in tokenizer.decode(tokenizer.encode_chat(known))
    with pytest.raises(ValueError, match="holds the byte 0x04, which this vocabulary lacks"):
        tokenizer.encode_chat(unknown)


@pytest.mark.parametrize("pre", ["llama-bpe", "smollm"])
@pytest.mark.parametrize("said", [True, False, None])
def test_texts_begin_as_the_file_says(tmp_path: Path, pre: str, said: bool | None) -> None:
    """And of Llama 3 by default; a conversation begins as its template does."""
    path = chat_gguf(tmp_path, pre=pre, add_bos=said)
    for name, content in tokenizer_files(Tokenizer(path)).items():
        (tmp_path / name).write_bytes(content)
    begins = said if said is not None else pre == "llama-bpe"
    for tokenizer in (read_tokenizer(path), JsonTokenizer(tmp_path / "tokenizer.json")):
        assert (tokenizer.encode("on")[0] == 1) == begins
        chat = tokenizer.encode_chat([{"role": "user", "content": "on"}]).tolist()
        assert chat[:1] == [1]
        assert chat.count(1) == 2  # of each turn
    assert Tokenizer(path).encode("on")[0] != 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.bos_token_id": 10**6}, "'tokenizer.ggml.bos_token_id' is 1000000, not"),
        ({"tokenizer.ggml.eot_token_id": 10**6}, "'tokenizer.ggml.eot_token_id' is 1000000, not"),
        ({"tokenizer.ggml.add_bos_token": 7}, "'tokenizer.ggml.add_bos_token' has the wrong type"),
        ({"tokenizer.chat_template": 7}, r"'tokenizer\.chat_template' has the wrong type"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    path = chat_gguf(tmp_path, changes=change)
    with pytest.raises(ValueError, match=message):
        Tokenizer(path)


def test_a_text_that_begins_with_nothing_known_is_refused(tmp_path: Path) -> None:
    path = chat_gguf(tmp_path, add_bos=True, bos=None)
    with pytest.raises(ValueError, match=r"'tokenizer\.ggml\.bos_token_id' is missing"):
        Tokenizer(path)
