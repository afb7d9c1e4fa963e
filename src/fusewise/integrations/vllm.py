"""``fusewise.integrations.vllm:register``, as checkouts before 0.1 installed it; goes with 0.2."""

from __future__ import annotations

import logging

from fusewise.engines.vllm import plugin


def register() -> None:
    """The plugin under its old name: says so in one line and does what it did."""
    logging.getLogger("vllm.plugins.fusewise").info(
        "fusewise: installed under an old name; reinstall fusewise to load %s", plugin.__name__
    )
    plugin.register()
