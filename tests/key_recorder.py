"""Records what is done with every PRNG key, to find keys that are used twice.

`fold_in(key, i)` equals `split(key, n)[i]`, so a key that is both folded into and split can give the
same numbers twice, as can a key that is drawn from twice, or split into two numbers of keys.
"""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.extend.random as jax_random
import numpy as np


class Use(NamedTuple):
    """One use of a key: the bits of the key, and what was done: "draw", "fold_in" or "split n"."""

    key: bytes
    kind: str


class KeyRecorder:
    """Makes keys of JAX's default implementation that record their uses, inside `jit` too.

    A program is recorded as often as it runs, so run it once. The numbers are those of other keys.
    """

    def __init__(self):
        self.uses: list[Use] = []
        threefry = jax_random.threefry_prng_impl

        def split(key, shape):
            self._record("split {}", key, shape)
            return threefry.split(key, shape)

        def random_bits(key, bit_width, shape):
            self._record("draw", key, shape)
            return threefry.random_bits(key, bit_width, shape)

        def fold_in(key, data):
            self._record("fold_in", key, ())
            return threefry.fold_in(key, data)

        self._impl = jax_random.define_prng_impl(
            key_shape=threefry.key_shape, seed=threefry.seed, split=split,
            random_bits=random_bits, fold_in=fold_in, name="recorded", tag="recorded",
        )  # fmt: skip

    def key(self, seed: int) -> jax.Array:
        """Returns a key whose uses, and those of all keys made from it, are recorded."""
        return jax.random.key(seed, impl=self._impl)

    def drawn_twice(self) -> list[bytes]:
        """Returns the keys that random numbers were drawn from more than once."""
        jax.effects_barrier()
        counts = Counter(use.key for use in self.uses if use.kind == "draw")
        return [key for key, count in counts.items() if count > 1]

    def mixed(self) -> dict[bytes, set[str]]:
        """Returns the keys that were used in more than one way, and these ways."""
        jax.effects_barrier()
        kinds: dict[bytes, set[str]] = {}
        for use in set(self.uses):
            kinds.setdefault(use.key, set()).add(use.kind)
        return {key: found for key, found in kinds.items() if len(found) > 1}

    def _record(self, kind: str, key: Any, shape: tuple[int, ...]) -> None:
        kind = kind.format("x".join(map(str, shape)))
        jax.debug.callback(
            lambda bits: self.uses.append(Use(np.asarray(bits).tobytes(), kind)), key
        )
