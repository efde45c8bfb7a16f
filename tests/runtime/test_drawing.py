"""Drawings from manifests alone: every wire arrives, nothing overlaps, 100 columns hold, the SVG is well-formed."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from tests.bundles.samples import manifest, program

from genbundle.bundles.manifest import Flow, Input, Output, Program, Route, Source
from genbundle.runtime.drawing import as_svg, as_text, passes, summary


def taking(name, kind, /, **source):
    return Input(name=name, dtype="float32", shape=("batch", 8), source=Source(kind=kind, **source))


def giving(name, state=None):
    return Output(name=name, dtype="float32", shape=("batch", 8), state=state)


def pictures(levels=0):
    """An image-text manifest: encoder, merge, prompt; `levels` features skip the merge, as deepstack does."""
    deep = tuple(f"deepstack_{level}" for level in range(levels))
    encoder = Program(
        name="image_encoder", file="decode.onnx", roles=("encoder", "projector"), modality="image",
        inputs=(
            taking("pixel_values", "user", name="pixel_values"),
            taking("offsets", "prepared", name="offsets", rule="vision_grid", options={"inputs": ["image_grid_thw"]}),
        ),
        outputs=(giving("features"), *map(giving, deep)),
    )  # fmt: skip
    merge = Program(
        name="merge", file="decode.onnx", roles=("merge",),
        inputs=(taking("input_ids", "tokens"), taking("features", "output", name="features")),
        outputs=(giving("embeds"),),
    )  # fmt: skip
    prompt = Program(
        name="prompt", file="decode.onnx", roles=("language_model", "lm_head"),
        inputs=(
            taking("mask", "mask"), taking("position_ids", "position", rule="cumsum"),
            taking("both_ways", "constant", value=1),
            taking("inputs_embeds", "output", name="embeds"), *(taking(name, "output", name=name) for name in deep),
        ),
        outputs=(giving("logits"), giving("present", "0.key")),
    )  # fmt: skip
    flow = Flow(
        prompt=(
            Route(programs=("image_encoder", "merge", "prompt"), needs=("pixel_values",)),
            Route(programs=("decode",)),
        ),
        step=("decode",),
    )
    return manifest(programs=(encoder, merge, prompt, program()), flow=flow)


def test_one_program_for_prompt_and_step():
    assert as_text(manifest()) == (
        "prompt and every further token\n"
        "                        ┌────────────────────────────────────┐\n"
        "           token ids ─► │ decode                             │─► logits\n"
        "  positions (cumsum) ─► │ merge + language model + lm head   │─► state (1 tensor)\n"
        "    state (1 tensor) ─► │ + decode                           │\n"
        "                        └────────────────────────────────────┘"
    )


def test_a_picture_goes_through_merge_and_prompt():
    text = as_text(pictures())
    assert text == (
        "prompt with pixel_values\n"
        "                                  ┌──────────────────────────┐\n"
        "                  pixel_values ─► │ image_encoder            │─ features ─┐\n"
        "  image_grid_thw (vision_grid) ─► │ encoder + projector      │            │\n"
        "                                  └──────────────────────────┘            │\n"
        "                                  ┌──────────────────────────┐            │\n"
        "                     token ids ─► │ merge                    │◄───────────┘\n"
        "                                  │ merge                    │─ embeds ───┐\n"
        "                                  └──────────────────────────┘            │\n"
        "                                  ┌──────────────────────────┐            │\n"
        "                  padding mask ─► │ prompt                   │◄───────────┘\n"
        "            positions (cumsum) ─► │ language model + lm head │─► logits\n"
        "                 both_ways = 1 ─► │                          │─► state (1 tensor)\n"
        "                                  └──────────────────────────┘\n"
        "\n"
        "prompt of text alone and every further token\n"
        "                        ┌────────────────────────────────────┐\n"
        "           token ids ─► │ decode                             │─► logits\n"
        "  positions (cumsum) ─► │ merge + language model + lm head   │─► state (1 tensor)\n"
        "    state (1 tensor) ─► │ + decode                           │\n"
        "                        └────────────────────────────────────┘"
    )


def test_features_that_skip_a_program_get_their_own_lane():
    lines = as_text(pictures(levels=3)).split("\n\n")[0].splitlines()
    assert any("deepstack_* x 3" in line and line.endswith("┐") for line in lines)
    merge, prompt = (
        next(index for index, line in enumerate(lines) if f"│ {name} " in line) for name in ("merge", "prompt")
    )
    # Beside the merge's own wire the other one passes by; both end at the prompt.
    assert lines[merge].rstrip().endswith("┘ │")
    assert sum("◄" in line for line in lines[prompt:]) == 2
    assert lines[-1].count("│") == 0


@pytest.mark.parametrize("levels", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("width", [80, 100])
def test_it_stays_within_its_width(levels, width):
    assert max(map(len, as_text(pictures(levels), width).splitlines())) <= width


def test_long_names_are_cut():
    source = manifest()
    long = replace(source.programs[0], name="d" * 80, outputs=(giving("logits"), giving("o" * 120)))
    long = replace(long, inputs=(*long.inputs, taking("u" * 90, "user", name="u" * 90)))
    flow = Flow(prompt=(Route(programs=("d" * 80,)),), step=("d" * 80,))
    text = as_text(replace(source, programs=(long,), flow=flow))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" in text


def test_programs_that_keep_their_state_inside():
    inside = replace(
        program(), inputs=(taking("tokens", "tokens"), taking("start_pos", "start")), outputs=(giving("logits"),)
    )
    text = as_text(manifest(programs=(inside,), state=()))
    assert "tokens so far ─►" in text
    assert "─► state (inside the program)" in text


def test_summary():
    assert summary(["a", "b"]) == "a, b"
    assert summary(["present.0.key", "present.1.key", "present.2.key", "logits"]) == "present.*.key x 3, logits"
    assert summary(["x_0", "x_1"]) == "x_0, x_1"
    assert summary([]) == ""


@pytest.mark.parametrize("levels", [0, 3])
def test_svg(levels):
    svg = as_svg(pictures(levels))
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {"image_encoder", "merge", "prompt", "decode", "features", "embeds", "pixel_values", "logits"} <= set(texts)
    assert len(list(root.iter(f"{space}rect"))) == 1 + 4
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for rect in list(root.iter(f"{space}rect"))[1:]:
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width
        assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= height
    wires = [element for element in root.iter(f"{space}path") if element.attrib.get("class") == "wire"]
    assert len(wires) == 2 * sum(len(item.wires) for item in passes(pictures(levels)))


def test_svg_escapes_names():
    hostile = replace(program(), outputs=(giving("logits"), giving("<script>alert(1)</script> & more")))
    svg = as_svg(manifest(programs=(hostile,)))
    assert "<script" not in svg
    ElementTree.fromstring(svg)
