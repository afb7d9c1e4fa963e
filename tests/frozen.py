"""Imported last by the server that test ranks are forked from: what lives now is never garbage.

Without it every full collection of a rank walks all of torch.
"""

import gc

gc.collect()
gc.freeze()
