"""Text against transformers' tokenizers and chat templates; streaming against decoding everything at once."""

import json
import random
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from genbundle.bundles import BundleError, InputError
from genbundle.bundles.manifest import Text
from genbundle.runtime.text import StopStrings, StreamDecoder, TextProcessor

DEMO = Path(__file__).parents[2] / "builder/genbundle/builder/demo/model"
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12 o'clock, isn't it?",
    "Hello world! Hello there, how are you?  Two spaces.\n\tA tab.",
    "naïve café, Grüße aus Köln, 東京 and שלום",
] * 20
TEXTS = [
    "",
    "Hello world",
    " leading space",
    "Hello, how are you? It's fine -- isn't it?",
    "naïve café in 東京, 👩‍🚀 and 🤗🤗!",
    "two  spaces\n\n\tand lines \n",
    "<s>Hello</s> again<s>",
    "שלום Привет ½",
]
BOS = ["<s>", "</s>", "<pad>", "<unk>"]


def byte_level():
    """GPT-2 like: byte-level BPE, no special tokens added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(BOS)
    return tokenizer


def metaspace():
    """Llama like: SentencePiece BPE with byte fallback, <s> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*BOS, *byte_tokens], limit_alphabet=60)
    tokenizer.train_from_iterator(CORPUS[:2], trainer)
    # Training leaves the byte tokens special; SentencePiece's are ordinary ones, so only the vocabulary is kept.
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    model = models.BPE(tokenizer.get_vocab(), merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer, pre_tokenizer = Tokenizer(model), tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in BOS])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def word_piece():
    """BERT like: WordPiece, lower case, [CLS] and [SEP] around."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ids)
    return tokenizer


KINDS = {"byte_level": byte_level, "metaspace": metaspace, "word_piece": word_piece}


@pytest.fixture(scope="module", params=[*KINDS, "demo"])
def pair(request, tmp_path_factory):
    """Our processor and transformers' tokenizer over the same tokenizer.json."""
    if request.param == "demo":
        path = DEMO / "tokenizer.json"
        if not path.is_file():
            pytest.skip("the demo model isn't in this checkout")
    else:
        path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
        KINDS[request.param]().save(str(path))
    ours = TextProcessor.from_files(Text(tokenizer=path.name), path.parent)
    return ours, PreTrainedTokenizerFast(tokenizer_file=str(path))


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_equal_transformers(pair, text):
    ours, theirs = pair
    for special in (True, False):
        ids = theirs(text, add_special_tokens=special)["input_ids"]
        assert ours.encode(text, add_special_tokens=special) == ids
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_chunks_make_the_text(pair, text):
    ours, _ = pair
    for special in (True, False):
        ids = ours.encode(text, add_special_tokens=special)
        stream = StreamDecoder(ours)
        chunks = [stream.push(token) for token in ids] + [stream.flush()]
        assert "".join(chunks) == ours.decode(ids)
        if "�" not in ours.decode(ids):
            assert not any("�" in chunk for chunk in chunks)


def test_streaming_any_sequence_of_tokens(pair):
    """What a model of any quality emits, invalid bytes left aside: whole texts, cut and joined anywhere."""
    ours, _ = pair
    generator = random.Random(0)
    for _ in range(60):
        ids = []
        for _ in range(6):
            piece = ours.encode(generator.choice(TEXTS[1:]), add_special_tokens=generator.random() < 0.3)
            ids += piece
        stream = StreamDecoder(ours)
        assert "".join([*map(stream.push, ids), stream.flush()]) == ours.decode(ids)


def test_streaming_tokens_that_are_half_characters():
    ours = _processor(byte_level)
    ids = ours.encode("🤗 ok")
    stream = StreamDecoder(ours)
    chunks = [stream.push(token) for token in ids]
    assert chunks[:4] == ["", "", "", "🤗"]
    assert "".join(chunks) == "🤗 ok"


def test_streaming_ends_in_half_a_character():
    ours = _processor(byte_level)
    ids = ours.encode("a🤗")[:-1]
    stream = StreamDecoder(ours)
    assert "".join(map(stream.push, ids)) == "a"
    assert stream.flush() == "�"
    assert stream.flush() == ""


@pytest.mark.parametrize("byte", [0xFF, 0x80])
def test_bytes_that_never_become_text_neither_stall_nor_grow(byte):
    ours = _processor(byte_level)
    token = ours._tokenizer.token_to_id(_byte_token(byte))
    stream = StreamDecoder(ours)
    chunks = [stream.push(token) for _ in range(200)]
    assert len(stream._waiting) + len(stream._known) < 20
    assert len("".join(chunks)) > 150
    assert "".join([*chunks, stream.flush()]) == ours.decode([token] * 200)
    text = "".join([StreamDecoder.push(stream, token) for token in ours.encode(" and back")])
    assert text.endswith(" and back")


def test_streaming_costs_the_same_at_any_length():
    ours = _processor(metaspace)
    ids = ours.encode("The quick brown fox jumps over the lazy dog. ", add_special_tokens=False) * 200
    stream = StreamDecoder(ours)
    widest = 0
    started = time.perf_counter()
    for token in ids:
        stream.push(token)
        widest = max(widest, len(stream._known) + len(stream._waiting))
    assert widest <= 12
    assert (time.perf_counter() - started) / len(ids) < 0.002


def test_special_tokens_do_not_widen_the_window():
    ours = _processor(metaspace)
    stream = StreamDecoder(ours)
    end = ours._tokenizer.token_to_id("</s>")
    chunks = [stream.push(token) for token in ours.encode("Hello") + [end] * 100 + ours.encode("Hello")]
    assert len(stream._waiting) + len(stream._known) < 20
    assert "".join(chunks) == "Hello Hello"


def test_text_that_is_no_text():
    ours = _processor(byte_level)
    with pytest.raises(InputError, match="got bytes"):
        ours.encode(b"abc")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="surrogate"):
        ours.encode("a\ud800b")
    assert ours.decode([10**6]) == ""


def test_a_broken_tokenizer_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json: can't be read as a tokenizer"):
        TextProcessor.from_files(Text(tokenizer="tokenizer.json"), tmp_path)


WORDS = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "decoder": None,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
    "model": {"type": "WordLevel", "vocab": {"hello": 0, "x": 1}, "unk_token": "<unk>"},
}  # fmt: skip


@pytest.mark.parametrize("model", [WORDS["model"], {"type": "Unigram", "unk_id": None, "vocab": [["hello", 0.0]]}])
def test_words_that_a_tokenizer_has_no_token_for(tmp_path, model):
    (tmp_path / "t.json").write_text(json.dumps({**WORDS, "model": model}))
    ours = TextProcessor.from_files(Text(tokenizer="t.json"), tmp_path)
    with pytest.raises(InputError, match="the model's tokenizer can't encode 'hello zzz'"):
        ours.encode("hello zzz")


@pytest.mark.parametrize("charsmap", ["AAAA", "/////////////w=="])
def test_a_tokenizer_that_panics(tmp_path, charsmap, capfd):
    normalizer = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    (tmp_path / "t.json").write_text(json.dumps({**WORDS, "normalizer": normalizer}))
    with pytest.raises(BundleError, match=r"t\.json: can't be read as a tokenizer"):
        TextProcessor.from_files(Text(tokenizer="t.json"), tmp_path)


def test_padding_and_truncation_left_in_the_file_do_not_count(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = TextProcessor.from_files(Text(tokenizer="tokenizer.json"), tmp_path)
    assert ours.decode(ours.encode("Hello world, hello")) == "Hello world, hello"


# Chat templates

LLAMA = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|' + message.role + '|>\\n' + message['content'] | trim + eos_token }}
    {%- if loop.index > 10 %}{% break %}{% endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""
FEATURES = """{% set ns = namespace(n=0) %}
{% for m in messages %}
  {% set ns.n = ns.n + 1 %}
  {% generation %}
    {{ m.content if m.content is string else m.content | map(attribute='type') | join('+') }}
  {% endgeneration %}
{% endfor %}
{{ ns.n }} {{ strftime_now('%Y') | length }} {{ dict(a=1) | tojson }} {{ '<é>' | tojson }}
{{ messages[0].reasoning_content }} {{ extra | default('none') }} {{ unk_token is defined }} {{ tools is none }}
"""
CHATS = [
    [{"role": "user", "content": " Hi <b> "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": "ok"},
    ],
    [{"role": "user", "content": "x", "reasoning": "because", "name": None}],
]


@pytest.mark.parametrize("template", [LLAMA, FEATURES])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("prompted", [True, False])
def test_chat_templates_render_as_in_transformers(tmp_path, template, messages, prompted):
    ours, theirs = _with_template(tmp_path, template)
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for variables in ({}, {"tools": [{"name": "é", "n": 1}], "extra": 3}):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted, **variables)
        assert ours.apply_chat_template(messages, add_generation_prompt=prompted, **variables) == expected


def test_parts_of_messages(tmp_path):
    ours, theirs = _with_template(tmp_path, FEATURES)
    parts = [{"type": "image", "image": object()}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": parts}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "image+text" in expected
    assert ours.apply_chat_template(messages) == expected
    parts[0] = {"type": "image_url", "image_url": {"url": "data:..."}}
    assert ours.apply_chat_template(messages) == expected


def test_the_demo_models_template():
    if not DEMO.is_dir():
        pytest.skip("the demo model isn't in this checkout")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(DEMO)
    ours = TextProcessor.from_files(Text(tokenizer="tokenizer.json", chat_template="chat_template.jinja"), DEMO)
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it? "}, {"type": "image"}]}]
    template = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(messages) == expected
    assert "<image>" in expected


def test_chat_ids_get_special_tokens_where_transformers_adds_them(tmp_path):
    ours, theirs = _with_template(tmp_path, LLAMA)
    prompt = ours.apply_chat_template(CHATS[0])
    expected = theirs.apply_chat_template(CHATS[0], add_generation_prompt=True)["input_ids"]
    assert ours.encode_chat(prompt) == expected
    processor = TextProcessor.from_files(ours.description, tmp_path, chat_adds_special_tokens=True)
    assert processor.encode_chat(prompt) == expected  # <s> is written already
    assert processor.encode_chat("no start") == theirs("no start")["input_ids"]
    assert ours.encode_chat("no start") == theirs("no start", add_special_tokens=False)["input_ids"]


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.eval_ctx.environment.loader() }}",
    "{{ ('{0.__class__.__init__.__globals__}').format(raise_exception)['os'] }}{{ raise_exception('no') }}",
    "{{ dict.__init__.__globals__['x'] }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ messages.append(1) }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.name }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ nothing.at.all }}",
    "{{ raise_exception('no such role') }}",
    "{% for %}",
    "{{ messages[0]['role'] + 1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]


GREEDY = [
    "{{ 'a' * (10 ** 8) }}",
    "{{ (10 ** 8) * 'a' }}",
    "{{ [1] * (10 ** 9) }}",
    "{{ 10 ** (10 ** 7) % 3 }}",
    "{{ '%0200000000d' % 1 }}",
    "{{ '%.200000000f' % 1 }}",
    "{{ '%*d' % (200000000, 1) }}",
    "{{ '%(a)200000000s' % {'a': 1} }}",
    "{{ '%200000000d'|format(1) }}",
    "{{ '{:>200000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 200000000) }}",
    "{{ '{a:{b}}'.format(a=1, b='>200000000') }}",
    "{{ 'a'.center(10 ** 9) }}",
    "{{ 'a'.ljust(width=10 ** 9) }}{{ 'a'.zfill(10 ** 9) }}",
    "{{ 'a'|center(10 ** 9) }}",
    "{{ 'a\nb'|indent(10 ** 9) }}",
    "{{ [1]|batch(10 ** 9, 0)|list }}",
    "{{ [1]|tojson(indent=10 ** 9) }}",
    "{{ lipsum(n=10000) }}",
    "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(40) %}{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
    "{% for i in range(9000) %}{% for j in range(9000) %}aaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("template", GREEDY)
def test_templates_that_would_take_gigabytes(tmp_path, template):
    ours, _ = _with_template(tmp_path, template)
    tracemalloc.start()
    with pytest.raises(InputError, match="chat template"):
        ours.apply_chat_template(CHATS[0])
    assert tracemalloc.get_traced_memory()[1] < 300_000_000
    tracemalloc.stop()


def test_templates_may_still_format(tmp_path):
    template = (
        "{{ '%s: %05d' % ('a', 7) }} {{ '{:>3}|{}'.format(1, 123456789) }} {{ '=' * 10 }} {{ 2 ** 10 }} {{ 7 % 4 }} "
        "{{ [1] + [2] }} {{ 'x'|center(3) }} {{ 10 ** 12 }} {{ '%s'|format(123456789012) }} {{ 'a' ~ 10 ** 9 }}"
        "{{ ['a', 1]|join('-') }} {{ [{'b': 2}]|join(',', attribute='b') }} {{ 'aba'|replace('a', 'c', 1) }} "
        "{{ ', '.join(['a', 'b']) }} {{ 'aba'.replace('a', 'c') }} {{ messages[0].role ~ none ~ 1.5 }}"
    )
    ours, theirs = _with_template(tmp_path, template)
    assert ours.apply_chat_template(CHATS[0]) == theirs.apply_chat_template(CHATS[0], tokenize=False)


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_and_broken_templates(tmp_path, template):
    ours, _ = _with_template(tmp_path, template)
    with pytest.raises(InputError, match="chat template"):
        ours.apply_chat_template(CHATS[0])


def test_template_errors_carry_their_words(tmp_path):
    ours, _ = _with_template(tmp_path, LLAMA)
    with pytest.raises(InputError, match="Unknown role tool"):
        ours.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("messages", ["Hello", {"role": "user"}, ["Hello"], [{"content": "x"}], [{"role": 3}]])
def test_messages_that_are_none(tmp_path, messages):
    ours, _ = _with_template(tmp_path, LLAMA)
    with pytest.raises(InputError, match=r"expected .*messages"):
        ours.apply_chat_template(messages)


def test_objects_in_messages_show_templates_nothing_but_their_type(tmp_path):
    ours, _ = _with_template(tmp_path, "{{ messages[0].content[0].image }}{{ messages[0].content[0].image.unlink() }}")
    with pytest.raises(InputError, match="has no attribute 'unlink'"):
        ours.apply_chat_template([{"role": "user", "content": [{"image": tmp_path}]}])


def test_no_template():
    with pytest.raises(InputError, match="no chat template"):
        _processor(byte_level).apply_chat_template(CHATS[0])


# Stop strings


def feed_all(stops, pieces):
    watch = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, stopped = watch.feed(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + watch.flush(), False


def test_stop_strings_do_not_depend_on_how_the_text_arrives():
    generator = random.Random(1)
    for _ in range(500):
        text = "".join(generator.choice("abc") for _ in range(12))
        stops = ["".join(generator.choice("abc") for _ in range(generator.randint(1, 4))) for _ in range(3)]
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        expected = (text[: min(found)[1]], True) if found else (text, False)
        cuts = sorted(generator.sample(range(13), 4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
        assert feed_all(stops, pieces) == expected
        assert feed_all(stops, text) == expected


def test_stop_strings_hold_back_only_what_may_be_one():
    watch = StopStrings(["\nUser:", "###"])
    assert watch.feed("Hello") == ("Hello", False)
    assert watch.feed(" there\nUs") == (" there", False)
    assert watch.feed("ually#") == ("\nUsually", False)
    assert watch.feed("##more") == ("", True)
    assert StopStrings(()).feed("anything") == ("anything", False)


@pytest.mark.parametrize("stops", ["abc", [""], [3]])
def test_stop_strings_that_are_none(stops):
    with pytest.raises(InputError, match="expected stop strings"):
        StopStrings(stops)


def _processor(kind):
    with tempfile.TemporaryDirectory() as directory:
        kind().save(f"{directory}/tokenizer.json")
        return TextProcessor.from_files(Text(tokenizer="tokenizer.json"), Path(directory))


def _with_template(tmp_path, template):
    metaspace().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **special)
    theirs.chat_template = template
    text = Text(tokenizer="tokenizer.json", chat_template="chat_template.jinja", special_tokens=special)
    return TextProcessor.from_files(text, tmp_path), theirs


def _byte_token(byte):
    """The letter that stands for a byte in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [other for other in range(256) if other not in plain]
    return chr(byte) if byte in plain else chr(256 + others.index(byte))
