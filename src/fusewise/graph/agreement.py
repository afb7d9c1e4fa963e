"""Ranks compare what they are about to do to a graph: never two ranks with two graphs.

Speaks once per kind of graph, over the communicator's control channel, while the graph compiles;
a kind that was settled before is not spoken of again, so that a rank may compile a graph anew for
another size without its peers. Ranks that differed once are never asked again: one that broke its
graph in two has a second one that its peers will not speak of. Decides nothing about a site.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusewise.ranks.group import Group

log = logging.getLogger("fusewise")

_PHASE = "the sites of a compiled graph"
_SHOWN = 6  # sites named in a warning
_ABSENT = "no such site"


class Agreement:
    """What the ranks of a group settled about their graphs.

    Args:
        group: whose ranks must agree; None where there is nobody to ask.
    """

    def __init__(self, group: Group | None) -> None:
        self._group = group if group is not None and group.world_size > 1 else None
        self._settled: set[str] = set()
        self._differed = False

    def reached(self, decisions: Sequence[tuple[str, str]]) -> bool:
        """Whether every rank is about to do the same; False for good once they were not.

        The first rank warns then, naming the sites.

        Args:
            decisions: (site, what is done there) in graph order, the same words on all ranks.

        Raises:
            RankTimeoutError: names the ranks that compiled no such graph within the bound.
        """
        if self._group is None or not decisions:
            return True
        digest = hashlib.sha256(json.dumps(decisions).encode()).hexdigest()
        if digest in self._settled:
            return True
        if not self._differed:
            digests = self._group.gather(_PHASE, digest)
            self._differed = len(set(digests)) > 1
            if not self._differed:
                self._settled.add(digest)
                return True
            self._warn(self._group, decisions)
        return False

    @staticmethod
    def _warn(group: Group, decisions: Sequence[tuple[str, str]]) -> None:
        """Names the sites that differ. Collective."""
        each: list[dict[str, str]] = [dict(d) for d in group.gather(_PHASE, list(decisions))]
        differing = []
        for site in dict.fromkeys(site for rank in each for site in rank):
            told = [rank.get(site, _ABSENT) for rank in each]
            if len(set(told)) > 1:
                words = (f"rank {r}: {what}" for r, what in zip(group.ranks, told, strict=True))
                differing.append(f"{site} ({', '.join(words)})")
        if group.rank == 0:
            log.warning(
                "%s: ranks would rewrite a graph differently, so all leave it and later ones: %s%s",
                group,
                "; ".join(differing[:_SHOWN]),
                "; …" if len(differing) > _SHOWN else "",
            )
