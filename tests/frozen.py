"""Imported last by the server that test ranks are forked from: what lives now is never garbage.

Without it every full collection of a rank walks all of torch. What Inductor makes once per process
is made here too, a second of each rank's first compilation.
"""

import gc
import sys

if "torch._inductor.compile_fx" in sys.modules:
    from torch._inductor.codecache import torch_key
    from torch._inductor.fx_passes.joint_graph import lazy_init

    torch_key()
    lazy_init()

gc.collect()
gc.freeze()
