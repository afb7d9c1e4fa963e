"""The options that ask about an engine on a node, as one bundle, with each engine's own.

Which engines there are, and which options they add, is the registry's. Starts without torch.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from fusewise.commands.options import (
    DTypeOption,
    ProfileOption,
    StrictOption,
    TpOption,
    dtype_of,
    this_node,
)
from fusewise.commands.output import tell
from fusewise.engines import registry
from fusewise.engines.base import Engine, EngineSettings, FlagValue
from fusewise.engines.cap import CapDecision, ExplicitCap, decide_cap
from fusewise.engines.plugin import explicit_cap
from fusewise.errors import InputError
from fusewise.node import torch_multicast
from fusewise.profiles.store import NAMED, Resolution

Command = TypeVar("Command", bound=Callable[..., Any])

_NAMES = ", ".join(registry.names())


@dataclass(frozen=True)
class Question:
    """Which profile, and which engine on its node. ``own``: the engine's own flags, those given."""

    profile: ProfileOption = None
    dtype: DTypeOption = None
    tp: TpOption = None
    engine: Annotated[str | None, typer.Option("--engine", help=f"The engine: {_NAMES}.")] = None
    version: Annotated[
        str | None,
        typer.Option(
            "--version", help="The engine's. Default: the installed one's, or the newest known."
        ),
    ] = None
    multicast: Annotated[
        bool | None,
        typer.Option("--multicast/--no-multicast", help="Whether NVLink multicast can be used."),
    ] = None
    cap: Annotated[
        str | None, typer.Option("--cap", help="An explicit cap; wins over everything.")
    ] = None
    strict: StrictOption = None
    own: Mapping[str, FlagValue] = field(default_factory=dict)

    def settings(self, found: Resolution) -> EngineSettings:
        """The engine on the profile's node, else on this one; flags win over its environment.

        Raises:
            InputError: an engine, version or flag that is not known, or a node without GPUs.
        """
        engine = registry.engine_named(self.engine)
        self._check_flags(engine)
        node = found.profile.fingerprint if found.profile else this_node(self.tp)
        if node.sm is None:
            raise InputError(
                "an engine's tables are about GPUs",
                expected="a profile of a GPU node",
                got=f"one of {node.device}",
                hint="Pass --profile nvidia-h200-tp8 to see the published one.",
            )
        if self.multicast is None and found.level not in NAMED:
            node = node.model_copy(update={"multicast": torch_multicast()})
        if self.multicast is not None:
            node = node.model_copy(update={"multicast": self.multicast})
        version, warning = engine.stand_in(self.version or engine.version())
        tell([warning] if warning else [])
        dtype = dtype_of(self.dtype, found.profile)
        return engine.settings(version, node, dtype, os.environ, self.own)

    @property
    def about_engine(self) -> bool:
        """Whether anything was asked that only an engine answers."""
        return bool(
            self.engine or self.version or self.cap or self.own or self.multicast is not None
        )

    def _check_flags(self, engine: Engine) -> None:
        others = [name for name in self.own if name not in {flag.name for flag in engine.flags}]
        if others:
            names = ", ".join(name.replace("_", "-") for name in others)
            raise InputError(
                f"{engine.name} has no option --{names}", hint="Name its engine with --engine."
            )
        for flag in engine.flags:
            value = self.own.get(flag.name)
            if flag.values and value is not None and value not in flag.values:
                known = " or ".join(flag.values)
                raise InputError(flag.declaration, expected=known, got=repr(value))

    def decide(
        self, found: Resolution, settings: EngineSettings, hidden_sizes: Sequence[int] = ()
    ) -> CapDecision:
        """The cap, with the level that answered; the smallest of those of some hidden sizes."""
        decide = functools.partial(
            decide_cap,
            found.profile,
            settings,
            explicit=self.explicit_cap(),
            profile_level=found.level,
        )
        decided = [decide(hidden_size=size) for size in hidden_sizes] or [decide()]
        return min(decided, key=lambda one: one.cap_bytes or 0)

    def explicit_cap(self) -> ExplicitCap | None:
        """Of ``--cap``, else of the environment."""
        return explicit_cap(os.environ, self.cap)

    @property
    def engine_name(self) -> str:
        """The engine asked about, or the default."""
        return registry.engine_named(self.engine).name


def asks(command: Command) -> Command:
    """Gives a command whose first parameter is a ``Question`` the options of one."""
    _, *rest = inspect.signature(command, eval_str=True).parameters.values()
    kinds = get_type_hints(Question, include_extras=True)
    shared = {one.name: (one.default, kinds[one.name]) for one in fields(Question)}
    del shared["own"]
    own = {
        name: (None, Annotated[kind, typer.Option(flag.declaration, help=flag.help)])
        for name, flag in registry.flags().items()
        for kind in [str | None if flag.values else bool | None]
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, keyword, default=default, annotation=kind)
        for name, (default, kind) in (shared | own).items()
    ]

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        flags = {name: value for name in own if (value := given.pop(name)) is not None}
        question = Question(**{name: given.pop(name) for name in shared}, own=flags)
        return command(question, **given)

    run.__annotations__ = {}  # typer reads the signature, and this for what it leaves open
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*(one.replace(kind=keyword) for one in rest), *options]
    )
    return run  # type: ignore[return-value]
