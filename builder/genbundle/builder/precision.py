"""What `precision=` asks for: one name for the language model, or a name for each part of the model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from genbundle.builder.components import Component
from genbundle.bundles import BuildError
from genbundle.bundles.manifest import Role
from genbundle.bundles.report import QualityFloor
from genbundle.runtime.inspection import megabytes

PRECISIONS: dict[str, tuple[str, ...]] = {
    "cpu": ("fp32", "int8", "int4"),
    "cuda": ("fp32", "fp16", "bf16"),
    "xnnpack": ("fp32", "int8", "int4"),
    "torch": ("fp32", "int8", "int4"),
}
LANGUAGE_MODEL, ENCODER = "language_model", "encoder"
PARTS = (LANGUAGE_MODEL, ENCODER, "image_encoder", "audio_encoder", "video_encoder")
BITS = {"int8": 8, "int4": 4}
HALVES = ("fp16", "bf16")
# Of all new tokens the least share whose first choice is eager's, and for each input the largest mean KL divergence:
# what a program that is wrong doesn't reach, and rounding of a model that has learned something does.
FLOORS = {
    "fp16": QualityFloor(agreement=0.95, kl_divergence=0.01),
    "bf16": QualityFloor(agreement=0.9, kl_divergence=0.05),
    "int8": QualityFloor(agreement=0.9, kl_divergence=0.05),
    "int4": QualityFloor(agreement=0.7, kl_divergence=0.5),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Precisions:
    """The precision of each part of the model: of the language model, with its token embedding and head, and of what
    makes features of pictures and sound, by the name of its kind or for all kinds (`encoder`)."""

    language_model: str = "fp32"
    encoders: Mapping[str, str] = field(default_factory=dict)

    @property
    def lossy(self) -> bool:
        """Whether any part is to be rounded."""
        return any(name != "fp32" for name in (self.language_model, *self.encoders.values()))

    def of_part(self, part: str) -> str:
        """The precision of a part in `part_of`'s names."""
        if part == LANGUAGE_MODEL:
            return self.language_model
        return self.encoders.get(part, self.encoders.get(ENCODER, "fp32"))

    def exact(self) -> "Precisions":
        """The same parts at float32, so that one which the model doesn't have is found with the first export."""
        return Precisions(encoders=dict.fromkeys(self.encoders, "fp32"))

    def floor(self, least: float | None) -> QualityFloor | None:
        """What the bundle has to reach: the table's for the coarsest precision in it, or the agreement `least`; None at
        float32, where no less than all will do (BuildError for a `least`)."""
        if not self.lossy:
            if least is not None:
                raise BuildError("quality_floor: at fp32 every token has to be the model's own; name a precision too")
            return None
        if least is not None:
            return QualityFloor(agreement=least)
        used = {self.language_model, *self.encoders.values()}
        return next(FLOORS[name] for name in ("int4", "int8", "bf16", "fp16") if name in used)

    def expect_parts(self, parts: Iterable[str]) -> None:
        """BuildError where a precision is given for a part that the model doesn't have."""
        there = set(parts)
        kinds = sorted(there - {LANGUAGE_MODEL})
        for name in self.encoders:
            if name not in there and not (name == ENCODER and kinds):
                raise BuildError(
                    f"precision: this model has no {name!r}: its parts are {', '.join([LANGUAGE_MODEL, *kinds])}"
                )


def parse_precision(given: str | Mapping[str, str], backend: str) -> Precisions:
    """`"int4"`, `"language_model=int4,encoder=int8"` or the same as a mapping; BuildError for what `backend` can't."""
    if isinstance(given, str) and "=" in given:
        pairs = [pair.partition("=") for pair in given.split(",")]
        names = [name.strip() for name, _, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise BuildError(f"precision: the part {twice!r} is given twice")
        given = {name: value.strip() for name, (_, _, value) in zip(names, pairs, strict=True)}
    # A picture's encoder is small beside its language model, and rounding it costs more than it saves.
    named = {LANGUAGE_MODEL: given} if isinstance(given, str) else dict(given)
    for part, name in named.items():
        if part not in PARTS:
            raise BuildError(f"precision: unknown part {part!r}: name some of {', '.join(PARTS)}")
        if name not in PRECISIONS[backend]:
            raise BuildError(
                f"precision {name!r} isn't available on {backend!r}: it can {', '.join(PRECISIONS[backend])}"
            )
    return Precisions(language_model=named.pop(LANGUAGE_MODEL, "fp32"), encoders=named)


def part_of(component: Component) -> str:
    """The part that a program's weights belong to: an encoder of text is the language model's."""
    sources = component.sources.values()
    reads_text = any(source.kind == "user" and source.name == "input_ids" for source in sources)
    if not only_encodes(component.roles) or (component.modality is None and reads_text):
        return LANGUAGE_MODEL
    return f"{component.modality}_encoder" if component.modality is not None else ENCODER


def kept_note(kept: Mapping[str, int]) -> tuple[str, ...]:
    """What a user should know of weights that a lossy precision left as they are: names with their bytes."""
    if not kept:
        return ()
    some = ", ".join(sorted(kept)[:3])
    return (
        f"{len(kept)} weights of {megabytes(sum(kept.values()))} stay at fp32, since no product or look-up takes them "
        f"rounded: {some}{' ...' if len(kept) > 3 else ''}",
    )


def only_encodes(roles: Iterable[Role]) -> bool:
    """Whether a program of these roles makes features and nothing else."""
    return set(roles) <= {"encoder", "projector"}
