"""The wheel with its `onnx` extra alone, in a fresh environment: generates text and from a picture, without torch."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from genbundle.builder.demo.scenes import draw, held_out_scenes
from genbundle.runtime import load_bundle

ROOT = Path(__file__).parent.parent

SCRIPT = """
import importlib.util, json, sys
from genbundle.runtime import load_bundle

text, picture, image = sys.argv[1:]
content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe the picture."}]
question = [{"role": "user", "content": content}]
print(json.dumps({
    "text": load_bundle(text).generate("hello there", max_new_tokens=8).sequences.tolist(),
    "picture": load_bundle(picture).generate(question).text,
    "loaded": [name for name in ("torch", "transformers") if name in sys.modules],
    "installed": [name for name in ("torch", "transformers") if importlib.util.find_spec(name)],
}))
"""


@pytest.mark.slow
def test_wheel_with_the_onnx_extra_generates_without_torch(bundle, tmp_path):
    wheels, environment = tmp_path / "wheels", tmp_path / "environment"
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", wheels, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = wheels.glob("genbundle-*.whl")
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{wheel}[onnx]"], check=True)

    text, picture, image = bundle("chat").path, bundle("demo").path, tmp_path / "scene.png"
    draw(held_out_scenes(1)[0]).save(image)
    command = [python, "-c", SCRIPT, text, picture, image]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    result = json.loads(done.stdout)

    assert result["installed"] == [] and result["loaded"] == []
    expected = load_bundle(text).generate("hello there", max_new_tokens=8)
    assert result["text"] == expected.sequences.tolist()
    question = [{"type": "image", "image": image}, {"type": "text", "text": "Describe the picture."}]
    assert result["picture"] == load_bundle(picture).generate([{"role": "user", "content": question}]).text
