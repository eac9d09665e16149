"""What CausVid released, by name: where it is, its layout, and where to put it when this machine has no network.

Sizes are computed and not measured: those of data from their layout, those of checkpoints from the parameters of
Wan2.1-T2V-1.3B, 4 bytes each, for their layout holds a generator in fp32. No checksums are published.
What is fetched is compared in size with the source, and checked by the step that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from causvid import progress
from causvid.data.folders import Folder
from causvid.data.pool import Refused
from causvid.data.sources import copied, settle, sha256
from causvid.data.tally import Tally
from causvid.errors import UserError
from causvid.registry import did_you_mean


@dataclass(frozen=True)
class Artefact:
    """A released file or folder.

    Attributes:
        address: its folder, as fsspec knows it.
        layout: what is in it, and which command reads it.
        size: of all its files, and how it is known.
        sha256: of its files, where known.
    """

    name: str
    address: str
    layout: str
    size: str
    sha256: Mapping[str, str] = field(default_factory=dict)


SECONDS = 24 * 3600.0  # for one file
DATA = "computed from its layout"
CHECKPOINT = "about 5.7 GB (computed: 1.42 billion parameters in fp32, one generator; more if it holds anything else)"
REPOSITORY = "hf://tianweiy/CausVid"
ARTEFACTS = {
    each.name: each
    for each in (
        Artefact(
            "causvid-ode-pairs", f"{REPOSITORY}/mixkit_ode_lmdb",
            "LMDB: latents_shape 'n 4 21 16 60 104', latents_N_data fp16, prompts_N_data; "
            "'causvid data pack IT OUT --times 1,0.7568,0.5217,0' makes a store of it",
            f"about 25 GB ({DATA})",
        ),
        Artefact(
            "causvid-latents", f"{REPOSITORY}/mixkit_latents_lmdb",
            "LMDB: latents_shape 'n 21 16 60 104', latents_N_data fp16, prompts_N_data; "
            "'causvid data pack IT OUT' makes a store of it",
            f"about 27 GB ({DATA})",
        ),
        Artefact(
            "causvid-ode-checkpoint", f"{REPOSITORY}/wan_causal_ode_checkpoint_model_003000",
            "model.pt: 'generator', keys of the original Wan2.1 behind 'model.'", CHECKPOINT,
        ),
        Artefact(
            "causvid-causal-checkpoint", f"{REPOSITORY}/autoregressive_checkpoint",
            "model.pt: 'generator', keys of the original Wan2.1 behind 'model.'", CHECKPOINT,
        ),
        *(
            Artefact(
                f"causvid-bidirectional-checkpoint-{n}", f"{REPOSITORY}/bidirectional_checkpoint{n}",
                "model.pt: 'generator', keys of the original Wan2.1 behind 'model.'", CHECKPOINT,
            )
            for n in (1, 2)
        ),
    )
}  # fmt: skip


def fetch(name: str, target: str) -> Tally:
    """Copy a released artefact into a folder; files that are there in full are not copied again.

    Returns:
        Counts of its files.

    Raises:
        UserError: no such artefact, or it can't be fetched; the message says where to put it by hand.
    """
    if name not in ARTEFACTS:
        raise UserError(f"no released artefact '{name}'{did_you_mean(name, ARTEFACTS)}; known: {', '.join(ARTEFACTS)}")
    artefact, place = ARTEFACTS[name], Folder(target)
    try:
        source = Folder(artefact.address)
        sizes = source.sizes()
        if not sizes:
            raise UserError(f"{artefact.address} is not there, or empty")
        place.clear_partials()
        tally, there, unproven = Tally(len(sizes)), place.sizes(), 0
        for file, size in sizes.items():
            known = artefact.sha256.get(file)
            if there.get(file) == size and known in (None, sha256((place, file)) if known else None):
                unproven += known is None
                tally.skipped += 1
                continue
            with copied(source, file, place, file, SECONDS) as copy:
                settle(copy, place, file)
            tally.done += 1
        if unproven:
            progress.say(
                f"{place}: {unproven} of {len(sizes)} files were there and known by size alone: no digest is known"
            )
    except (UserError, Refused) as error:
        raise UserError(
            f"{name} can't be fetched: {error}. By hand: copy what {artefact.address} holds to {place}/. "
            f"It is {artefact.layout}. Size: {artefact.size}"
        ) from error
    return tally
