import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from nodeserve.errors import InvalidRequest, ModelError
from nodeserve.text import Detokenizer, StopStrings, Tokenizer
from tests.fakes.gguf_writer import gpt2_metadata, sentencepiece_metadata, write_gguf

BOS, EOS, OWN = 261, 262, 263


def load(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.load(str(write_gguf(folder / "m.gguf", metadata)))


@pytest.fixture(params=["gpt2", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    make = gpt2_metadata if request.param == "gpt2" else sentencepiece_metadata
    return load(tmp_path, make())


# -- encoding -----------------------------------------------------------------------------------


def test_byte_level_encoding(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, gpt2_metadata())
    assert tokenizer.encode("hello hello") == [259, 260]
    assert tokenizer.encode("hé") == [ord("h"), 0xC3, 0xA9]
    assert tokenizer.encode("") == []
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    assert tokenizer.vocab_size == 264


@pytest.mark.parametrize("skip_special", [True, False])
def test_ids_that_nobody_knows_leave_nothing_behind(
    tokenizer: Tokenizer, skip_special: bool
) -> None:
    tokenizer.decode(range(tokenizer.vocab_size), skip_special)
    num_kept = len(tokenizer.pieces(True)), len(tokenizer.pieces(False))
    unknown = [*range(tokenizer.vocab_size, tokenizer.vocab_size + 1000), -1, 1 << 31, 1 << 40]
    assert tokenizer.decode(unknown, skip_special) == ""
    assert (len(tokenizer.pieces(True)), len(tokenizer.pieces(False))) == num_kept


def test_special_tokens_are_parsed_or_not(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, gpt2_metadata())
    assert tokenizer.encode("<bos>he<own>") == [BOS, 256, OWN]
    plain = tokenizer.encode("<bos>he<own>", parse_special=False)
    assert plain == [*b"<bos>", 256, OWN]  # a user's own token is text of one piece
    assert tokenizer.decode(plain) == "<bos>he<own>"
    assert tokenizer.decode([BOS, 256, OWN]) == "he<own>"
    assert tokenizer.decode([BOS, 256, OWN], skip_special=False) == "<bos>he<own>"


@pytest.mark.parametrize(
    ("add_bos", "add_eos", "expected"),
    [
        (False, False, [259]),
        (True, False, [BOS, 259]),
        (False, True, [259, EOS]),
        (True, True, [BOS, 259, EOS]),
    ],
)
def test_bos_and_eos_as_the_file_wants(
    tmp_path: Path, add_bos: bool, add_eos: bool, expected: list[int]
) -> None:
    ends = {"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": add_eos}
    tokenizer = load(tmp_path, gpt2_metadata(**ends))
    assert tokenizer.encode("hello") == expected
    assert tokenizer.encode("hello", add_special=False) == [259]


def test_sentencepiece_encoding(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, sentencepiece_metadata())
    hello, w = 259 + 9, 259 + 11
    assert tokenizer.encode("hello w") == [1, hello, w]
    assert tokenizer.encode("é", add_special=False) == [259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode([1, hello, w]) == "hello w"
    assert tokenizer.decode([hello, w], continues=True) == " hello w"
    assert tokenizer.decode([3 + 0xC3, 3 + 0xA9]) == "é"
    bare = load(tmp_path, sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": False}))
    assert bare.decode(bare.encode(" hello")) == " hello"


def test_what_is_not_text_is_refused(tokenizer: Tokenizer) -> None:
    for prompt in (None, 7, b"x", "\ud800"):
        with pytest.raises(InvalidRequest, match="prompt must be text"):
            tokenizer.encode(prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported, only gpt2 and llama"),
        ({"tokenizer.ggml.model": 5}, "must be a string"),
        ({"tokenizer.ggml.pre": "klingon"}, "'klingon' is not supported, only .*qwen2.*smollm"),
        ({"tokenizer.ggml.tokens": "x"}, "has no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "a number for each token"),
        ({"tokenizer.ggml.merges": ["un known"]}, "do not fit"),
        ({"tokenizer.ggml.merges": ["single"]}, "do not fit"),
        ({"tokenizer.ggml.bos_token_id": 999}, "not one of the 264 tokens"),
    ],
)
def test_damaged_vocabularies_are_model_errors(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load(tmp_path, gpt2_metadata(**changes))


def test_folders_that_hold_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        Tokenizer.load(str(tmp_path))


def test_threads_may_share_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, gpt2_metadata())
    results: list[bool] = []

    def work() -> None:
        for _ in range(200):
            parsed = tokenizer.encode("<bos>hello") == [BOS, 259]
            results.append(parsed and tokenizer.encode("<bos>", parse_special=False) != [BOS])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 800


# -- detokenising -------------------------------------------------------------------------------


def chunks(token_ids: list[int], rng: random.Random) -> list[list[int]]:
    cuts = sorted(rng.choices(range(len(token_ids) + 1), k=rng.randint(0, len(token_ids))))
    return [token_ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(token_ids)], strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_any_chunking_joins_to_the_full_decode(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    outside = [-1, tokenizer.vocab_size, 2**40]
    for _ in range(100):
        ids = rng.choices([*range(tokenizer.vocab_size), *outside], k=rng.randint(0, 30))
        if rng.random() < 0.5:
            text = "".join(chr(rng.choice([0x41, 0x20, 0xE9, 0x4F60, 0x1F642])) for _ in range(8))
            ids += tokenizer.encode(text, add_special=False)
        for skip_special in (True, False):
            for continues in (True, False):
                options: dict[str, Any] = {"skip_special": skip_special, "continues": continues}
                stream = Detokenizer(tokenizer, **options)
                parts = [stream.push(chunk) for chunk in chunks(ids, rng)]
                assert "".join(parts) + stream.finish() == tokenizer.decode(ids, **options)


def test_no_broken_character_is_emitted(tokenizer: Tokenizer) -> None:
    text = "naïve 你好 🙂👨‍👩‍👧‍👦 é\u0301"
    stream = Detokenizer(tokenizer)
    parts = [stream.push([token_id]) for token_id in tokenizer.encode(text)]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) == text and stream.finish() == ""


def test_bytes_that_never_become_a_character_are_replaced(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, gpt2_metadata())
    stream = Detokenizer(tokenizer)
    assert stream.push([0xF0, 0x9F]) == ""
    assert stream.push([ord("a")]) == "\ufffda"
    assert stream.push([0xE4]) == "" and stream.finish() == "\ufffd"


# -- stop strings -------------------------------------------------------------------------------


def by_character(stops: list[str], text: str) -> tuple[str, bool]:
    """The definition: read one character after the other until a stop string ends there."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@pytest.mark.parametrize("seed", range(5))
def test_stop_strings_do_not_depend_on_chunks(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        text = "".join(rng.choices("abc", k=rng.randint(0, 14)))
        watcher = StopStrings(stops)
        emitted, rest, hit = "", text, False
        while rest and not hit:
            size = rng.randint(1, 4)
            part, hit = watcher.push(rest[:size])
            emitted, rest = emitted + part, rest[size:]
        assert (emitted + watcher.finish(), hit) == by_character(stops, text), (stops, text)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    watcher = StopStrings(["\n\nUser:", "END"])
    assert watcher.push("Hello") == ("Hello", False)
    assert watcher.push(" E") == (" ", False)
    assert watcher.push("N") == ("", False)
    assert watcher.push("T\n") == ("ENT", False)
    assert watcher.push("\nUser: hi") == ("", True)
    assert watcher.push("more") == ("", True)
    assert watcher.finish() == ""


def test_a_stop_may_be_one_string_and_never_an_empty_one() -> None:
    assert StopStrings("stop").push("please stop it") == ("please ", True)
    for stops in ([""], "", ["a", ""], [7]):
        with pytest.raises(InvalidRequest, match="stop must be strings"):
            StopStrings(stops)  # type: ignore[arg-type]


# -- chat ---------------------------------------------------------------------------------------

TEMPLATE = """\
{% for message in messages %}
    {% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
{{ bos_token }}{{ message.role }}: {{ message.content }}
{% endfor %}
{% if add_generation_prompt %}{% generation %}assistant:{% endgeneration %}{% endif %}
{{ {'<b>': extra} | tojson if extra else '' }}"""


def chat(folder: Path, template: str = TEMPLATE) -> Tokenizer:
    return load(folder, gpt2_metadata(**{"tokenizer.chat_template": template}))


def test_a_conversation_is_written_by_the_template(tmp_path: Path) -> None:
    tokenizer = chat(tmp_path)
    assert tokenizer.has_chat_template
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert tokenizer.chat_prompt(messages) == "<bos>user: Hi\n<bos>user: a\nb\nassistant:"
    shown = tokenizer.chat_prompt(messages[:1], add_generation_prompt=False, extra="ü<")
    assert shown == '<bos>user: Hi\n{"<b>": "ü<"}'


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of at least one message"),
        ("hello", "messages must be a list"),
        (None, "messages must be a list"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"content": "x"}], r"messages\[0\].role must be a string"),
        ([{"role": "user", "content": "x"}, {"role": 3}], r"messages\[1\].role"),
        ([{"role": "user"}], r"messages\[0\].content must be a string or a list"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content must be"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\].type must be 'text', got None"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "got 'image_url': only text"),
        ([{"role": "user", "content": [{"type": "x" * 9999}]}], r"got 'x{,20}\.\.\.x{,20}': only"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text must be a string"),
        ([{"role": "tool", "content": "x"}], "refuses these messages: no tools here"),
    ],
)
def test_bad_messages_are_invalid_requests(tmp_path: Path, messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        chat(tmp_path).chat_prompt(messages)


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    for attack in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"):
        with pytest.raises(InvalidRequest, match="the chat template refuses"):
            chat(tmp_path, attack).chat_prompt(messages)
    with pytest.raises(ModelError, match="chat template is not valid"):
        chat(tmp_path, "{% if %}").chat_prompt(messages)
    year = chat(tmp_path, "{{ strftime_now('%Y') }}").chat_prompt(messages)
    assert year.isdigit() and len(year) == 4


def test_no_template_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, gpt2_metadata())
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="has no chat template: send a prompt instead"):
        tokenizer.chat_prompt([{"role": "user", "content": "x"}])


# -- folders ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The byte-level tokenizer above as a folder of the hub."""
    source = load(tmp_path, gpt2_metadata())
    (tmp_path / "tokenizer.json").write_text(source._encoder.to_str())
    config = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder_encodes_as_its_source(folder: Path) -> None:
    tokenizer = Tokenizer.load(str(folder))
    assert tokenizer.encode("<bos>hello hello<own>") == [BOS, 259, 260, OWN]
    assert tokenizer.decode([BOS, 259, 0xC3, 0xA9, OWN]) == "helloé<own>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)


def test_where_a_folder_keeps_its_template(folder: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]

    def written() -> str:
        return Tokenizer.load(str(folder)).chat_prompt(messages, add_generation_prompt=False)

    assert written() == "<bos>user: Hi\n"
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "several"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert written() == "several"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert written() == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert written() == "jinja"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="cannot read .*chat_template.jinja"):
        written()


def test_decoders_of_other_families_are_refused(folder: Path) -> None:
    state = json.loads((folder / "tokenizer.json").read_text())
    state["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ModelError, match="decoder WordPiece is not supported"):
        Tokenizer.load(str(folder))
