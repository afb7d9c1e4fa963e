"""What the plugins of all engines share: switch, explicit cap, profile, a probe that is safe.

Never imports torch or an engine, and never touches the driver in the calling process: engines fork
their workers, and a process whose parent has initialised CUDA cannot use it.
"""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from fusewise.engines.cap import CapDecision, ExplicitCap
from fusewise.errors import FusewiseError, InputError, UnavailableError
from fusewise.node import Fingerprint
from fusewise.profiles.schema import Profile
from fusewise.profiles.store import Level, find_profile
from fusewise.shape import DType, parse_size

MODES = ("cap", "full", "off")

# Fewer GPUs here than ranks: the group spans nodes, or was told that it shares them.
_PROBE = """
import sys
from fusewise.node import gpu_count, probe, torch_multicast
from fusewise.ranks.place import shares_gpus
ranks, gpus = int(sys.argv[1]), gpu_count()
shared = shares_gpus() and ranks > gpus > 0
nodes = -(-ranks // gpus) if gpus and not shared else 1
print(probe(ranks, nodes=nodes, shared=shared).model_dump_json())
print(int(torch_multicast() and not shared))
"""
_PROBE_TIMEOUT_S = 60.0  # a cold driver takes a few seconds


def mode(engine: str, environ: Mapping[str, str]) -> str:
    """``FUSEWISE_VLLM`` and its like: ``cap`` (default), ``full`` or ``off``.

    Raises:
        InputError: anything else.
    """
    name = f"FUSEWISE_{engine.upper()}"
    asked = environ.get(name, "cap")
    if asked not in MODES:
        raise InputError(name, expected=", ".join(MODES), got=repr(asked))
    return asked


def explicit_cap(environ: Mapping[str, str], flag: str | None = None) -> ExplicitCap | None:
    """The cap of a flag, else of ``FUSEWISE_CAP``, with the level it came from.

    Raises:
        InputError: not a size.
    """
    if flag is not None:
        return ExplicitCap(parse_size(flag), "flag")
    named = environ.get("FUSEWISE_CAP")
    if not named:
        return None
    try:
        return ExplicitCap(parse_size(named), "environment")
    except InputError as error:
        raise error.about("FUSEWISE_CAP") from error


@dataclass(frozen=True)
class Found:
    """A profile for this node, or none, with the words for the log."""

    profile: Profile | None = None
    level: Level = "engine default"
    where: str = ""

    def source(self, decision: CapDecision) -> str:
        """Who a cap comes from."""
        from_profile = decision.origin in ("measured", "published")
        return self.where if from_profile else f"by {decision.level}, {self.where}"


def profile_here(node: Fingerprint, dtype: DType, log: logging.Logger) -> Found:
    """The node's profile; one that is asked for and cannot be used is a warning."""
    try:
        found = find_profile(node, dtype)
    except FusewiseError as error:
        log.warning("fusewise: %s", error)
        return Found(where="the profile asked for cannot be used")
    for note in found.notes:
        log.warning("fusewise: %s", note)
    where = found.where if found.profile is None else f"{found.level} {found.where}"
    return Found(found.profile, found.level, where)


def probe_apart(world_size: int) -> Fingerprint:
    """The node's fingerprint, probed in a process of its own.

    Raises:
        UnavailableError: the probe failed or did not end within a minute.
    """
    return _probed(world_size)[0]


def torch_multicast_apart(world_size: int) -> bool:
    """Whether torch's symmetric memory, hence an engine's, has multicast here; probed likewise.

    Raises:
        UnavailableError: as ``probe_apart``.
    """
    return _probed(world_size)[1]


@functools.lru_cache(maxsize=8)
def _probed(world_size: int) -> tuple[Fingerprint, bool]:
    command = [sys.executable, "-c", _PROBE, str(world_size)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise UnavailableError("the node could not be probed", got=str(error)) from error
    node, multicast = done.stdout.splitlines()[-2:]
    return Fingerprint.model_validate_json(node), multicast == "1"
