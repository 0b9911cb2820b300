"""Groups: their digest, their slots over trainer ranks, and the formulas that make a group's outcome of its parts'.

A group's outcome is one entry for all its members, under the digest of their keys in slot order. A slot is the pair
(rank, index) under which a rank submitted a member.
"""

from tasks.groups.digest import digest
from tasks.groups.formulas import Ties, combine, draw_pairs, ranks
from tasks.groups.slots import GroupSlots, Registered

__all__ = [
    "GroupSlots",
    "Registered",
    "Ties",
    "combine",
    "digest",
    "draw_pairs",
    "ranks",
]
