"""The collective operations of compiled programs."""

import math
import re
from typing import NamedTuple

_KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")


class Collective(NamedTuple):
    """A collective operation of a compiled program.

    Attributes:
        kind: its name in HLO, such as "all-reduce".
        num_bytes: the size of its result on one device.

    Example:
        >>> Collective("all-reduce", 256).kind
        'all-reduce'
    """

    kind: str
    num_bytes: int


def collectives(text: str) -> list[Collective]:
    """Returns the collective operations of a program, one in a loop once.

    Args:
        text: the compiled program, `jax.jit(...).lower(...).compile().as_text()`.

    Example:
        >>> collectives("  %all-reduce.1 = (f32[], f32[64,3]{1,0}) all-reduce(%a, %b), channel_id=1")
        [Collective(kind='all-reduce', num_bytes=772)]
    """
    found = (_INSTRUCTION.search(line) for line in text.splitlines())
    return [_collective(*match.groups()) for match in found if match]


def _collective(shapes: str, kind: str, start: str | None) -> Collective:
    sizes = [_num_bytes(*shape) for shape in _SHAPE.findall(shapes)]
    # The start of an asynchronous one returns its operands beside its results, except for a sum.
    is_pair = start is not None and kind != "all-reduce"
    return Collective(kind, max(sizes) if is_pair else sum(sizes))


def _num_bytes(name: str, dims: str) -> int:
    return math.prod(int(dim) for dim in dims.split(",") if dim) * _item_bytes(name)


def _item_bytes(name: str) -> int:
    """Returns the bytes of a number of a type that HLO names, such as "f32", "bf16" or "pred"."""
    if name == "pred":
        return 1
    bits = int(re.sub(r"[a-z]+", "", name.split("e")[0]) or 0)
    assert bits, name
    return max(1, bits // 8)
