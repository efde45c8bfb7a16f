"""The command line on tiny bundles: what it prints, exit codes, one-line errors."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tests.bundles.test_writer import write

import genbundle.runtime.cli as cli_module
from genbundle.bundles import MissingExtraError
from genbundle.runtime import load_bundle
from genbundle.runtime.cli import invoke

COMMANDS = ("build", "run", "inspect", "verify", "bench", "device", "demo")


@pytest.fixture
def genbundle(capfd):
    """Runs a command line in this process: exit code, standard output, standard error."""

    def run(*args):
        code = invoke([str(arg) for arg in args])
        return code, *capfd.readouterr()

    return run


def error_line(result):
    """The message of a failed command; it must be one line, nothing on standard output, exit code 2."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("genbundle: error: ") and err.count("\n") == 1, err
    return err.removeprefix("genbundle: error: ").strip()


def test_help(genbundle):
    code, out, _ = genbundle()
    assert code == 0
    assert out == genbundle("--help")[1]
    assert [name for name in COMMANDS if f"\n  {name} " in out] == list(COMMANDS)
    assert "genbundle build ./my-model" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples(command, genbundle):
    code, out, _ = genbundle(command, "--help")
    assert code == 0
    assert "Examples:" in out and f"  genbundle {command} " in out
    assert max(map(len, out.splitlines())) <= 100


def test_version(genbundle):
    code, out, _ = genbundle("--version")
    assert code == 0 and re.fullmatch(r"genbundle \d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["frob"], "No such command 'frob'; see `genbundle --help`"),
        (["run"], "Missing argument 'BUNDLE'; see `genbundle run --help`"),
        (
            ["bench", "b", "--threads", "0"],
            "Invalid value for '--threads': 0 is not in the range x>=1; see `genbundle bench --help`",
        ),
        (["run", "b", "p", "--frob"], "No such option '--frob'; see `genbundle run --help`"),
        (["inspect", "/no/such"], "/no/such: no such bundle directory"),
        (["build", "/no/such"], "model: no such directory '/no/such'"),
        (["build", "x", "--backend", "tpu"], "unknown backend 'tpu': choose one of cpu, cuda, xnnpack, torch"),
    ],
)
def test_usage_errors(args, message, genbundle):
    assert error_line(genbundle(*args)).replace("No such option: --frob", "No such option '--frob'") == message


def test_errors_do_not_steer_the_terminal(genbundle):
    assert error_line(genbundle("inspect", "/no/\x1b[31mred")) == r"/no/\x1b[31mred: no such bundle directory"


def test_without_the_builder(genbundle, monkeypatch):
    class Missing:
        name = "build"

        def load(self):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli_module, "_entry_points", lambda: [Missing()])
    expected = "`genbundle build` needs `torch`, which is not installed: pip install 'genbundle[builder]'"
    assert error_line(genbundle("build", "x")) == expected
    monkeypatch.setattr(cli_module, "_entry_points", lambda: [])
    assert "pip install 'genbundle[builder]'" in error_line(genbundle("demo"))
    assert genbundle("--help")[0] == 0


def test_a_broken_builder_is_not_a_missing_one():
    with pytest.raises(ModuleNotFoundError), cli_module.needs_builder("build"):
        raise ModuleNotFoundError("No module named 'genbundle.builder.gone'", name="genbundle.builder.gone")
    with pytest.raises(MissingExtraError), cli_module.needs_builder("build"):
        raise ModuleNotFoundError("No module named 'genbundle.builder'", name="genbundle.builder")


def test_inspect_needs_no_engine(tmp_path, genbundle):
    """A bundle whose programs are nonsense can be inspected."""
    path = write(tmp_path / "b.bundle").path
    code, out, err = genbundle("inspect", path, "--svg", tmp_path / "b.svg")
    assert code == 0
    assert err == f"drawing written to {tmp_path / 'b.svg'}\n"
    assert max(map(len, out.splitlines())) <= 100
    for piece in (
        "b.bundle: SomeForCausalLM for cpu",
        "up to 64 tokens, prompt and generated; any batch",
        "not at all: built with verify=False",
        "as ready arrays (pixel_values): not described",
        "decode  [merge + language_model + lm_head + decode]  decode.onnx, 7 bytes, fp32",
        "in  position_ids  int64 [batch, sequence]",
        "positions by the rule cumsum",
        "-> state",
        "note       first",
        "prompt and every further token",
    ):
        assert piece in out, piece
    ElementTree.parse(tmp_path / "b.svg")


def test_inspect_json(tmp_path, genbundle):
    path = write(tmp_path / "b").path
    code, out, _ = genbundle("inspect", path, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["bytes"] == 16
    assert report["manifest"] == json.loads((path / "manifest.json").read_text())


@pytest.mark.slow
def test_run_streams_the_text(bundle, genbundle):
    path = bundle("chat").path
    code, out, err = genbundle("run", path, "Hello", "--max-new-tokens", 8)
    model = load_bundle(path)
    expected = model.generate([{"role": "user", "content": "Hello"}], max_new_tokens=8)
    assert code == 0
    assert out == expected.text + "\n"
    assert re.fullmatch(
        r"\[[\d.]+ tokens/s; 8 new tokens, prompt of 7 in [\d.]+ s; the most tokens were reached\]\n", err
    )
    assert genbundle("run", path, "Hello", "--raw", "--max-new-tokens", 8)[1] == (
        model.generate("Hello", max_new_tokens=8).text + "\n"
    )


@pytest.mark.slow
def test_run_json_and_options(bundle, genbundle):
    path = bundle("chat").path
    options = ["--temperature", 2, "--top-k", 0, "--seed", 3, "--max-new-tokens", 12, "--json"]
    first = json.loads(genbundle("run", path, "Hello", *options)[1])
    again = json.loads(genbundle("run", path, "Hello", *options)[1])
    assert first["token_ids"] == again["token_ids"]
    expected = load_bundle(path).generate(
        [{"role": "user", "content": "Hello"}], temperature=2.0, top_k=0, seed=3, max_new_tokens=12
    )
    assert first["text"] == expected.text
    assert first["token_ids"] == expected.sequences[0, 7:].tolist()
    assert first["finish_reason"] == expected.finish_reasons[0]
    assert set(first["seconds"]) == {"load", "prompt", "steps"}
    stop = expected.text[3]
    assert json.loads(genbundle("run", path, "Hello", *options, "--stop", stop)[1])["finish_reason"] == "stop"


@pytest.mark.slow
def test_run_reads_standard_input(bundle):
    result = CliRunner().invoke(
        cli_module.cli, ["run", str(bundle("chat").path), "-", "--max-new-tokens", "3"], input="Hi"
    )
    assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("llama", ["Hi"], "holds no tokenizer: give `input_ids` instead of text"),
        ("chat", ["Hi", "--image", "x.png"], "takes no pictures"),
        ("chat", ["Hi", "--top-p", "3"], "the option `top_p` is 3.0: accepted is a number from 0 to 1, or None"),
        (
            "chat",
            ["Hi", "--max-new-tokens", "0"],
            "the option `max_new_tokens` is 0: accepted is a whole number of at least 1",
        ),
        ("chat", ["x" * 300], "the prompt has 302 tokens, this bundle holds 256 (prompt and generated): shorten it"),
        ("chat", ["Hi", "--device", "tpu"], "unknown device 'tpu': an ONNX bundle runs on 'cpu' or 'cuda'"),
    ],
)
def test_run_errors(name, args, message, bundle, genbundle):
    assert message in error_line(genbundle("run", bundle(name).path, *args))


@pytest.mark.slow
def test_run_with_a_picture(bundle, genbundle, tmp_path):
    from genbundle.builder.demo.scenes import draw, held_out_scenes

    path, (scene, other) = bundle("demo").path, held_out_scenes(2)
    draw(scene).save(tmp_path / "scene.png")
    draw(other).save(tmp_path / "other.png")
    code, out, _ = genbundle("run", path, "Describe the picture.", "--image", tmp_path / "scene.png")
    assert code == 0 and out.strip()
    raw = "<|user|><image>Describe the picture.<|end|><|assistant|>"
    assert genbundle("run", path, raw, "--raw", "--image", tmp_path / "scene.png")[1] == out
    assert "there are 2" not in out
    message = error_line(
        genbundle("run", path, raw, "--raw", "--image", tmp_path / "scene.png", "--image", tmp_path / "other.png")
    )
    assert "1 picture placeholders (<image>), 2 pictures were given" in message
    assert "no such picture file" in error_line(genbundle("run", path, "What?", "--image", tmp_path / "none.png"))


@pytest.mark.slow
def test_verify(bundle, genbundle):
    path = bundle("llama").path
    code, out, _ = genbundle("verify", path)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("OK  4 files have the manifest's sha256")
    assert [line[4:17].strip() for line in lines[1:-1]] == [
        "one token",
        "short prompt",
        "longer prompt",
        "padded batch",
        "long prompt",
    ]
    assert all("largest logit difference" in line for line in lines[1:-1])
    report = json.loads(genbundle("verify", path, "--json")[1])
    assert report["ok"] and len(report["cases"]) == 5


@pytest.mark.slow
def test_verify_finds_damage(bundle, genbundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle("llama").path, copy)
    weights = copy / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert error_line(genbundle("verify", copy)) == (
        f"{weights}: sha256 differs from the manifest's: the file was changed or damaged"
    )


@pytest.mark.slow
def test_bench(bundle, genbundle):
    code, out, _ = genbundle("bench", bundle("llama").path, "--prompt-tokens", 20, "--new-tokens", 5, "--threads", 1)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "device",
        "input",
        "load",
        "prompt",
        "step",
        "loop",
        "memory",
    ]
    report = json.loads(genbundle("bench", bundle("llava").path, "--prompt-tokens", 9, "--new-tokens", 4, "--json")[1])
    assert report["prompt_tokens"] == 9 and report["new_tokens"] == 4
    assert report["step_milliseconds"] > 0 and report["peak_bytes"] > 1e6
    assert np.isclose(report["tokens_per_second"] * report["step_milliseconds"], 1000)
    assert 0 <= report["loop_share"] < 1


def test_disk_full_is_one_line(tmp_path, genbundle, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.svg")

    path = write(tmp_path / "b").path
    monkeypatch.setattr(Path, "write_text", full)
    assert error_line(genbundle("inspect", path, "--svg", "x.svg")) == "No space left on device: x.svg"


def test_interrupt(tmp_path):
    """Ctrl-C while the prompt is read from standard input."""
    command = [sys.executable, "-m", "genbundle.runtime.cli", "run", str(tmp_path), "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Whoever runs the tests in the background ignores the signal, which is inherited.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, **pipes, text=True, preexec_fn=heard)
    assert process.stdin is not None
    killer = threading.Timer(60, process.kill)
    killer.start()
    with suppress(BrokenPipeError):  # it ended before, and says why below
        process.stdin.write("x" * 2**20)  # more than a pipe holds: once this is written, it is being read
        process.stdin.flush()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    killer.cancel()
    assert process.returncode == 130
    assert err.strip().endswith("genbundle: interrupted")
    assert "Traceback" not in err


def test_a_closed_pipe_is_quiet(tmp_path):
    path = write(tmp_path / "b").path
    command = f"{sys.executable} -m genbundle.runtime.cli inspect {path} | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stderr == ""
