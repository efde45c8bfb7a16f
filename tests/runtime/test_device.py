"""`genbundle device`: what it refuses, and what of a bundle becomes code. The folder itself: tests/parity."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tests.bundles.samples import CONTENT, manifest, program
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from genbundle.bundles import InputError
from genbundle.bundles.golden import GOLDEN_NAME, GoldenCase, write_golden
from genbundle.bundles.manifest import Flow, Generation, Images, Input, Model, Route, Runner, Source
from genbundle.bundles.writer import new_bundle
from genbundle.runtime.cli import invoke
from genbundle.runtime.device import write_device_folder

READY = (Runner(name="TextLLMRunner"),)
PICTURE = Input(
    name="pixel_values",
    dtype="float32",
    shape=("pictures", 3, 8, 8),
    source=Source(kind="user", name="pixel_values", options={"pieces": "each"}),
)
STEPS = (
    {"op": "convert_rgb"},
    {"op": "resize", "height": 8, "width": 8, "resample": "bicubic"},
    {"op": "rescale", "factor": 0.5},
    {"op": "normalize", "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]},
)


@pytest.fixture
def bundle(tmp_path):
    """`bundle(**changes)`: an xnnpack bundle without a model, with another manifest."""

    def make(golden=(), **changes):
        facts = {"backend": "xnnpack", "runners": READY, "images": None, "packages": {"executorch": "1.4.1"}}
        with new_bundle(tmp_path / "some.bundle", overwrite=True) as writer:
            for name, content in CONTENT.items():
                (writer.path / name).write_bytes(content)
            tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<end>": 2, "Ġ": 3}, merges=[]))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            tokenizer.add_special_tokens(["<end>"])
            tokenizer.save(str(writer.path / "tokenizer.json"))
            if golden:
                write_golden(writer.path / GOLDEN_NAME, list(golden))
            return writer.commit(manifest(**{**facts, **changes}))

    return make


def with_picture(**options):
    """A manifest's programs and images of a model that takes one picture."""
    images = Images(
        input="pixel_values", token_id=2, placeholder="<end>", expansion="<end><end>", tokens_per_image=2, **options
    )
    return {"programs": (program(inputs=(PICTURE,), modality="image"),), "images": images}


def taking(*shape):
    """A manifest's programs of a model that takes arrays of that shape."""
    return {"programs": (program(inputs=(replace(PICTURE, shape=shape),), modality="image"),)}


def test_a_folder_has_everything(bundle, tmp_path):
    facts = write_device_folder(bundle(), "android", tmp_path / "out")
    assert facts == json.loads((tmp_path / "out" / "device.json").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.pte", "tokenizer.json", "GenbundleModel.kt", "README.md", "golden.json", "device.json",
    }  # fmt: skip
    assert (tmp_path / "out" / "model.pte").read_bytes() == CONTENT["decode.onnx"]
    code = (tmp_path / "out" / "GenbundleModel.kt").read_text()
    assert "LlmModule.MODEL_TYPE_TEXT," in code and "prefill" not in code
    assert 'listOf("${question}")' in code and 'setOf<String>("<end>")' in code and "CAPACITY = 64" in code
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_pictures_are_prepared_where_all_steps_are_known(bundle, tmp_path):
    write_device_folder(bundle(**with_picture(steps=STEPS)), "ios", tmp_path / "ios")
    code = (tmp_path / "ios" / "GenbundleModel.swift").read_text()
    assert "Image(float: values, width: 8, height: 8, channels: 3)" in code
    assert "CGSize(width: 8, height: 8)" in code and "* 0.5 - mean[channel]" in code
    assert '[.media(pixels), .text("\\(question)")]' in code
    unknown = {"op": "pad_square", "background": [0, 0, 0]}, *STEPS
    strange = ({"op": "resize", "height": "1); evil()", "width": 8},)
    nested = ({"op": ["resize"], "height": 8, "width": 8},)
    lonely = ({"op": "normalize", "mean": 0.5, "std": [1.0, 1.0, 1.0]},)
    endless = ({"op": "rescale", "factor": float("inf")},)
    for number, steps in enumerate((unknown, strange, nested, lonely, endless)):
        write_device_folder(bundle(**with_picture(steps=steps)), "ios", tmp_path / f"other{number}")
        code = (tmp_path / f"other{number}" / "GenbundleModel.swift").read_text()
        assert "func pixels(of" not in code and "evil" not in code and "pixels: Data" in code


@pytest.mark.parametrize("platform", ["android", "ios"])
def test_records_that_ended_must_end_on_the_phone(platform, bundle, tmp_path):
    write_device_folder(bundle(), platform, tmp_path / "out")
    code = next((tmp_path / "out").glob("GenbundleModel.*")).read_text()
    asked, compared = {
        "android": ("+ (if (ended) 1 else 0))", "if (ended) said.trim() == expected.trim() else"),
        "ios": ("+ (ended ? 1 : 0)", "if ended ? said == expected : said.hasPrefix(expected) {"),
    }[platform]
    assert asked in code and compared in code


def test_a_template_that_says_nothing(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("genbundle.runtime.phone_code.question_parts", lambda *_: ())
    write_device_folder(bundle(), "android", tmp_path / "out")
    assert "fun ask(" not in (tmp_path / "out" / "GenbundleModel.kt").read_text()


def test_half_characters_are_replaced(bundle, tmp_path):
    described = bundle().path / "manifest.json"
    described.write_text(described.read_text().replace('"1.4.1"', '"1\\ud800"'))
    write_device_folder(described.parent, "ios", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "device.json").read_text())["executorch"] == "1?"


def test_nothing_of_a_bundle_becomes_code(bundle, tmp_path):
    name = 'x\nimport evil\n*/ evil() /* "quoted" ${evil()} \\(evil())'
    made = bundle(
        model=replace(Model(architecture="A", name="n", parameters=1, weight_bytes=1), name=name, architecture=name),
        packages={"executorch": name},
        precision=name,
        runners=(Runner(name=name, prefix='<s>"\\ $x ${evil()} \\(evil())\u202e\n', differs=(name,)),),
        generation=Generation(eos_token_ids=(2,), options={"max_new_tokens": "1, evil()"}),
    )
    for platform, escaped in (
        ("android", '"<s>\\"\\\\ \\$x \\${evil()} \\\\(evil())\\u202e\\u000a${question}"'),
        ("ios", '"<s>\\"\\\\ $x ${evil()} \\\\(evil())\\u{202e}\\u{a}\\(question)"'),
    ):
        folder = tmp_path / platform
        write_device_folder(made, platform, folder)
        code = next(folder.glob("GenbundleModel.*")).read_text()
        assert escaped in code
        lines = [line for line in code.replace(escaped, "").splitlines() if "evil" in line]
        assert lines and all(line.startswith("//") for line in lines)
        lines = [line for line in (folder / "README.md").read_text().splitlines() if "evil" in line]
        assert len(lines) >= 5 and not any(line.startswith("import") or set(line) & set("$*\\") for line in lines)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"backend": "cpu"}, "is a 'cpu' bundle: phones take a .pte, build one with --backend xnnpack"),
        ({"runners": (Runner(name="MultimodalRunner", obstacle="because"),)}, r"runs it \(MultimodalRunner: because\)"),
        ({"runners": ()}, r"no runner of ExecuTorch runs it \(its manifest names none\)"),
        ({"text": None}, "runners read text, and it holds no tokenizer"),
        ({"flow": Flow(prompt=(Route(programs=("decode",)),), step=("decode",))}, r"tokens it holds \(flow.capacity\)"),
        (taking(1, 3), r"'pixel_values' is of shape \[1, 3\]"),
        (taking(1, 2, 3, 8, 8), r"'pixel_values' is of shape \[1, 2, 3, 8, 8\]"),
        (taking(1, 3, "height", 8), r"'pixel_values' is of shape \[1, 3, 'height', 8\]"),
    ],
)
def test_bundles_that_no_phone_runs(changes, cause, bundle, tmp_path):
    with pytest.raises(InputError, match=cause):
        write_device_folder(bundle(**changes), "android", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--platform", "ios"), "nowhere: no such bundle directory"),
        (("{bundle}", "--platform", "symbian"), "unknown platform 'symbian': choose one of android, ios"),
        (("{bundle}", "--platform", "ios", "--output", "{bundle}"), "exists: give another output, or remove it first"),
        (("{bundle}",), "Missing option '--platform'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, bundle, capfd):
    path = bundle().path
    assert invoke(["device", *(part.format(bundle=path) for part in arguments)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert message in err
    assert (path / "manifest.json").exists()


def test_a_damaged_record_leaves_nothing(bundle, tmp_path, capfd):
    with new_bundle(tmp_path / "bad.bundle") as writer:
        for file in bundle().path.iterdir():
            if file.name != "manifest.json":
                (writer.path / file.name).write_bytes(file.read_bytes())
        (writer.path / GOLDEN_NAME).write_bytes(b"nothing")
        made = writer.commit(manifest(backend="xnnpack", runners=READY, images=None))
    assert invoke(["device", str(made.path), "--platform", "ios", "--output", str(tmp_path / "out")]) == 2
    assert "not a golden file" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.bundle", "some.bundle"]


def test_the_report_for_scripts(bundle, tmp_path, capfd):
    assert invoke(["device", str(bundle().path), "--platform", "ios", "--output", str(tmp_path / "o"), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["runner"] == "TextLLMRunner" and facts["path"] == str(tmp_path / "o")


def case(name, ids, new, **inputs):
    """A recorded generation of `new` after `ids`, whose logits say nothing."""
    rows = np.array(ids).reshape(1, -1) if np.ndim(ids) == 1 else np.array(ids)
    tokens = np.tile(np.array(new), (len(rows), 1))
    return GoldenCase(
        name=name,
        inputs={"input_ids": rows, "attention_mask": np.ones_like(rows), **inputs},
        sequences=np.concatenate([rows, tokens], axis=1),
        top_ids=tokens[..., None],
        top_logits=np.zeros((*tokens.shape, 1), np.float32),
        options={"max_new_tokens": len(new), "do_sample": False},
    )


def test_records_that_the_runners_texts_can_say(bundle, tmp_path):
    """Prompts whose tokens their text gives again, one sequence each; answers up to the end token."""
    pixels = np.arange(192, dtype=np.float32).reshape(1, 3, 8, 8)
    cases = [
        case("text", [0, 1, 0], [1, 1, 2]),
        case("a token without text", [0, 49], [1, 1]),
        case("a batch", [[0, 1], [1, 1]], [1, 0]),
        case("nothing but the end", [0], [2]),
        case("nothing to be seen", [0], [3, 3]),
        case("no number", [0], [1], input_ids=np.array([[np.nan]])),
        case("picture without axes", [2, 2, 1], [0], pixel_values=np.float32(1)),
        case("picture of another size", [2, 2, 1], [0], pixel_values=pixels[:, :, 1:]),
        replace(case("names twice", [0, 1], [1]), options={"max_new_tokens": 1, "do_sample": False, "input_ids": 1}),
        case("padding", [0, 1], [0], attention_mask=np.array([[0, 1]])),
        case("more inputs", [0, 1], [0], token_type_ids=np.array([[0, 0]])),
        case("picture", [2, 2, 0, 2, 2, 1], [0], pixel_values=np.concatenate([pixels, pixels + 1])),
        case("picture at the end", [0, 2, 2], [0], pixel_values=pixels),
        case("picture without an answer", [2, 2, 0], [2], pixel_values=pixels),
    ]
    made = bundle(**with_picture(steps=STEPS), golden=cases)
    write_device_folder(made, "android", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "golden.json").read_text())["cases"]
    assert [(item["name"], item["expected_token_ids"], item["expected_text"], item["ended"]) for item in found] == [
        ("text", [1, 1], "bb", True),
        ("picture", [0], "a", False),
    ]
    assert found[0]["parts"] == [{"text": "aba"}]
    files = [{"file": f"golden-{number}.f32", "shape": [3, 8, 8]} for number in range(2)]
    assert found[1]["parts"] == [files[0], {"text": "a"}, files[1], {"text": "b"}]
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out" / "golden-1.f32", "<f4"), pixels.ravel() + 1)
    assert len(list((tmp_path / "out").glob("*.f32"))) == 2


def test_a_lossy_bundles_own_answers_are_expected(bundle, tmp_path, monkeypatch):
    class Model:
        def generate(self, **_):
            return SimpleNamespace(sequences=np.array([[0, 1, 0, 0, 2]]))

    monkeypatch.setattr("genbundle.runtime.load.load_bundle", lambda _: Model())
    made = bundle(programs=(program(precision="int8"),), golden=[case("text", [0, 1], [1, 1, 1])])
    facts = write_device_folder(made, "ios", tmp_path / "out")
    (found,) = json.loads((tmp_path / "out" / "golden.json").read_text())["cases"]
    assert (found["expected_token_ids"], found["expected_text"]) == ([0, 0], "aa")
    assert facts["golden_from"] == "this bundle"
