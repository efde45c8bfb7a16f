"""Writing a bundle: into a temporary directory beside the target, synced, the manifest last, renamed atomically."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from genbundle.bundles.errors import BuildError
from genbundle.bundles.manifest import FORMAT, MANIFEST_NAME, File, Manifest
from genbundle.bundles.reader import Bundle, open_bundle, sha256


class BundleWriter:
    """A bundle under construction: write files below `path`, then `commit` the manifest."""

    def __init__(self, path: Path, target: Path, *, overwrite: bool):
        self.path, self.target, self._overwrite = path, target, overwrite

    def stage(self, manifest: Manifest) -> Bundle:
        """Write `manifest`, completed with every file's size and hash, and open the result where it stands."""
        files = {
            file.relative_to(self.path).as_posix(): File(size=file.stat().st_size, sha256=sha256(file))
            for file in sorted(self.path.rglob("*"))
            if file.is_file() and file.name != MANIFEST_NAME
        }
        _write_synced(self.path / MANIFEST_NAME, replace(manifest, files=files).to_json())
        return open_bundle(self.path)

    def commit(self, manifest: Manifest) -> Bundle:
        """Stage `manifest` and put the bundle at its target in one rename; an old bundle there goes only then."""
        self.stage(manifest)
        for file in self.path.rglob("*"):
            _sync(file)
        _sync(self.path)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        check_target(self.target, overwrite=self._overwrite)  # something may have come there since
        if self.target.exists():
            old = self.path.with_name(f"{self.path.name}.old")
            self.target.rename(old)
            try:
                self.path.rename(self.target)
            except OSError:
                old.rename(self.target)
                raise
            _sync(self.target.parent)
            shutil.rmtree(old)
        else:
            self.path.rename(self.target)
        _sync(self.target.parent)
        return open_bundle(self.target)


@contextmanager
def new_bundle(target: str | Path, *, overwrite: bool = False) -> Iterator[BundleWriter]:
    """A writer for a bundle at `target`; nothing stands at `target` until `commit`, and nothing is left on an error.

    Raises BuildError when something is at `target` and `overwrite` isn't set, or when what is there is no bundle.
    What a killed build left beside the target is removed first.
    """
    target = Path(target).absolute()
    _recover(target)
    check_target(target, overwrite=overwrite)
    with _partial(target) as path:
        yield BundleWriter(path, target, overwrite=overwrite)


@contextmanager
def trial_bundle(target: str | Path) -> Iterator[BundleWriter]:
    """The same for a bundle that is made on the way to the one at `target`, and isn't committed."""
    with _partial(Path(target).absolute()) as path:
        yield BundleWriter(path, path, overwrite=False)  # where it is, so that nothing can be put in its place


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool) -> None:
    """BuildError when `target` can't take a new bundle."""
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise BuildError(f"{target} exists and is kept untouched: choose another output, or ask to overwrite it")
    if not target.is_dir() or target.is_symlink():
        raise BuildError(f"{target} is not a directory: only a bundle is ever overwritten")
    if any(target.iterdir()) and not (target / MANIFEST_NAME).is_file():
        raise BuildError(f"{target} holds files but no {MANIFEST_NAME}: only a bundle is ever overwritten")
    if any(target.iterdir()) and not _is_ours(target / MANIFEST_NAME):
        raise BuildError(f"{target / MANIFEST_NAME} isn't genbundle's: only a bundle is ever overwritten")


def _is_ours(manifest: Path) -> bool:
    """Whether a manifest.json is a bundle's; web applications have files of that name as well."""
    try:
        value = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT


def _recover(target: Path) -> None:
    """Undo what killed builds of this target left: restore an old bundle caught mid-swap, remove partial ones."""
    # Exactly this target's: `out` must not touch what a build of `out.bundle` has beside it.
    name = re.compile(re.escape(f".{target.name}.") + r"(\d+)-[^.]*\.partial(\.old)?")
    for leftover in sorted(target.parent.iterdir()) if target.parent.is_dir() else ():
        match = name.fullmatch(leftover.name)
        if match is None or (int(match[1]) != os.getpid() and _alive(int(match[1]))):
            continue
        if leftover.name.endswith(".partial.old") and not target.exists():
            leftover.rename(target)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
