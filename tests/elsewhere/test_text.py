"""A text decoder's bundle in ONNX Runtime GenAI and in transformers.js: the tokens of our runtime."""

import json

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from genbundle.builder import build_bundle
from genbundle.runtime import load_bundle
from tests.zoo import models, tokenizers

ROWS = [[5, 6, 7, 8, 9, 10], [31, 17, 140], [99, 100, 101, 102, 103]]
NEW = 12
CHAT = [{"role": "user", "content": "Hello <eos> you"}]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected(loaded):
    """Our runtime's continuation of each row alone."""
    model = loaded("chat+")
    return [model.generate(input_ids=np.array([row]), max_new_tokens=NEW).sequences[0].tolist() for row in ROWS]


def chat_prompt(model):
    text = model.text.apply_chat_template(CHAT)
    return [text, list(model.text.encode(text, add_special_tokens=False))]


def test_genai(bundle, loaded, genai, expected):
    longest = max(map(len, ROWS))
    calls = [{"rows": [row], "new": NEW} for row in ROWS]
    calls += [
        {"rows": ROWS, "new": NEW},
        {"rows": [ROWS[0][:2]], "then": ROWS[0][2:], "new": len(ROWS[0]) - 2 + NEW},
        {"rows": [ROWS[0]], "rewind": 8, "new": NEW},
        {"chat": CHAT},
    ]
    *alone, batch, continued, rewound, chat = genai(bundle("chat+").path, calls)
    assert [rows[0] for rows in alone] == expected
    # It pads on the right and goes on behind the padding.
    for row, whole, found in zip(ROWS, expected, batch, strict=True):
        assert found[: len(row)] == row
        new = whole[len(row) :]
        end = new.index(2) + 1 if 2 in new else NEW
        assert found[longest : longest + end] == new[:end]
    assert continued == rewound == [expected[0]]
    assert chat == chat_prompt(loaded("chat+"))


def test_transformers_js_in_node(bundle, loaded, node, expected):
    longest = max(map(len, ROWS))
    padded = [[0] * (longest - len(row)) + row for row in ROWS]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ROWS]
    calls = [{"rows": [row], "new": NEW} for row in ROWS]
    *alone, batch, chat = node(
        "generate.mjs", bundle("chat+").path, [*calls, {"rows": padded, "mask": mask, "new": NEW}, {"chat": CHAT}]
    )
    assert [rows[0] for rows in alone] == expected
    ours = (
        loaded("chat+")
        .generate(input_ids=np.array(padded), attention_mask=np.array(mask), max_new_tokens=NEW)
        .sequences
    )
    assert batch == ours.tolist()
    assert chat == chat_prompt(loaded("chat+"))


def test_special_tokens_that_genai_does_not_add(genai, tmp_path):
    tokenizer = tokenizers.chat_tokenizer(models.VOCABULARY)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    bundle = build_bundle(
        models.make("llama"), processor=tokenizer, also="ort-genai", verify=False, output=tmp_path / "b", progress=False
    )
    (runner,) = bundle.manifest.runners
    assert runner.prefix == "<bos>"
    ours = load_bundle(bundle).text.encode("Hello you")
    assert ours[0] == 1
    assert genai(bundle.path, [{"text": f"{runner.prefix}Hello you"}, {"text": "Hello you"}]) == [ours, ours[1:]]


def test_weights_are_stored_once(bundle):
    plain, both = bundle("chat"), bundle("chat+")
    added = {name for name in both.manifest.files if name not in plain.manifest.files and not name.startswith("onnx/")}
    assert added == {"genai_config.json", "generation_config.json"}
    assert both.manifest.weights == "onnx/model.onnx_data"
    # The same weights, of which the plain bundle's gate and up projections are two tensors and not one.
    stored, alone = both.manifest.files["onnx/model.onnx_data"], plain.manifest.files["weights.safetensors"]
    assert abs(stored.size - alone.size) <= 4096
    assert [(runner.name, runner.obstacle) for runner in both.manifest.runners] == [
        ("ONNX Runtime GenAI", None),
        ("transformers.js", None),
    ]
    assert both.manifest.settings["also"] == ["ort-genai", "transformers.js"]
    # The model's own config stands apart: `multi_query` (Falcon) alone would have other names looked for.
    config = json.loads((both.path / "config.json").read_text())
    assert {"model_type", "num_hidden_layers", "genbundle"} < set(config)
    assert "hidden_size" not in config and config["genbundle"]["hidden_size"] == 64
    config = json.loads((both.path / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == both.manifest.program("decode").file
