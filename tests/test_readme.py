"""The README's examples, run as they are written, with tiny bundles under the names that they use."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^    (genbundle (?:run|inspect|verify|bench|device) .*?)(?:  +#.*)?$", README, re.MULTILINE)
# What an example can't have here: a GPU, and a model whose vocabulary holds a large model's tokens.
STAND_INS = {'device="cuda"': 'device="cpu"', "[[1, 15043, 29892]]": "[[1, 150, 29]]"}
BUNDLES = {
    "my-model-cpu": ("demo", "cpu"),
    "my-model-cuda": ("demo", "cpu"),
    "my-model-xnnpack": ("demo", "xnnpack"),
    "my-model-torch": ("llama", "torch"),
}
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(bundle, tmp_path, monkeypatch):
    """A working directory with everything that the examples name."""
    for name, which in BUNDLES.items():
        (tmp_path / f"{name}.bundle").symlink_to(bundle(*which).path)
    for name in ("photo.jpg", "a.png", "b.png"):
        PIL.Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_an_example_for_each_backend():
    assert {name for name in BUNDLES if any(f'"{name}.bundle"' in code for code in PYTHON)} == BUNDLES.keys()
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("code", [code for code in PYTHON if "load_bundle" in code])
def test_python(code, folder, capsys):
    for written, here in STAND_INS.items():
        code = code.replace(written, here)
    picture = PIL.Image.open("photo.jpg")
    exec(compile(code, "README.md", "exec"), {"pil_image": picture, "numpy_array": np.asarray(picture)})
    assert capsys.readouterr().out.strip()


def test_build(tmp_path, monkeypatch, capsys):
    from tests.zoo import models, tokenizers

    monkeypatch.chdir(tmp_path)
    names = {"model": models.make("llama"), "tokenizer": tokenizers.chat_tokenizer(models.VOCABULARY)}
    for code in (code for code in PYTHON if "build_bundle" in code):
        exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "tokens_equal=True" in printed and "Quality(kl_divergence=" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"my-model.bundle", "small.bundle"}


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, folder):
    program = Path(sys.executable).with_name("genbundle")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = shlex.split(command.replace("--prompt-tokens 900 --new-tokens 64", "--prompt-tokens 20 --new-tokens 8"))
    done = subprocess.run([program, *arguments[1:]], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
