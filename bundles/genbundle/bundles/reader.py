"""Opening a bundle: the manifest, the files' sizes and hashes. Loading runs no code from it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from genbundle.bundles.errors import BundleError
from genbundle.bundles.manifest import MANIFEST_NAME, Manifest
from genbundle.bundles.parsing import parse_manifest

_HASHED_WHEN_OPENED = 16 * 2**20
_LARGEST_MANIFEST = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An opened bundle: where it is and what it says of itself."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files; BundleError for a name that the manifest doesn't list."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: no file {name!r} is listed in {MANIFEST_NAME}")
        return self.path / name

    def verify_files(self) -> None:
        """Read every file and compare its sha256 with the manifest's; BundleError names the first that differs."""
        for name, expected in self.manifest.files.items():
            if sha256(self.path / name) != expected.sha256:
                raise BundleError(_changed(self.path / name))

    @property
    def size(self) -> int:
        """Bytes on disk, the manifest's own left out."""
        return sum(file.size for file in self.manifest.files.values())


def open_bundle(path: str | Path) -> Bundle:
    """Open the bundle directory `path`: check the manifest, and that each file is there with its size.

    Hashes are checked of files up to 16 MiB, which takes milliseconds: programs, tokenizer, templates. Large files
    (weights, a .pte) are left to `Bundle.verify_files`, which reads everything.

    Raises BundleError, naming what is wrong and where (BundleVersionError for a newer format).
    """
    root = Path(path)
    if not root.is_dir():
        raise BundleError(f"{root}: {'not a bundle directory' if root.exists() else 'no such bundle directory'}")
    described = root / MANIFEST_NAME
    if not described.is_file():  # a device or a pipe behind the name would never end
        raise BundleError(f"{root}: not a bundle, it holds no {MANIFEST_NAME}")
    if described.stat().st_size > _LARGEST_MANIFEST:
        raise BundleError(f"{described}: has more than {_LARGEST_MANIFEST} bytes, which no manifest needs")
    try:
        text = described.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise BundleError(f"{root / MANIFEST_NAME}: can't be read: {error}") from error
    try:
        manifest = parse_manifest(text)
    except BundleError as error:
        raise type(error)(f"{root}: {error}") from error
    inside = root.resolve()
    for name, expected in manifest.files.items():
        file = root / name
        if not file.is_file():
            raise BundleError(f"{root}: the file {name!r} is missing")
        if not file.resolve().is_relative_to(inside):
            raise BundleError(f"{root}: the file {name!r} is a link that leaves the bundle")
        if file.stat().st_size != expected.size:
            raise BundleError(f"{root}: {name!r} has {file.stat().st_size} bytes, the manifest says {expected.size}")
        if expected.size <= _HASHED_WHEN_OPENED and sha256(file) != expected.sha256:
            raise BundleError(_changed(file))
    return Bundle(path=root, manifest=manifest)


def _changed(file: Path) -> str:
    return f"{file}: sha256 differs from the manifest's: the file was changed or damaged"


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
