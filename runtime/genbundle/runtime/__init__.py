"""The runtime: `load_bundle(path).generate(...)`. numpy and an engine; never transformers, and torch only in backends
whose engine needs it."""

from genbundle.runtime.generate import Generation, Timings
from genbundle.runtime.load import load_bundle
from genbundle.runtime.model import Chunk, Model
from genbundle.runtime.sampling import GenerationOptions

__all__ = ["Chunk", "Generation", "GenerationOptions", "Model", "Timings", "load_bundle"]
