"""The bundle format: manifest, files, hashes, golden records. numpy, msgpack; never torch or transformers."""

from genbundle.bundles.errors import (
    BuildError,
    BundleError,
    BundleVersionError,
    EngineError,
    GenbundleError,
    InputError,
    MissingExtraError,
    UnsupportedModelError,
    VerificationError,
)
from genbundle.bundles.manifest import Manifest
from genbundle.bundles.reader import Bundle, open_bundle

__all__ = [
    "BuildError",
    "Bundle",
    "BundleError",
    "BundleVersionError",
    "EngineError",
    "GenbundleError",
    "InputError",
    "Manifest",
    "MissingExtraError",
    "UnsupportedModelError",
    "VerificationError",
    "open_bundle",
]
