"""Named components in typed groups.

``@register("loss", "dmd")`` above a class or function makes it available to specs by name. A name of the form
``package.module:Thing`` brings a component of the user's own without registering it. Names are unique in their group;
a second registration from another place is an error. Modules are imported when a group is first asked for, so that
``causvid --help`` imports no torch.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from causvid.errors import UserError

T = TypeVar("T", bound=Callable[..., Any])

# group -> modules that hold its built-in components
GROUPS: dict[str, tuple[str, ...]] = {
    "model": ("causvid.models.dit",),
    "codec": ("causvid.models.codecs", "causvid.models.wan_vae", "causvid.models.tiny_vae"),
    "text_encoder": ("causvid.models.text", "causvid.models.umt5"),
    "mask": ("causvid.attention.masks",),
    "position": ("causvid.attention.positions",),
    "cache": ("causvid.attention.cache",),
    "cache_policy": ("causvid.attention.policies",),
    "kernel": ("causvid.attention.kernels",),
    "init": ("causvid.models.init_schemes",),
    "teacher": ("causvid.models.teachers",),
    "loss": (
        "causvid.losses.flow",
        "causvid.losses.ode",
        "causvid.losses.dmd",
        "causvid.losses.gan",
        "causvid.losses.edits",
    ),
    "student_input": ("causvid.samplers.student_input",),
    "discriminator": ("causvid.models.discriminator",),
    "sampler": (
        "causvid.samplers.ode",
        "causvid.samplers.unipc",
        "causvid.samplers.few_step",
        "causvid.samplers.rollout",
    ),
    "dataset": ("causvid.data.shapes", "causvid.data.canvas", "causvid.data.latents"),
    "metric": ("causvid.eval.shapes_truth", "causvid.eval.memory", "causvid.eval.exact", "causvid.eval.proxies"),
    "suite": ("causvid.eval.benchmarks",),
    "dimension": ("causvid.eval.dimensions", "causvid.eval.exact", "causvid.eval.proxies"),
    "optimizer": ("causvid.optimizers",),
    "logger": ("causvid.training",),
    "monitor": ("causvid.stages.monitor",),
    "stage": (
        "causvid.stages.teacher",
        "causvid.stages.ode_pairs",
        "causvid.stages.ode_init",
        "causvid.stages.distill",
        "causvid.stages.sample",
        "causvid.stages.suites",
        "causvid.stages.evaluate",
        "causvid.stages.report",
    ),
}


class UnknownName(UserError):
    """A group or component that is not registered; the message lists what is."""


@dataclass(frozen=True)
class Component:
    """One registered class or function."""

    group: str
    name: str
    target: Callable[..., Any]

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.target) or "").split("\n", 1)[0]

    @property
    def where(self) -> str:
        """``path:line`` of the definition, the path relative to the package's parent where possible."""
        path = Path(inspect.getsourcefile(self.target) or "?")
        line = inspect.getsourcelines(self.target)[1]
        root = Path(__file__).parent.parent
        return f"{path.relative_to(root) if path.is_relative_to(root) else path}:{line}"

    @property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.target)


_COMPONENTS: dict[str, dict[str, Component]] = {group: {} for group in GROUPS}


def register(group: str, name: str) -> Callable[[T], T]:
    """Class or function decorator that names a component.

    Raises:
        UnknownName: no such group.
        ValueError: the name is taken by something else.
    """
    if group not in _COMPONENTS:
        raise UnknownName(f"no component group '{group}'{did_you_mean(group, GROUPS)}")

    def decorate(target: T) -> T:
        other = _COMPONENTS[group].get(name)
        if other and (other.target.__module__, other.target.__qualname__) != (target.__module__, target.__qualname__):
            raise ValueError(
                f"{group}.{name} is registered twice: {other.where} and {target.__module__}.{target.__qualname__}"
            )
        _COMPONENTS[group][name] = Component(group, name, target)
        return target

    return decorate


def components(group: str) -> Mapping[str, Component]:
    """Everything registered in a group, by name.

    Raises:
        UnknownName: no such group; the message lists the groups.
    """
    if group not in GROUPS:
        raise UnknownName(f"unknown group '{group}'{did_you_mean(group, GROUPS)}; groups: {', '.join(sorted(GROUPS))}")
    for module in GROUPS[group]:
        importlib.import_module(module)
    return dict(sorted(_COMPONENTS[group].items()))


def find(group: str, name: str) -> Component:
    """The component of that name, or the user's own for a name like ``package.module:Thing``.

    Raises:
        UnknownName: not registered (accepted names and the nearest one are listed), or not importable.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            target = getattr(importlib.import_module(module), attribute)
            inspect.signature(target)
        except Exception as error:  # whatever that module raises is for its author to read
            reason = f"{type(error).__name__}: {error}"
            hint = "; is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
            raise UnknownName(f"{group} '{name}' can't be imported: {reason}{hint}") from error
        return Component(group, name, target)
    known = components(group)
    if name not in known:
        raise UnknownName(f"unknown {group} '{name}'{did_you_mean(name, known)}; accepted: {', '.join(known)}")
    return known[name]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""
