"""What of a profile counts on a node. Pure; reads nothing, and decides no precedence.

A profile is of a node: GPU, ranks, links, multicast, dtype. Other versions do not silence it; what
differs is said. Samples of our own kernels count only for the sources they were measured with.
"""

from __future__ import annotations

from fusewise.node import SOFTWARE, Fingerprint
from fusewise.operation import backend_of
from fusewise.profiles.schema import Profile


def as_it_counts(
    profile: Profile, node: Fingerprint, where: str
) -> tuple[Profile | None, list[str]]:
    """The profile less what does not count here, and a line for each difference.

    None: it holds nothing but other kernels' samples. ``where`` names it in the lines.
    """
    kept: Profile | None = profile
    notes = []
    ours = sorted(path.name for path in profile.paths if path.provider == "native")
    if ours and profile.fingerprint.kernels != node.kernels:
        kept = profile.without({backend_of(name) for name in ours})
        notes.append(f"{where}: {', '.join(ours)} left out, measured with other sources of theirs")
    differing = software_differences(profile, node)
    if kept is not None and differing:
        notes.append(f"{where} applies although {'; '.join(differing)}")
    return kept, notes


def software_differences(profile: Profile, node: Fingerprint) -> list[str]:
    """Differing versions. A published profile that names no version does not differ in it."""
    mark = profile.fingerprint
    known = tuple(name for name in SOFTWARE if getattr(mark, name) is not None)
    fields = known if profile.provenance.origin == "published" else SOFTWARE
    return mark.differences(node, fields)
