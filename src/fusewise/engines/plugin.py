"""What the plugins of all engines share: their switch, the explicit cap, a probe that is safe.

Never imports torch or an engine, and never touches the driver in the calling process: engines fork
their workers, and a process whose parent has initialised CUDA cannot use it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Mapping

from fusewise.engines.cap import ExplicitCap
from fusewise.errors import InputError, UnavailableError
from fusewise.node import Fingerprint
from fusewise.shape import parse_size

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
