"""The embedded image-text model's bundle in transformers.js, in Node and in a page: the answers of our runtime."""

from random import Random

import pytest

from genbundle.builder.demo.scenes import draw, held_out_scenes, questions_by_kind
from genbundle.bundles.golden import GOLDEN_NAME, read_golden

PAGE_SECONDS = 10  # from opening the page to its first answer, on 2 cores

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Questions about pictures of the size that the model takes: how a filter shrinks one differs between libraries."""
    folder, rng, found = tmp_path_factory.mktemp("pictures"), Random(5), []
    for index, scene in enumerate(held_out_scenes(4)):
        picture = folder / f"{index}.png"
        draw(scene, 60, rng).save(picture)
        question = next(pairs[0][0] for pairs in questions_by_kind(scene).values() if pairs)
        content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": question}]
        found.append({"picture": str(picture), "chat": [{"role": "user", "content": content}]})
    return found


@pytest.fixture(scope="module")
def expected(loaded, calls):
    return [loaded("demo+").generate(call["chat"]).sequences.tolist() for call in calls]


def test_node(bundle, node, calls, expected):
    assert node("generate.mjs", bundle("demo+").path, calls) == expected


def test_recorded_generations_in_node(bundle, node):
    """What eager gave for arrays: other pictures, several of them, none."""
    cases = [case for case in read_golden(bundle("demo+").file(GOLDEN_NAME)) if case.inputs["attention_mask"].all()]
    calls = [{"rows": case.inputs["input_ids"].tolist(), "new": case.options["max_new_tokens"]} for case in cases]
    for case, call in zip(cases, calls, strict=True):
        if "pixel_values" in case.inputs:
            pixels = case.inputs["pixel_values"]
            call["pixels"] = {"shape": pixels.shape, "data": pixels.reshape(-1).tolist()}
    assert {case.name for case in cases} >= {"as given", "two pictures", "text alone"}
    assert node("generate.mjs", bundle("demo+").path, calls) == [case.sequences.tolist() for case in cases]


@pytest.mark.long
@pytest.mark.parametrize("name", ["demo+", "demo+int4"])
def test_page(name, bundle, loaded, node, chromium, calls):
    expected = [loaded(name).generate(call["chat"]).sequences.tolist() for call in calls]
    answers = node("browse.mjs", bundle(name).path, {"executable": chromium, "calls": calls})
    assert [answer["sequences"] for answer in answers] == expected
    assert answers[0]["at"] < 1000 * PAGE_SECONDS


def test_weights_are_stored_once(bundle):
    plain, both = bundle("demo"), bundle("demo+")
    sizes = {name: file.size for name, file in both.manifest.files.items() if name.endswith("_data")}
    assert len(sizes) == 3
    assert sum(sizes.values()) < 1.01 * plain.manifest.files["weights.safetensors"].size
    assert both.manifest.weights is None
    (runner,) = both.manifest.runners
    assert "forgets a batch's padding" in " ".join(runner.differs)
    assert "weights.safetensors" not in both.manifest.files
