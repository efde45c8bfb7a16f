"""Programs compiled by AOTInductor, on the CPU: eager's tokens at every size; the cache; what can't be compiled."""

import itertools
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._inductor import config

from genbundle.bundles import EngineError
from genbundle.runtime import load_bundle
from genbundle.runtime.backends import torch_compiled
from genbundle.runtime.cli import invoke
from tests.parity.test_parity import arrays, eager, padded
from tests.zoo import models, shrink

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cache(bundle_folder, monkeypatch):
    """The folder of compiled programs, one for the session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle_folder / "cache"))
    return bundle_folder / "cache" / "genbundle" / "compiled"


@pytest.fixture(scope="module", autouse=True)
def threads():
    """Two, whatever the tests' worker has: what is compiled for one has no loops in parallel."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def other_cache(tmp_path, monkeypatch):
    """An empty cache for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "genbundle" / "compiled"


@pytest.fixture
def llama(bundle):
    """The bundle of a decoder, compiled and in the session's cache."""
    made = bundle("llama", "torch")
    load_bundle(made, compiled=True).backend.program("decode")
    return made


def test_a_decoder_gives_eagers_tokens(llama, no_compiler):
    model, compiled = models.make("llama"), load_bundle(llama, compiled=True)
    ids = [models.text_ids(length, seed=length) for length in (1, 2, 21, 64, 200)]
    batches = [padded(models.text_ids(1, seed=6), models.text_ids(2, seed=7)), padded(ids[0], ids[2], ids[1])]
    for inputs in [*({"input_ids": each} for each in ids), *batches, {"input_ids": torch.cat([ids[1], ids[1] + 1])}]:
        expected = eager(model, inputs, max_new_tokens=12, eos_token_id=None)
        found = compiled.generate(**arrays(inputs), max_new_tokens=12, do_sample=False, eos_token_id=())
        np.testing.assert_array_equal(found.sequences, expected)


def test_sizes_that_the_compiler_takes_for_impossible(llama):
    """Sizes of 0 and 1, which AOTInductor assumes not to come, each with each: what the program gives uncompiled."""
    plain, compiled = (load_bundle(llama, compiled=flag).backend.program("decode") for flag in (False, True))
    rng, inputs = np.random.default_rng(0), llama.manifest.program("decode").inputs
    for batch, new, past in itertools.product((1, 2, 3), (1, 2, 5), (0, 1, 2, 7)):
        feeds = {
            item.name: rng.standard_normal((batch, item.shape[1], past, item.shape[3]), dtype=np.float32)
            for item in inputs
            if item.source.kind == "state"
        }
        feeds["input_ids"] = rng.integers(3, 200, (batch, new))
        feeds["position_ids"] = np.tile(np.arange(past, past + new), (batch, 1))
        feeds["attention_mask"] = np.ones((batch, past + new), np.int64)
        feeds["attention_mask"][0, : (past + new) // 3] = 0
        found, expected = compiled(feeds), plain(feeds)
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            np.testing.assert_allclose(found[name].numpy(), tensor.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_pictures_give_eagers_tokens(bundle):
    model, compiled = models.make("llava"), load_bundle(bundle("llava", "torch"), compiled=True)
    one, other = (models.image_inputs("llava", *around, seed=seed) for seed, around in ((20, (6, 9)), (21, (2, 3))))
    two = {name: torch.cat([one[name], other[name]], 1 if name != "pixel_values" else 0) for name in one}
    for inputs in (one, two, {"input_ids": models.text_ids(9, seed=3)}):
        expected = eager(model, inputs, max_new_tokens=10)
        np.testing.assert_array_equal(compiled.generate(**arrays(inputs), max_new_tokens=10).sequences, expected)


@pytest.mark.long
def test_experts_and_their_own_operator(bundle):
    model, compiled = (
        shrink.make("MixtralForCausalLM"),
        load_bundle(bundle("MixtralForCausalLM", "torch"), compiled=True),
    )
    for length in (1, 7, 30):
        inputs = {"input_ids": models.text_ids(length, seed=length)}
        expected = eager(model, inputs, max_new_tokens=8)
        found = compiled.generate(**arrays(inputs), max_new_tokens=8, do_sample=False)
        np.testing.assert_array_equal(found.sequences, expected)


def test_the_command_line_verifies_what_was_compiled(llama, no_compiler, capfd):
    assert invoke(["verify", str(llama.path), "--compiled", "--json"]) == 0
    cases = json.loads(capfd.readouterr().out)["cases"]
    assert max(case["batch"] for case in cases) > 1 and min(case["prompt_length"] for case in cases) == 1
    assert invoke(["bench", str(llama.path), "--compiled", "--prompt-tokens", "4", "--new-tokens", "3", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["compiled"] is True


def test_weights_are_neither_in_the_package_nor_copied(llama, cache):
    backend = load_bundle(llama, compiled=True).backend
    module = backend.program("decode")._module
    assert module._loader.get_constant_fqns() == []
    mapped = {weight.data_ptr() for weight in backend._weights.values()}
    assert len(mapped & {weight.data_ptr() for weight in module._weights}) == len(mapped)
    for package in cache.iterdir():
        with zipfile.ZipFile(package) as file:
            assert not [name for name in file.namelist() if "weights" in name]


def test_what_was_compiled_is_kept(llama, cache, no_compiler):
    assert all(path.suffix == ".pt2" for path in cache.iterdir())
    assert cache.stat().st_mode & 0o077 == 0
    ids = models.text_ids(5, seed=1).numpy()
    assert load_bundle(llama, compiled=True).generate(input_ids=ids, max_new_tokens=3).sequences.shape == (1, 8)


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_package_is_compiled_again(damage, llama, cache, other_cache, monkeypatch):
    load_bundle(llama, compiled=True)
    with zipfile.ZipFile(next(iter(cache.iterdir()))) as file:
        name = max(file.namelist(), key=lambda name: file.getinfo(name).file_size)
        assert name.endswith(".so")
    shutil.copytree(cache, other_cache)
    other_cache.chmod(0o700)
    whole = {path.name: path.read_bytes() for path in other_cache.iterdir()}
    for path in other_cache.iterdir():
        content = bytearray(whole[path.name])
        content[len(content) // 2] ^= 0xFF
        path.write_bytes({"cut": content[: len(content) // 2], "changed": content, "empty": b""}[damage])
    compiled = []

    def put_back(exported, package, program):
        compiled.append(program)
        package.write_bytes(whole[package.name])

    monkeypatch.setattr(torch_compiled, "_compile", put_back)
    ids = models.text_ids(5, seed=1).numpy()
    load_bundle(llama, compiled=True).generate(input_ids=ids, max_new_tokens=3)
    assert compiled == [f"{llama.path}: the program 'decode'"]


def test_a_whole_package_that_cannot_be_loaded_is_not_compiled_again(llama, no_compiler, monkeypatch):
    def fail(*_):
        raise RuntimeError("model.so: failed to map segment from shared object\nException raised from dlopen")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", fail)
    with pytest.raises(
        EngineError, match=r"the program 'decode': .* can't be loaded: model\.so: failed to map"
    ) as error:
        load_bundle(llama, compiled=True).backend.program("decode")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders have no such owner")
def test_a_cache_that_others_write_to_is_not_used(llama, other_cache, no_compiler):
    other_cache.mkdir(parents=True)
    other_cache.chmod(0o777)
    with pytest.raises(EngineError, match=r"compiled: others can write there, so no compiled program is loaded"):
        load_bundle(llama, compiled=True).backend.program("decode")


def test_a_cache_that_cannot_be_made(llama, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"no folder to keep compiled programs in: .*: set XDG_CACHE_HOME to one"):
        load_bundle(llama, compiled=True).backend.program("decode")


def test_another_number_of_threads_or_setting_is_another_package(llama):
    archive = llama.file("decode.pt2").read_bytes()
    threads, one = torch.get_num_threads(), torch_compiled._key(torch, archive, "cpu")
    try:
        torch.set_num_threads(threads + 1)
        assert torch_compiled._key(torch, archive, "cpu") != one
    finally:
        torch.set_num_threads(threads)
    with config.patch({"cpp.min_chunk_size": 7}):
        assert torch_compiled._key(torch, archive, "cpu") != one
    assert torch_compiled._key(torch, archive + b"x", "cpu") != one
    assert torch_compiled._key(torch, archive, "cpu") == one


def test_no_compiler_and_a_failing_one_are_one_line(llama, other_cache, tmp_path):
    failing = tmp_path / "failing"
    failing.write_text(
        "#!/bin/sh\ncase $1 in --version) exec g++ --version;; esac\necho 'x.h:1: error: no' >&2; exit 1\n"
    )
    failing.chmod(0o755)
    for compiler, cause in (
        ("/no/such/g++", "InvalidCxxCompiler|No working C.. compiler found"),
        (failing, "error: no"),
    ):
        with config.patch({"cpp.cxx": (None, str(compiler))}):
            model = load_bundle(llama, compiled=True)
            with pytest.raises(
                EngineError, match=f"the program 'decode': AOTInductor can't compile it here: .*{cause}"
            ) as e:
                model.generate(input_ids=[[5, 6]], max_new_tokens=2)
            assert "\n" not in str(e.value)
    assert list(other_cache.iterdir()) == []


def test_inputs_that_the_code_would_misread_are_an_error(llama):
    """The manifest says what the runtime hands over; machine code would read past the end of what it doesn't expect."""
    program = load_bundle(llama, compiled=True).backend.program("decode")
    inputs = llama.manifest.program("decode").inputs
    states = [item for item in inputs if item.source.kind == "state"]
    feeds = {item.name: np.zeros((2, item.shape[1], 4, item.shape[3]), np.float32) for item in states}
    feeds |= {"input_ids": np.ones((2, 3), np.int64), "position_ids": np.ones((2, 3), np.int64)}
    feeds["attention_mask"] = np.ones((2, 7), np.int64)
    program(feeds)
    for name, wrong in (
        ("past_0_key", feeds["past_0_key"].astype(np.float16)),
        ("past_0_key", feeds["past_0_key"][:, :1]),
        ("past_1_value", feeds["past_1_value"][:, :, :3]),
        ("input_ids", feeds["input_ids"][:1]),
        ("input_ids", feeds["input_ids"] + models.VOCABULARY),
    ):
        with pytest.raises(EngineError, match="torch failed in the program 'decode': the input"):
            program({**feeds, name: wrong})


def test_machine_code_in_a_bundle_is_not_loaded(llama, cache, tmp_path):
    """A bundle's own .pt2 with what AOTInductor wrote is refused, as any that isn't a plain archive."""
    from genbundle.bundles import BundleError
    from genbundle.runtime.backends.torch_archive import checked_archive

    with pytest.raises(BundleError, match="which is never loaded"):
        checked_archive(Path(next(iter(cache.iterdir()))), torch)
