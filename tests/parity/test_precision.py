"""Bundles of lossy precisions on their real engines: they shrink, generate, and say how far they are from eager."""

import numpy as np
import pytest

from genbundle.builder import build_bundle
from genbundle.bundles import BuildError, EngineError, InputError, VerificationError
from genbundle.runtime import load_bundle
from genbundle.runtime.cli import invoke
from genbundle.runtime.inspection import as_text
from tests.zoo import models

pytestmark = pytest.mark.slow


def built(name, backend, output, **options):
    options = {"quality_floor": 0.0, "progress": False, **options}
    return build_bundle(models.make(name), models.samples(name), backend, output=output, **options)


def lengths(bundle):
    """Programs and weights, without the records."""
    return sum(file.size for name, file in bundle.manifest.files.items() if name != "golden.msgpack")


@pytest.mark.parametrize(("precision", "divergence", "share"), [("int8", 1e-3, 0.55), ("int4", 0.1, 0.45)])
def test_a_tied_text_model_on_cpu(precision, divergence, share, bundle, tmp_path, capsys):
    whole, small = bundle("llama_tied"), built("llama_tied", "cpu", tmp_path / "b", precision=precision)
    assert lengths(small) < share * lengths(whole)
    # No copy of the table for the head, at 8 or 4 bits with what each block has besides.
    bits = {"int8": 8 + 0.7, "int4": 4 + 0.7}[precision]
    assert small.manifest.model.weight_bytes < whole.manifest.model.parameters * bits / 8
    assert (small.manifest.precision, small.manifest.program("decode").precision) == (precision, precision)
    report = small.manifest.verification
    assert report is not None and report.quality is not None
    assert 0 < report.quality.kl_divergence < divergence and report.quality.agreement > 0.6
    assert all(check.quality is not None for check in report.checks)
    assert "mean KL divergence" in as_text(small)
    assert invoke(["verify", str(small.path)]) == 0
    assert "mean KL divergence" in capsys.readouterr().out
    model, ids = load_bundle(small.path), models.text_ids(7).numpy()
    assert model.generate(input_ids=ids, max_new_tokens=5).sequences.shape == (1, 12)
    with pytest.raises(InputError, match="token ids up to 200, this bundle knows those below 200"):
        model.generate(input_ids=np.array([[5, 200]]), max_new_tokens=2)


def test_parts_of_an_image_text_model_on_cpu(tmp_path):
    asked = {"language_model": "int4", "image_encoder": "int8"}
    made = built("llava", "cpu", tmp_path / "b", precision=asked)
    found = {program.name: program.precision for program in made.manifest.programs}
    assert found == {"image_encoder": "int8", "merge": "int4", "prompt": "int4", "decode": "int4"}
    assert made.manifest.settings["precision"] == asked
    assert "int4, image_encoder int8" in as_text(made)


def test_below_the_floor(tmp_path):
    with pytest.raises(VerificationError, match=r"too far .* mean KL divergence .* the same first token in .*100\.0%"):
        built("llama_tied", "cpu", tmp_path / "b", precision="int4", quality_floor=1.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "divergence", "share"),
    [pytest.param("int8", 1e-3, 0.5, marks=pytest.mark.long), ("int4", 0.1, 0.35)],
)
def test_a_tied_text_model_on_xnnpack(precision, divergence, share, bundle, tmp_path):
    whole = bundle("llama_tied", "xnnpack")
    small = built("llama_tied", "xnnpack", tmp_path / "b", precision=precision)
    assert small.manifest.files["model.pte"].size < share * whole.manifest.files["model.pte"].size
    assert small.manifest.model.weight_bytes < whole.manifest.model.weight_bytes * share
    report = small.manifest.verification
    assert report is not None and report.quality is not None
    assert 0 < report.quality.kl_divergence < divergence and report.quality.agreement > 0.6
    model = load_bundle(small.path)
    assert model.generate(input_ids=models.text_ids(7).numpy(), max_new_tokens=5).sequences.shape == (1, 12)
    with pytest.raises(InputError, match="this bundle knows those below 200"):
        model.generate(input_ids=np.array([[5, 200]]), max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "precision", "bits", "divergence", "least"),
    [
        ("llama_tied", "int8", 8, 0.05, 0.8),
        ("gemma3_text", "int4", 4, 0.2, 0.6),
        pytest.param("llama_tied", "int4", 4, 0.2, 0.6, marks=pytest.mark.long),
        pytest.param("gemma3_text", "int8", 8, 0.05, 0.8, marks=pytest.mark.long),
    ],
)
def test_text_models_on_torch(name, precision, bits, divergence, least, bundle, tmp_path):
    """Gemma's embedding is a kind of its own, which scales what it looks up."""
    whole, small = bundle(name, "torch"), built(name, "torch", tmp_path / "b", precision=precision)
    assert small.manifest.model.weight_bytes < whole.manifest.model.weight_bytes * (bits + 1.2) / 32
    assert (small.manifest.precision, small.manifest.program("decode").precision) == (precision, precision)
    report = small.manifest.verification
    assert report is not None and report.quality is not None
    assert 0 < report.quality.kl_divergence < divergence and report.quality.agreement > least


def test_what_a_backend_lacks(tmp_path):
    with pytest.raises(BuildError, match="precision 'int4' isn't available on 'cuda': it can fp32, fp16"):
        built("llama", "cuda", tmp_path / "b", precision="int4")


def test_an_image_text_model_on_xnnpack(tmp_path):
    """Its state stays inside, at 4 bits and with an encoder whose constants are computed at the build."""
    made = built("llava", "xnnpack", tmp_path / "b", precision={"language_model": "int4", "encoder": "int8"})
    found = {program.name: program.precision for program in made.manifest.programs}
    assert found.pop("image_encoder") == "int8" and set(found.values()) == {"int4"}
    assert not made.manifest.state
    report, facts = made.manifest.verification, made.manifest.model
    assert report is not None and report.quality is not None and report.quality.kl_divergence < 0.2
    # What isn't a product or a look-up of tokens stays: the convolution of patches and the table of their places.
    assert facts.weight_bytes < facts.parameters * 1.3


def test_an_image_text_model_on_torch(tmp_path):
    made = built("llava", "torch", tmp_path / "b", precision={"language_model": "int8", "image_encoder": "int8"})
    assert {program.precision for program in made.manifest.programs} == {"int8"}
    report, facts = made.manifest.verification, made.manifest.model
    assert report is not None and report.quality is not None
    assert 0 < report.quality.kl_divergence < 1e-3 and report.quality.agreement > 0.9
    assert facts.weight_bytes < 1.3 * facts.parameters


@pytest.mark.parametrize("backend", ["xnnpack", "torch"])
def test_a_part_that_a_text_model_lacks(backend, tmp_path):
    with pytest.raises(BuildError, match="this model has no 'encoder': its parts are language_model"):
        built("llama", backend, tmp_path / "b", precision={"encoder": "int8"})
    assert list(tmp_path.iterdir()) == []


def test_half_precision_for_cuda_on_the_cpu_provider(tmp_path):
    """A text model and a model of pictures in 16 bits: half the bytes, a cache in them too, and nothing of it lost."""
    both = {"language_model": "fp16", "encoder": "fp16"}
    for name, asked, dtype in (("llama_tied", "bf16", "bfloat16"), ("llava", both, "float16")):
        made = built(name, "cuda", tmp_path / name, precision=asked, quality_floor=None)
        report, facts = made.manifest.verification, made.manifest.model
        assert facts.weight_bytes < 2.1 * facts.parameters
        assert {state.dtype for state in made.manifest.state} == {dtype}
        assert made.manifest.programs[-1].precision == (asked if asked == "bf16" else "fp16")
        assert report is not None and report.quality is not None and report.quality.agreement > 0.95
        outputs = made.manifest.program("decode").outputs
        assert [item.dtype for item in outputs if item.name == "logits"] == ["float32"]
    bundle = load_bundle(tmp_path / "llama_tied", device="cpu")
    with pytest.raises(EngineError, match="the program 'decode' computes in bfloat16, which ONNX Runtime's CPU"):
        bundle.generate(input_ids=np.array([[5, 6]]), max_new_tokens=2)
    with pytest.raises(BuildError, match=r"'fp16' isn't available on 'cpu': it can fp32, int8, int4"):
        built("llama_tied", "cpu", tmp_path / "c", precision="fp16")
