"""Taking tokens back from sequences that are under way, so that they go on from an earlier place with others."""

from genbundle.bundles import InputError
from genbundle.runtime.wiring import Sequences, Wiring

# Each token's position is one more than the one's before, in every sequence without padding.
_COUNTING = ("arange", "cumsum")


def rewind(wiring: Wiring, sequences: Sequences, length: int) -> None:
    """Let `sequences` be as they were after their first `length` tokens; `wiring.step` goes on from there.

    Nothing is computed: keys and values are cut, and programs that keep them inside write over them. Whoever goes on
    by `wiring.step` past the manifest's `flow.restart` has to begin again with `wiring.prompt`, as `generate` does.

    Raises InputError for a length that they don't have, and for state or positions that can't be taken back: what sums
    up all tokens (state spaces, convolutions), and positions that don't count them (pictures' rows and columns).
    """
    now, restart = sequences.state.length, wiring.manifest.flow.restart
    if not 0 < length <= now:
        raise InputError(f"rewind: expected a length from 1 to the {now} tokens that there are, got {length}")
    if restart is not None and now > restart:
        raise InputError(f"rewind: from {restart} tokens on this model's keys count by the whole length")
    summing = [entry.name for entry in wiring.manifest.state if entry.axis is None]
    if summing and length < now:
        raise InputError(f"rewind: the state {summing[0]!r} sums up all tokens, none of which can be taken back")
    if not all(key.startswith(_COUNTING) for key in sequences.positions) or not sequences.mask.all():
        raise InputError("rewind: the positions don't count the tokens, because of pictures or padding among them")
    sequences.state.cut(length, wiring.backend.to_numpy)
    sequences.mask = sequences.mask[:, :length]
    sequences.positions = {key: last[..., -1:] - (now - length) for key, last in sequences.positions.items()}
