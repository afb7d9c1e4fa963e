"""A node's cap as a patch of vLLM's own table, ready to paste into a pull request. Pure.

vLLM's table knows the GPU's capability and the world size, not whether multicast works; the text
above the patch says on which node the number was found.
"""

from __future__ import annotations

import difflib
import re

from fusewise.engines.audit import Audit
from fusewise.engines.vllm.dispatch import VllmSettings, field_mb
from fusewise.errors import InputError
from fusewise.profiles.schema import Profile
from fusewise.shape import format_size

TABLE_FILE = "vllm/compilation/passes/fusion/allreduce_rms_fusion.py"
_TABLE = "FI_ALLREDUCE_FUSION_MAX_SIZE_MB"


def table_patch(source: str, settings: VllmSettings, cap_bytes: int) -> str:
    """A unified diff of vLLM's file with one number of its fusion table replaced.

    Args:
        source: the text of ``TABLE_FILE``.
        settings: whose capability and world size name the entry.
        cap_bytes: the new value.

    Raises:
        InputError: the table or the entry is not in the text, or holds that value already.
    """
    table = re.search(rf"^{_TABLE}\b.*?^}}", source, re.MULTILINE | re.DOTALL)
    row = table and re.search(rf"^    {settings.sm}: \{{.*?^    }}", table[0], re.M | re.S)
    entry = row and re.search(rf"^( +){settings.world_size}: [^\n]*$", row[0], re.M)
    if not (table and row and entry):
        raise InputError(
            f"no entry for sm_{settings.sm}, world size {settings.world_size} in {_TABLE}",
            hint=f"Give the folder that holds {TABLE_FILE}.",
        )
    mb = field_mb(cap_bytes)
    value = f"{mb:g}" if float(f"{mb:g}") == mb else repr(mb)
    line = f"{entry[1]}{settings.world_size}: {value},  # {value}MB"
    if line == entry[0]:
        raise InputError("vLLM's table holds this cap already", got=line.strip())
    start = table.start() + row.start() + entry.start()
    patched = source[:start] + line + source[start + len(entry[0]) :]
    return "".join(
        difflib.unified_diff(
            source.splitlines(keepends=True),
            patched.splitlines(keepends=True),
            f"a/{TABLE_FILE}",
            f"b/{TABLE_FILE}",
        )
    )


def evidence(result: Audit, profile: Profile, settings: VllmSettings) -> str:
    """What stands above the patch: the node, the measurements, and what they say."""
    mark = profile.fingerprint
    lines = [
        f"{mark.world_size}x {mark.device} (sm_{mark.sm}), {mark.fabric}, multicast "
        f"{'on' if mark.multicast else 'off'}, {profile.dtype}; {profile.provenance.origin}: "
        f"{profile.provenance.source}",
        f"torch {mark.torch or '?'}, FlashInfer {mark.flashinfer or '?'}, NCCL "
        f"{mark.nccl or '?'}, driver {mark.driver or '?'}",
        f"cap {_size(settings.cap_bytes())} -> {_size(result.cap.cap_bytes)}: {result.cap.why}",
        "delta = unfused - fused, us; above 0 fusing wins",
        "",
        "| hidden | tokens | size | fused | us | unfused | us | delta |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.hidden_size} | {row.num_tokens} | {format_size(row.message_bytes)} | "
        f"{row.fused_path} | {row.fused_us:.1f} | {row.unfused_path} | {row.unfused_us:.1f} | "
        f"{row.delta_us:+.2f} |"
        for row in result.rows
        if row.fused_us is not None and row.unfused_us is not None and row.delta_us is not None
    ]
    lines += ["", f"Compared with the dispatch of vLLM {settings.tables.read_in}.", ""]
    return "\n".join(lines)


def _size(size_bytes: int | None) -> str:
    return "none" if size_bytes is None else format_size(size_bytes)
