"""Imported last by the server that test ranks are forked from: what lives now is never garbage.

Without it every full collection of a rank walks all of torch. What Inductor makes once per process
is made here too, a second of each rank's first compilation; what Dynamo computes for logs that
nobody reads is left out, a twentieth of every compilation.
"""

import functools
import gc
import sys
from typing import Any

if "torch._inductor.compile_fx" in sys.modules:
    from torch._dynamo import bytecode_transformation, guards, symbolic_convert
    from torch._inductor.codecache import torch_key
    from torch._inductor.fx_passes.joint_graph import lazy_init

    torch_key()
    lazy_init()

    def _replace(module: Any, name: str, by: Any) -> None:
        if hasattr(module, name):  # another torch may have neither the name nor the cost
            setattr(module, name, by)

    # Names of functions for the log of traced calls, for which it tokenises whole files.
    _replace(symbolic_convert, "get_funcname", lambda filename, lineno: None)
    # How long guards take, behind flushed caches.
    _replace(guards, "profile_guard_manager", lambda *_: 0.0)
    # The bytecode of a function that is inlined, kept for the last 128; a model has more.
    _cleaned = getattr(bytecode_transformation, "_cached_cleaned_instructions", None)
    if hasattr(_cleaned, "__wrapped__"):
        _replace(
            bytecode_transformation,
            "_cached_cleaned_instructions",
            functools.cache(_cleaned.__wrapped__),
        )

gc.collect()
gc.freeze()
gc.set_threshold(50_000)  # as in the product's ranks: a tenth of every compilation
