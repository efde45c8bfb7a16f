"""genbundle build and demo: what they print, and what is left of a failure."""

import io
import json
import re
import subprocess
import sys
import tempfile

import pytest
from PIL import Image
from tests.zoo import models

from genbundle.builder import cli as cli_module
from genbundle.builder.demo.scenes import held_out_scenes, questions
from genbundle.builder.demo.show import half_blocks, pick_questions
from genbundle.builder.noise import quiet
from genbundle.bundles import BuildError, UnsupportedModelError, open_bundle
from genbundle.runtime.cli import invoke


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Where build logs go."""
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.slow
def test_build_a_directory(tmp_path, capfd, logs):
    models.make("llama").save_pretrained(tmp_path / "tiny")
    capfd.readouterr()
    target = tmp_path / "out.bundle"
    command = ["build", str(tmp_path / "tiny"), "--output", str(target), "--max-length", "64"]
    assert invoke([*command, "--json"]) == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert err == ""
    assert report["path"] == str(target) and report["backend"] == "cpu"
    assert report["verification"]["checks"][0]["tokens_equal"] is True
    assert open_bundle(target).manifest.flow.capacity == 64
    assert list(logs.iterdir()) == []
    # A second time it is in the way, and stays.
    assert invoke(command) == 2
    assert "exists and is kept untouched" in capfd.readouterr().err
    assert open_bundle(target).manifest.flow.capacity == 64


@pytest.mark.slow
def test_summary(bundle):
    path, verified = cli_module.lines(bundle("llama"))[:2]
    assert re.search(r"llama-cpu\.bundle  \d+\.\d kB, cpu fp32, programs: decode$", path)
    assert verified.startswith(
        "verified on cpu against the original model: same tokens for one token, short prompt, longer prompt, "
    )


def test_an_unexpected_failure_names_its_log(logs):
    with pytest.raises(BuildError) as raised, cli_module.kept_log():
        with quiet():
            print("upstream's last words")
        raise ZeroDivisionError("odd")
    (log,) = logs.iterdir()
    assert str(raised.value) == f"the build failed unexpectedly: ZeroDivisionError: odd (details: {log})"
    text = log.read_text()
    assert "upstream's last words" in text and "Traceback" in text and "ZeroDivisionError: odd" in text


def test_an_exporters_failure_names_its_log(logs):
    with pytest.raises(UnsupportedModelError) as raised, cli_module.kept_log():
        with quiet():
            print("upstream's last words")
        raise UnsupportedModelError("the merge can't be exported") from RuntimeError("deep inside")
    (log,) = logs.iterdir()
    assert str(raised.value) == f"the merge can't be exported (the exporters' own output: {log})"
    assert log.read_text() == "upstream's last words\n"


@pytest.mark.parametrize(
    "error", [BuildError("bad settings"), OSError(28, "No space left on device"), KeyboardInterrupt()]
)
def test_other_failures_leave_no_log(error, logs):
    with pytest.raises(type(error)) as raised, cli_module.kept_log():
        with quiet():
            print("noise")
        raise error
    assert raised.value is error
    assert list(logs.iterdir()) == []


@pytest.mark.slow
def test_demo_on_a_bundle_that_is_there(bundle, tmp_path, capfd):
    built = bundle("demo")
    picture = tmp_path / "picture.png"
    assert invoke(["demo", "--output", str(built.path), "--seed", "3", "--image-out", str(picture)]) == 0
    out, _ = capfd.readouterr()
    assert "built earlier and verified again just now" in out
    assert Image.open(picture).size == (240, 240)
    assert out.count("[right]") >= 2 and "3 answers are what was drawn." in out
    assert "Describe the picture." in out and "tokens/s on cpu" in out
    assert "verified on cpu against the original model" in out


@pytest.mark.slow
def test_demo_answers_other_questions(bundle, tmp_path, capfd):
    command = ["demo", "--output", str(bundle("demo").path), "--seed", "4", "--image-out", str(tmp_path / "p.png")]
    assert invoke([*command, "--question", "How many shapes are there?", "--question", "is it art"]) == 0
    out, _ = capfd.readouterr()
    assert "1 of 1 answers are what was drawn." in out


def test_questions_have_answers():
    from random import Random

    for seed, scene in enumerate(held_out_scenes(40)):
        asked = pick_questions(scene, Random(seed))
        assert len(asked) == 3 and set(asked) <= {question for question, _ in questions(scene)}


def test_a_picture_in_the_terminal():
    picture = Image.new("RGB", (8, 8), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 4, 8, 8))
    rows = half_blocks(picture, columns=4).splitlines()
    assert len(rows) == 2
    assert rows[0].count("▀") == 4 and "38;2;255;0;0;48;2;255;0;0m" in rows[0]
    assert "38;2;0;0;255;48;2;0;0;255m" in rows[1]
    assert all(row.endswith("\x1b[0m") for row in rows)


def test_the_models_files_are_packaged():
    """The wheel holds the demo model and the entry points; nothing of the tests."""
    from tests.test_tiny import ROOT

    folder = tempfile.mkdtemp()
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-w", folder, "-q"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"no wheel can be built here: {result.stderr.strip().splitlines()[-1]}")
    import zipfile
    from pathlib import Path

    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(io.BytesIO(wheel.read_bytes())) as archive:
        names = archive.namelist()
        points = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {"genbundle/builder/demo/model/model.safetensors", "genbundle/runtime/cli.py"} <= set(names)
    assert "genbundle/__init__.py" not in names
    assert not [name for name in names if name.startswith("tests")]
    assert "genbundle = genbundle.runtime.cli:main" in points and "[genbundle.commands]" in points
