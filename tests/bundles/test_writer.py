"""Writing and opening: same bytes, nothing half-written whatever happens, nothing but bundles replaced."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest

from genbundle.bundles import BuildError, BundleError, BundleVersionError, golden, open_bundle
from genbundle.bundles import reader as reader_module
from genbundle.bundles import writer as writer_module
from genbundle.bundles.golden import GoldenCase, read_golden, write_golden
from genbundle.bundles.writer import new_bundle
from tests.bundles.samples import CONTENT, fill, manifest

ROOT = Path(__file__).parents[2]


def write(target, *, overwrite=False, note="first"):
    with new_bundle(target, overwrite=overwrite) as writer:
        fill(writer.path)
        return writer.commit(manifest(notes=(note,)))


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_write_and_open(tmp_path):
    bundle = write(tmp_path / "deep" / "one.bundle")
    assert bundle.path == tmp_path / "deep" / "one.bundle"
    assert set(bundle.manifest.files) == set(CONTENT)
    assert bundle.size == sum(map(len, CONTENT.values()))
    assert bundle.file("decode.onnx").read_bytes() == b"program"
    bundle.verify_files()
    assert open_bundle(str(bundle.path)) == bundle
    assert leftovers(tmp_path / "deep") == []
    with pytest.raises(BundleError, match=r"no file 'other' is listed in manifest\.json"):
        bundle.file("other")


def test_same_input_same_bytes(tmp_path):
    assert contents(write(tmp_path / "one").path) == contents(write(tmp_path / "two").path)


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_bundle(tmp_path / "b") as writer:
        fill(writer.path)
        raise RuntimeError("a build that fails")
    assert list(tmp_path.iterdir()) == []


def test_without_commit_nothing_is_published(tmp_path):
    with new_bundle(tmp_path / "b") as writer:
        fill(writer.path)
        assert writer.stage(manifest()).path == writer.path
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_kept_unless_asked(tmp_path):
    target = write(tmp_path / "b").path
    before = contents(target)
    with pytest.raises(BuildError) as raised:
        write(target, note="second")
    assert str(raised.value) == (
        f"{target} exists and is kept untouched: choose another output, or ask to overwrite it"
    )
    assert contents(target) == before
    assert write(target, overwrite=True, note="second").manifest.notes == ("second",)
    assert leftovers(tmp_path) == []


def test_an_old_bundle_survives_a_failed_overwrite(tmp_path):
    target = write(tmp_path / "b").path
    with pytest.raises(RuntimeError), new_bundle(target, overwrite=True) as writer:
        fill(writer.path)
        raise RuntimeError("a build that fails")
    assert open_bundle(target).manifest.notes == ("first",)
    assert leftovers(tmp_path) == []


def test_only_bundles_are_overwritten(tmp_path):
    file, folder, link = tmp_path / "file", tmp_path / "folder", tmp_path / "link"
    file.write_text("precious")
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    link.symlink_to(folder)
    for target, message in (
        (file, f"{file} is not a directory: only a bundle is ever overwritten"),
        (link, f"{link} is not a directory: only a bundle is ever overwritten"),
        (folder, f"{folder} holds files but no manifest.json: only a bundle is ever overwritten"),
    ):
        with pytest.raises(BuildError) as raised:
            write(target, overwrite=True)
        assert str(raised.value) == message
    assert file.read_text() == (folder / "thesis.txt").read_text() == "precious"


def test_another_kind_of_manifest_is_kept(tmp_path):
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text('{"manifest_version": 3}')
    with pytest.raises(BuildError, match=r"isn't genbundle's: only a bundle is ever overwritten"):
        write(tmp_path / "extension", overwrite=True)
    assert contents(tmp_path / "extension") == {"manifest.json": b'{"manifest_version": 3}'}


def test_leftovers_of_a_longer_name_are_another_targets(tmp_path):
    other = tmp_path / f".out.bundle.{os.getppid()}-0a1b2c3d.partial"
    other.mkdir()
    write(tmp_path / "out")
    assert other.is_dir()


def test_an_empty_directory_may_be_overwritten(tmp_path):
    (tmp_path / "b").mkdir()
    assert write(tmp_path / "b", overwrite=True).manifest.notes == ("first",)


def test_disk_full_while_writing(tmp_path, monkeypatch):
    target = write(tmp_path / "b").path

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(writer_module, "_write_synced", full)
    with pytest.raises(OSError, match="No space left on device"):
        write(target, overwrite=True, note="second")
    assert open_bundle(target).manifest.notes == ("first",)
    assert leftovers(tmp_path) == []


def test_a_file_size_limit(tmp_path):
    """A real failed write: the process may write files of 100 bytes at most, and the manifest is larger."""
    script = """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        from tests.bundles.test_writer import write
        try:
            write(TARGET)
        except OSError as error:
            print(error.strerror)
    """
    result = child(script, tmp_path / "b")
    assert result.communicate(timeout=60)[0] == "File too large\n"
    assert list(tmp_path.iterdir()) == []


def child(script, target):
    """A Python process that runs `script` with TARGET set."""
    code = f"from pathlib import Path\nTARGET = Path({str(target)!r})\n{textwrap.dedent(script)}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def killed_write(target, calls, *, overwrite):
    """Write in a forked process that kills itself before its system call number `calls`; whether it came through."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
        return not os.WIFSIGNALED(status)
    left = calls

    def deadly(function):
        def wrapped(*args, **kwargs):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **kwargs)

        return wrapped

    try:
        for owner, names in (
            (os, ("fsync", "open", "mkdir", "rename", "rmdir", "unlink")),
            (Path, ("rename", "write_bytes", "mkdir", "open")),
            (writer_module.shutil, ("rmtree",)),
        ):
            for name in names:
                setattr(owner, name, deadly(getattr(owner, name)))
        write(target, overwrite=overwrite, note="second")
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking with threads about: the child only writes files
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_step(tmp_path, overwrite):
    """SIGKILL before each system call of a write in turn: the target is the old bundle, the new one, or nothing."""
    survived, count, seen = False, 0, set()
    while not survived:
        target = tmp_path / str(count) / "b"
        target.parent.mkdir()
        if overwrite:
            write(target)
        survived = killed_write(target, count, overwrite=overwrite)
        if target.exists():
            found = open_bundle(target)
            found.verify_files()
            seen.add(found.manifest.notes[0])
        else:
            seen.add("nothing")
        # The next build clears what was left.
        assert write(target, overwrite=True, note="third").manifest.notes == ("third",)
        assert leftovers(target.parent) == []
        count += 1
    assert count > 20
    assert "second" in seen and len(seen) > 1


def cut_swap(tmp_path):
    """A bundle whose replacement was killed between its two renames: it stands beside the target."""
    target = write(tmp_path / "b").path
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    target.rename(tmp_path / f".b.{dead.pid}-abcd1234.partial.old")
    return target


def test_a_swap_that_was_cut_in_two_is_undone(tmp_path):
    target = cut_swap(tmp_path)
    with pytest.raises(RuntimeError), new_bundle(target, overwrite=True):
        raise RuntimeError("a build that fails")
    assert open_bundle(target).manifest.notes == ("first",)
    assert leftovers(tmp_path) == []


def test_a_recovered_bundle_is_not_overwritten_unasked(tmp_path):
    target = cut_swap(tmp_path)
    with pytest.raises(BuildError, match="exists and is kept untouched"):
        write(target, note="second")
    assert open_bundle(target).manifest.notes == ("first",)


def test_a_build_that_still_runs_is_left_alone(tmp_path):
    script = """
        import sys, time
        from genbundle.bundles.writer import new_bundle
        with new_bundle(TARGET) as writer:
            print(writer.path.name, flush=True)
            time.sleep(60)
    """
    process = child(script, tmp_path / "b")
    try:
        other = process.stdout.readline().strip()
        write(tmp_path / "b")
        assert leftovers(tmp_path) == [other]
    finally:
        process.kill()
        process.communicate()
    write(tmp_path / "b", overwrite=True)
    assert leftovers(tmp_path) == []


def opened_error(path, kind=BundleError):
    with pytest.raises(kind) as raised:
        open_bundle(path)
    return str(raised.value)


def test_what_is_no_bundle(tmp_path):
    assert opened_error(tmp_path / "no") == f"{tmp_path / 'no'}: no such bundle directory"
    assert opened_error(tmp_path) == f"{tmp_path}: not a bundle, it holds no manifest.json"
    (tmp_path / "file").write_text("")
    assert opened_error(tmp_path / "file") == f"{tmp_path / 'file'}: not a bundle directory"
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\xfd")
    assert opened_error(tmp_path).startswith(f"{tmp_path / 'manifest.json'}: can't be read: 'utf-8' codec can't decode")


def test_damaged_files(tmp_path):
    target = write(tmp_path / "b").path
    program = target / "decode.onnx"
    program.write_bytes(b"progra")
    assert opened_error(target) == f"{target}: 'decode.onnx' has 6 bytes, the manifest says 7"
    program.write_bytes(b"PROGRAM")
    assert opened_error(target) == f"{program}: sha256 differs from the manifest's: the file was changed or damaged"
    program.unlink()
    assert opened_error(target) == f"{target}: the file 'decode.onnx' is missing"
    program.mkdir()
    assert opened_error(target) == f"{target}: the file 'decode.onnx' is missing"


def test_large_files_are_hashed_on_demand(tmp_path, monkeypatch):
    """Weights of gigabytes aren't read to open a bundle, but `verify_files` reads them."""
    target = write(tmp_path / "b").path
    monkeypatch.setattr(reader_module, "_HASHED_WHEN_OPENED", 2)
    (target / "decode.onnx").write_bytes(b"PROGRAM")
    with pytest.raises(BundleError, match="sha256 differs"):
        open_bundle(target).verify_files()


def test_links_that_leave_the_bundle(tmp_path):
    target = write(tmp_path / "b").path
    (tmp_path / "secret").write_bytes(b"program")
    (target / "decode.onnx").unlink()
    (target / "decode.onnx").symlink_to(tmp_path / "secret")
    assert opened_error(target) == f"{target}: the file 'decode.onnx' is a link that leaves the bundle"
    (target / "decode.onnx").unlink()
    (target / "copy").write_bytes(b"program")
    (target / "decode.onnx").symlink_to("copy")
    assert open_bundle(target).file("decode.onnx").read_bytes() == b"program"


def test_errors_of_the_manifest_name_the_bundle(tmp_path):
    target = write(tmp_path / "b").path
    value = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps({**value, "version": 2}))
    assert opened_error(target, BundleVersionError).startswith(f"{target}: this bundle is of format version 2")
    (target / "manifest.json").write_text(
        json.dumps({**value, "files": {**value["files"], "../x": value["files"]["decode.onnx"]}})
    )
    assert opened_error(target) == f"{target}: Expected a file path inside the bundle, got '../x' - at `$.files`"
    (target / "manifest.json").write_text((json.dumps(value))[:-9])
    assert "manifest.json is not JSON" in opened_error(target)


def test_unlisted_files_are_ignored(tmp_path):
    target = write(tmp_path / "b").path
    (target / "stray.py").write_text("raise SystemExit")
    assert "stray.py" not in open_bundle(target).manifest.files


CASE = GoldenCase(
    name="one",
    inputs={
        "input_ids": np.array([[1, 2]]),
        "attention_mask": np.array([[1, 1]]),
        "pixels": np.ones((1, 2), np.float32),
    },
    sequences=np.array([[1, 2, 3]]),
    top_ids=np.array([[[3, 1, 0]]]),
    top_logits=np.array([[[2.0, 5.0, -1.0]]], np.float32),
    options={"max_new_tokens": 1, "do_sample": False},
)

ROUNDING = np.array([[0.002]], np.float32)


def test_golden_round_trip_and_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_golden(tmp_path / name, [CASE, replace(CASE, rounding=ROUNDING).truncated(1)])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    first, second = read_golden(tmp_path / "one")
    assert first.name == "one" and first.options == CASE.options
    assert list(first.inputs) == sorted(CASE.inputs)
    for name, array in CASE.inputs.items():
        np.testing.assert_array_equal(first.inputs[name], array)
        assert first.inputs[name].dtype == array.dtype
    assert first.rounding is None
    np.testing.assert_array_equal(second.rounding, ROUNDING)
    assert second.top_ids.tolist() == [[[1]]] and second.top_logits.tolist() == [[[5.0]]]


def test_golden_bytes(tmp_path):
    write_golden(tmp_path / "g", [])
    assert (tmp_path / "g").read_bytes() == b"\x82\xa7version\x01\xa5cases\x90"


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"\xc1", b"\x82\xa7version\x02\xa5cases\x90", b"\x82\xa7version\x01\xa5cases\x91\x80"]
)
def test_bad_golden_files(tmp_path, content):
    (tmp_path / "g").write_bytes(content)
    with pytest.raises(BundleError, match="golden file"):
        read_golden(tmp_path / "g")


ONE = np.array([[[3, 1, 0]]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 5}, "names of a case"),
        ({"rounding": ROUNDING * 250}, "roundings from 0 to 0.01"),
        ({"rounding": ROUNDING * np.float32("nan")}, "roundings from 0 to 0.01"),
        ({"rounding": ROUNDING[0]}, "a rounding of every step"),
        ({"options": {}}, "max_new_tokens"),
        ({"options": ["max_new_tokens"]}, "max_new_tokens"),
        ({"options": {"max_new_tokens": 1}}, "do_sample false"),
        ({"options": {"max_new_tokens": True, "do_sample": False}}, "max_new_tokens"),
        ({"options": {"max_new_tokens": 0, "do_sample": False}}, "at least the 1 recorded"),
        ({"top_logits": np.full((1, 1, 3), np.nan, np.float32)}, "aren't numbers"),
        ({"top_logits": np.full((1, 1, 3), np.inf, np.float32)}, "aren't numbers"),
        ({"top_logits": np.zeros((1, 1, 3))}, "float32"),
        ({"top_ids": ONE.astype(np.float64)}, "of integers"),
        ({"top_ids": -ONE}, "don't fit"),
        ({"top_ids": ONE[:, :0], "top_logits": np.zeros((1, 0, 3), np.float32)}, "don't fit"),
        ({"sequences": np.array([[1.0, 2.0, 3.0]])}, "of integers"),
        ({"sequences": np.array([[1, 2, 3], [1, 2, 3]])}, "don't fit"),
    ],
)
def test_golden_cases_that_prove_nothing(tmp_path, change, words):
    write_golden(tmp_path / "g", [replace(CASE, **change) if isinstance(change.get("options", {}), dict) else CASE])
    if isinstance(change.get("options"), list):
        content = msgpack.unpackb((tmp_path / "g").read_bytes())
        content["cases"][0] |= change
        (tmp_path / "g").write_bytes(msgpack.packb(content))
    with pytest.raises(BundleError, match=rf"not a golden file: .*{words}"):
        read_golden(tmp_path / "g")


@pytest.mark.parametrize("shape", [[-1, 3], [1, -1], "13", [1.0, 3], [True, 3], [1, 4], None])
def test_golden_shapes(tmp_path, shape):
    write_golden(tmp_path / "g", [CASE])
    content = msgpack.unpackb((tmp_path / "g").read_bytes())
    content["cases"][0]["sequences"]["shape"] = shape
    (tmp_path / "g").write_bytes(msgpack.packb(content))
    with pytest.raises(BundleError, match="not a golden file"):
        read_golden(tmp_path / "g")


def test_golden_arrays_that_claim_to_be_long(tmp_path):
    (tmp_path / "g").write_bytes(b"\xdd\x00\x03\x0d\x40" * 500 + b"\xc0" * 200_000)
    with pytest.raises(BundleError, match="not a golden file"):
        read_golden(tmp_path / "g")


def test_truncated_golden_files(tmp_path):
    write_golden(tmp_path / "whole", [CASE])
    whole = (tmp_path / "whole").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "part").write_bytes(whole[:length])
        with pytest.raises(BundleError):
            read_golden(tmp_path / "part")


def test_writing_is_quick(tmp_path):
    begun = time.perf_counter()
    write(tmp_path / "b")
    assert time.perf_counter() - begun < 5


def test_golden_arrays_that_repeat_are_deflated(tmp_path):
    case = replace(CASE, inputs={**CASE.inputs, "pixel_values": np.zeros((1, 3, 64, 64), np.float32)})
    write_golden(tmp_path / "g", [case])
    assert (tmp_path / "g").stat().st_size < 2000
    (found,) = read_golden(tmp_path / "g")
    np.testing.assert_array_equal(found.inputs["pixel_values"], case.inputs["pixel_values"])


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1, 3, 64, 63]},  # it gives more bytes than that
        {"shape": [1, 3, 64, 65]},
        {"shape": [1, 2**20, 2**20]},
        {"deflated": b"nothing"},
        {"deflated": zlib.compress(bytes(2**24))},
        {"deflated": zlib.compress(bytes(3 * 64 * 64 * 4))[:-6]},
        {"deflated": zlib.compress(bytes(3 * 64 * 64 * 4)) + b"more"},
    ],
)
def test_bad_deflated_arrays(tmp_path, change):
    case = replace(CASE, inputs={"input_ids": CASE.inputs["input_ids"], "x": np.zeros((1, 3, 64, 64), np.float32)})
    write_golden(tmp_path / "g", [case])
    content = msgpack.unpackb((tmp_path / "g").read_bytes())
    content["cases"][0]["inputs"]["x"] |= change
    (tmp_path / "g").write_bytes(msgpack.packb(content))  # pyright: ignore[reportArgumentType]
    with pytest.raises(BundleError, match="not a golden file"):
        read_golden(tmp_path / "g")


def test_the_deflated_arrays_of_a_golden_file_have_one_limit(tmp_path, monkeypatch):
    zeros = np.zeros((1, 3, 64, 64), np.float32)
    inputs = {"input_ids": CASE.inputs["input_ids"], **dict.fromkeys("xyz", zeros)}
    write_golden(tmp_path / "g", [replace(CASE, inputs=inputs)])
    monkeypatch.setattr(golden, "_MOST_BYTES", 4 * zeros.nbytes)
    assert len(read_golden(tmp_path / "g")[0].inputs) == 4
    monkeypatch.setattr(golden, "_MOST_BYTES", 2 * zeros.nbytes)
    with pytest.raises(BundleError, match="not a golden file: its deflated arrays are larger than 98304 bytes"):
        read_golden(tmp_path / "g")


def test_a_golden_file_that_does_not_fit_in_memory(tmp_path, monkeypatch):
    write_golden(tmp_path / "g", [CASE])

    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(golden, "numpy_dtype", exhausted)
    with pytest.raises(BundleError, match="not a golden file that fits in the memory here"):
        read_golden(tmp_path / "g")
