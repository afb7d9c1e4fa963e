"""fusewise: all_reduce → + residual → RMSNorm, the fastest way at every message size.

Names are imported when they are first used: reading a profile never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusewise.backends.native.fp8 import Fp8 as Fp8
    from fusewise.errors import FusewiseError as FusewiseError
    from fusewise.graph.api import compile as compile
    from fusewise.graph.api import fusion_pass as fusion_pass
    from fusewise.profiles.plan import derive as derive
    from fusewise.profiles.schema import Profile as Profile
    from fusewise.profiles.store import load as load
    from fusewise.run.operators import Communicator as Communicator
    from fusewise.shape import Shape as Shape

__version__ = "0.1.0"

_HOMES = {
    "Communicator": "fusewise.run.operators",  # brings the torch operators along
    "Fp8": "fusewise.backends.native.fp8",
    "FusewiseError": "fusewise.errors",
    "Profile": "fusewise.profiles.schema",
    "Shape": "fusewise.shape",
    "compile": "fusewise.graph.api",
    "derive": "fusewise.profiles.plan",
    "fusion_pass": "fusewise.graph.api",
    "load": "fusewise.profiles.store",
}

__all__ = [
    "Communicator",
    "Fp8",
    "FusewiseError",
    "Profile",
    "Shape",
    "__version__",
    "compile",
    "derive",
    "fusion_pass",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fusewise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
