"""`genbundle device`: what it refuses, and what of a bundle becomes code. The folder itself: tests/parity."""

import json
from dataclasses import replace

import pytest
from tests.bundles.samples import CONTENT, manifest, program
from tokenizers import Tokenizer, models, pre_tokenizers

from genbundle.bundles import InputError
from genbundle.bundles.golden import GOLDEN_NAME
from genbundle.bundles.manifest import Generation, Images, Input, Model, Runner, Source
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

    def make(**changes):
        facts = {"backend": "xnnpack", "runners": READY, "images": None, "packages": {"executorch": "1.4.1"}}
        with new_bundle(tmp_path / "some.bundle", overwrite=True) as writer:
            for name, content in CONTENT.items():
                (writer.path / name).write_bytes(content)
            tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<end>": 2}, merges=[]))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.add_special_tokens(["<end>"])
            tokenizer.save(str(writer.path / "tokenizer.json"))
            return writer.commit(manifest(**{**facts, **changes}))

    return make


def with_picture(**options):
    """A manifest's programs and images of a model that takes one picture."""
    images = Images(
        input="pixel_values", token_id=2, placeholder="<end>", expansion="<end><end>", tokens_per_image=2, **options
    )
    return {"programs": (program(inputs=(PICTURE,), modality="image"),), "images": images}


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
    for number, steps in enumerate((unknown, strange)):
        write_device_folder(bundle(**with_picture(steps=steps)), "ios", tmp_path / f"other{number}")
        code = (tmp_path / f"other{number}" / "GenbundleModel.swift").read_text()
        assert "func pixels(of" not in code and "evil" not in code and "pixels: Data" in code


def test_nothing_of_a_bundle_becomes_code(bundle, tmp_path):
    name = 'x\nimport evil\n*/ evil() /* "quoted" ${evil()} \\(evil())'
    made = bundle(
        model=replace(Model(architecture="A", name="n", parameters=1, weight_bytes=1), name=name, architecture=name),
        packages={"executorch": name},
        runners=(Runner(name="TextLLMRunner", prefix='<s>"\\ $x ${evil()} \\(evil())\u202e\n', differs=(name,)),),
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


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"backend": "cpu"}, "is a 'cpu' bundle: phones take a .pte, build one with --backend xnnpack"),
        ({"runners": (Runner(name="MultimodalRunner", obstacle="because"),)}, r"runs it \(MultimodalRunner: because\)"),
        ({"runners": ()}, r"no runner of ExecuTorch runs it \(its manifest names none\)"),
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
