"""Clips and captions to latents and text embeddings: one ``latents/ID.safetensors`` per clip, as ``pack`` takes them.

Works with any codec and text encoder. How they were made stands in ``recipe.json``, and a folder of one codec never
takes latents of another. Several processes share the work by rank; each file holds its own checksum.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from causvid import progress
from causvid.data import manifest
from causvid.data.clips import all_frames
from causvid.data.folders import Folder, told
from causvid.data.latents import as_stored
from causvid.data.manifest import Clip, Given
from causvid.data.pool import Halt, Pool, Unread, stay_with_parent
from causvid.data.rows import Row, canonical, pack_row, trimmed
from causvid.data.sources import origin
from causvid.data.steps import each
from causvid.data.tally import Tally
from causvid.errors import UserError
from causvid.types import Codec, TextEncoder

TEXT, DATA, SUM, ORIGIN = "text", "latents", "checksum", "origin"
# Until the store answers: torchrun's own was there before its processes; where the first of them has it, that one may
# still be loading its weights.
PATIENCE, PATIENCE_WITH_THE_FIRST = timedelta(minutes=1), timedelta(minutes=30)


def recipe(identity: Mapping[str, Any], text_encoder: TextEncoder) -> dict[str, Any]:
    """How a folder of latents is made: the identities of codec and text encoder, and the empty prompt's embeddings."""
    empty = text_encoder.encode([""]).embeddings[0].float()
    return {
        "step": "encode", **identity, "text_length": empty.shape[0], "text_dim": empty.shape[1],
        "unconditional": trimmed(empty.numpy()).tolist(),
    }  # fmt: skip


def to_file(row: Row, origin: Mapping[str, str] | None = None) -> bytes:
    """A row as a safetensors file with its key, facts and checksum.

    Args:
        origin: what tells the clip's file from another at its place, kept beside the row and no part of it.
    """
    index, _ = pack_row(row)
    text = canonical({"key": row.key, "facts": row.facts}).decode()
    return save(dict(row.arrays), {"row": text, SUM: index[:16].hex(), ORIGIN: canonical(origin).decode()})


def _told(content: bytes) -> dict[str, str]:
    """What the head of a safetensors file says beside its tensors."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def from_file(content: bytes) -> Row:
    """The row of such a file.

    Raises:
        ValueError: it is not whole, or not one of these.
    """
    try:
        arrays = load(content)
        facts = _told(content)
        said = json.loads(facts["row"])
        row = Row(str(said["key"]), arrays, dict(said["facts"]))
        expected = facts[SUM]
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"is not a whole file of latents: {str(error)[:200]}") from error
    if pack_row(row)[0][:16].hex() != expected:
        raise ValueError("is damaged: its checksum is wrong")
    return row


def encode(
    source: str,
    target: str,
    codec: Codec,
    text_encoder: TextEncoder,
    identity: Mapping[str, Any],
    rank: int = 0,
    world: int = 1,
    workers: int = 1,
    seconds: float = 300.0,
    root: str | None = None,
) -> Tally | None:
    """Encode every clip of a manifest, or this process's share of it.

    Args:
        source: a manifest or a folder of clips.
        target: folder for the latents.
        codec, text_encoder: what encodes.
        identity: what they are, in plain data; latents of another identity are refused the folder.
        rank, world: this process's number among how many; it takes every ``world``-th clip.
        workers: processes that decode ahead.
        seconds: how long decoding one clip may take.
        root: what the manifest's paths are relative to; by default its own folder.

    Returns:
        Counts of this process; under torchrun those of all on the first, and None on the others.
    """
    store = _torchrun() if world > 1 and torch.distributed.is_torchelastic_launched() else None
    manifest.apart_from(source, target)
    given = manifest.read(source, root)
    output = Folder(target)
    output.claim(recipe(identity, text_encoder))
    there = output.sizes()
    share = given.clips[rank::world]
    tally = Tally(len(share))
    if rank == 0:  # what has no clip belongs to the first
        given.tell()
        _tell_others(output, there, given)
        tally.given, tally.skipped = len(share) + len(given.refused) + given.duplicates, given.duplicates
        for name, reason in given.refused:
            tally.put_aside(name, reason)
    todo, before = [], {clip.id: _origin(given, clip, seconds) for clip in share}
    for clip in share:
        if clip.start is not None or clip.end is not None:
            _put_aside(tally, clip, "is a part of a film (start, end); 'causvid data process' cuts it", output, there)
        elif _name(clip) in there and _same(output, clip, before[clip.id]):
            tally.skipped += 1
        else:
            todo.append(clip)
    with progress.bar("encode", tally.given) as show, Pool(workers, seconds) as pool:
        for clip, ok, result in each(given, todo, pool, all_frames, lambda _, path: (path,)):
            row = _row_or_reason(clip, result, codec, text_encoder) if ok else result
            if isinstance(row, Exception):  # which says nothing of the clip: what is there stays
                tally.put_aside(clip.path, str(row))
            elif isinstance(row, str):
                _put_aside(tally, clip, row, output, there)
            else:
                output.write(_name(clip), to_file(row, before[clip.id]))
                tally.done += 1
            show(tally.done + tally.skipped + len(tally.quarantine))
    if store is not None:
        return _of_all(tally, output, rank, world, store)
    tally.write(output, "quarantine.jsonl" if world == 1 else f"quarantine-{rank}-of-{world}.jsonl")
    return tally


def _torchrun() -> Store:
    """torchrun's store, by which processes find each other; from here on this process ends when torchrun is killed.

    Raises:
        UserError: torchrun is gone already.
    """
    parent = os.getppid()
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        found = rendezvous("env://", timeout=PATIENCE if own else PATIENCE_WITH_THE_FIRST)
        store, _, _ = next(found)
    except RuntimeError as error:
        raise UserError(f"torchrun can't be reached ({str(error)[:200]}); run the same command again") from error
    # It answered after the number was read, so the number is torchrun's, and not that of who adopts an orphan. (Of
    # several machines this is true on the one whose torchrun has the store.)
    stay_with_parent(parent)
    return store


def _of_all(tally: Tally, output: Folder, rank: int, world: int, store: Store) -> Tally | None:
    """The counts of all processes of torchrun, on the first; none ends before all are done, as that stops the rest."""
    parts: list[Any] = [None] * world
    long = timedelta(days=30)
    store.set_timeout(long)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=long)
    torch.distributed.all_gather_object(parts, tally)
    torch.distributed.destroy_process_group()
    if rank > 0:
        return None
    whole = Tally.of(parts)
    whole.write(output)
    return whole


def _tell_others(output: Folder, there: Mapping[str, int], given: Given) -> None:
    mine = {_name(clip) for clip in given.clips}
    others = [name for name in there if name.startswith("latents/") and name not in mine]
    if others:
        progress.say(
            f"{output}: {len(others)} files of latents are of clips that INPUT does not give, as {others[0]}; "
            "'causvid data pack' takes them too: delete those that are not wanted"
        )


def _put_aside(tally: Tally, clip: Clip, reason: str, output: Folder, there: Mapping[str, int]) -> None:
    """Put a clip aside; latents of what it was before go, as they would be packed."""
    if _name(clip) in there:
        with told(f"{output}/{_name(clip)}"):
            output.fs.rm_file(output.join(_name(clip)))
    tally.put_aside(clip.path, reason)


def _row_or_reason(clip: Clip, frames: np.ndarray, codec: Codec, text_encoder: TextEncoder) -> Row | str | Unread:
    try:
        return row_of(clip, frames, codec, text_encoder)
    except torch.OutOfMemoryError as error:
        return Unread(f"the device is out of memory: {error}")
    except torch.AcceleratorError as error:  # every later clip would fail as well
        raise Halt(f"the device failed at clip {clip.path}: {error}; run the same command again") from error
    except (ValueError, RuntimeError) as error:  # a codec's complaint about shapes is often a RuntimeError
        return str(error)


def _name(clip: Clip) -> str:
    return f"latents/{clip.id}.safetensors"


def _origin(given: Given, clip: Clip, seconds: float) -> dict[str, str] | None:
    """What tells a clip's file from another at its place, where its row has no SHA-256 that does."""
    return origin(given, clip, seconds) if clip.sha256 is None else None


def _same(output: Folder, clip: Clip, now: Mapping[str, str] | None) -> bool:
    """Whether a whole file of this very clip is there; a source that is gone makes no difference."""
    try:
        content = output.read(_name(clip))
        same = from_file(content).facts == facts_of(clip)
        return same and (now is None or json.loads(_told(content).get(ORIGIN, "null")) == now)
    except ValueError:
        return False


def facts_of(clip: Clip) -> dict[str, Any]:
    return {"caption": clip.caption, "source": {"path": clip.path, "sha256": clip.sha256}}


@torch.no_grad()
def row_of(clip: Clip, frames: np.ndarray, codec: Codec, text_encoder: TextEncoder) -> Row:
    """Latents ``f c h w`` (fp16) and text ``l d`` of a clip's frames, ``f h w 3`` uint8.

    Raises:
        ValueError: frames that the codec does not take, a caption that the encoder does not, or numbers beyond fp16.
    """
    pixels = rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "f h w c -> 1 f c h w").float() / 127.5 - 1
    codec.latent_frames(pixels.shape[1])
    latents = codec.encode(pixels)[0].to("cpu", torch.float16)
    text = as_stored(text_encoder.encode([clip.caption]).embeddings[0])
    if not (torch.isfinite(latents).all() and np.isfinite(text).all()):
        raise ValueError("its latents or its text are not finite in fp16")
    return Row(clip.id, {DATA: latents.contiguous().numpy(), TEXT: text}, facts_of(clip))
