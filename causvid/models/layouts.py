"""Names and shapes of one network's weights in two layouts, and moving weights between them without loss.

A ``Link`` says which tensors of a file make one of ours: they are joined along the first axis and reshaped, or, on the
way back, split and reshaped. Values are never computed with, so both ways are exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from causvid import ranks
from causvid.errors import UserError
from causvid.tensor_files import TensorFiles

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Link:
    """One tensor of ours, and the tensors of a file that make it.

    Attributes:
        ours: name in our module.
        theirs: names in the file, in the order in which they are joined along the first axis.
        shape: shape of each of them in the file.
        our_shape: shape in our module.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    our_shape: tuple[int, ...]

    def join(self, read: Callable[[str], Tensor]) -> Tensor:
        """Our tensor, from those of the file."""
        parts = [read(name) for name in self.theirs]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return whole.reshape(self.our_shape)

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The file's tensors, from ours; copies, so that they can be written apart."""
        for name, part in zip(self.theirs, tensor.chunk(len(self.theirs)), strict=True):
            yield name, part.reshape(self.shape).clone(memory_format=torch.contiguous_format)

    def carried(self, target: Link, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a file under the names of another layout's link to the same tensor of ours.

        Each keeps its own type, except where several of different types become one, which takes a type that holds all.
        """
        if len(self.theirs) != len(target.theirs):
            yield from target.split(self.join(read))
            return
        for name, theirs in zip(self.theirs, target.theirs, strict=True):
            yield theirs, read(name).reshape(target.shape).clone(memory_format=torch.contiguous_format)

    def prefixed(self, prefix: str) -> Link:
        """The link to a file that puts a prefix before every name."""
        return Link(self.ours, tuple(prefix + name for name in self.theirs), self.shape, self.our_shape)


def same(shapes: dict[str, tuple[int, ...]]) -> tuple[Link, ...]:
    """Links of a layout that is our own."""
    return tuple(Link(name, (name,), shape, shape) for name, shape in shapes.items())


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's weights; one that is used twice counts once."""
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def check(links: Sequence[Link], files: TensorFiles, what: str) -> None:
    """Compare a file with what is wanted of it.

    Raises:
        UserError: missing, unknown, wrong-shaped or wrong-typed tensors, all in one message.
    """
    wanted = {name: link.shape for link in links for name in link.theirs}
    problems = [f"missing {name}" for name in wanted if name not in files.shapes]
    problems += [f"unknown {name}" for name in files.shapes if name not in wanted]
    for name, shape in wanted.items():
        if files.shapes.get(name, shape) != shape:
            problems.append(f"{name} has shape {files.shapes[name]}, expected {shape}")
        elif files.dtypes.get(name, torch.float32) not in FLOATS:
            problems.append(f"{name} has type {files.dtypes[name]}, expected one of {', '.join(map(str, FLOATS))}")
    if problems:
        raise UserError(f"{files.path} does not fit {what}: {'; '.join(by_block(problems))}")


def by_block(problems: Sequence[str]) -> list[str]:
    """All problems; those that differ in nothing but the number of a block are told once, with the numbers."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for problem in problems:
        number = re.search(r"\bblocks\.(\d+)\.", problem)
        pattern = problem if number is None else problem[: number.start(1)] + "*" + problem[number.end(1) :]
        groups.setdefault(pattern, []).append((problem, number[1] if number else ""))
    return [
        first + (f" (and so in blocks {', '.join(number for _, number in others)})" if others else "")
        for (first, _), *others in groups.values()
    ]


def widest(files: TensorFiles) -> torch.dtype:
    """The most precise type among a file's tensors."""
    return min(set(files.dtypes.values()), key=lambda dtype: (torch.finfo(dtype).eps, FLOATS.index(dtype)))


def fill(
    module: nn.Module,
    links: Sequence[Link],
    files: TensorFiles,
    what: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Give a module that was built on the meta device its weights, one tensor at a time, in place.

    Args:
        module: a module on the meta device, of any type.
        links: one for each of its parameters.
        files: where the weights are.
        what: what the file is expected to hold, for messages.
        dtype: type of the module's weights; default the file's own, the most precise of them.
        device: where they are put.

    Raises:
        UserError: see :func:`check`; the module is then as it was.
    """
    check(links, files, what)
    # Past what libraries put in place of this method: their warnings are about casting values, and there are none yet.
    nn.Module.to(module, dtype or widest(files)).to_empty(device=device)
    # By the names of the state, which those of wrapped parts are not in.
    parameters = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for link in links:
            parameter = parameters[link.ours]
            if hasattr(parameter, "full_tensor"):  # a shard: each process takes its part of the whole
                parameter.copy_(ranks.part(link.join(files.read).to(parameter.dtype), parameter))
                continue
            for name, part in zip(link.theirs, parameter.chunk(len(link.theirs)), strict=True):
                part.copy_(files.read(name).reshape(part.shape))
    return module
