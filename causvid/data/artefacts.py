"""What CausVid released, by name: where it is, its layout, and where to put it when this machine has no network.

Sizes of data are computed from their layout; those of checkpoints were not measured, and no checksums are published.
What is fetched is compared in size with the source, and checked by the step that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from causvid.data.folders import Folder, told
from causvid.data.tally import Tally
from causvid.errors import UserError
from causvid.registry import did_you_mean


@dataclass(frozen=True)
class Artefact:
    """A released file or folder.

    Attributes:
        address: its folder, as fsspec knows it.
        layout: what is in it, and which command reads it.
    """

    name: str
    address: str
    layout: str


REPOSITORY = "hf://tianweiy/CausVid"
ARTEFACTS = {
    each.name: each
    for each in (
        Artefact(
            "causvid-ode-pairs", f"{REPOSITORY}/mixkit_ode_lmdb",
            "LMDB of about 25 GB: latents_shape 'n 4 21 16 60 104', latents_N_data fp16, prompts_N_data; "
            "'causvid data pack IT OUT --times 1,0.7568,0.5217,0' makes a store of it",
        ),
        Artefact(
            "causvid-latents", f"{REPOSITORY}/mixkit_latents_lmdb",
            "LMDB of about 27 GB: latents_shape 'n 21 16 60 104', latents_N_data fp16, prompts_N_data; "
            "'causvid data pack IT OUT' makes a store of it",
        ),
        Artefact(
            "causvid-ode-checkpoint", f"{REPOSITORY}/wan_causal_ode_checkpoint_model_003000",
            "model.pt: 'generator', keys of the original Wan2.1 behind 'model.'",
        ),
        Artefact(
            "causvid-causal-checkpoint", f"{REPOSITORY}/autoregressive_checkpoint",
            "model.pt: 'generator', keys of the original Wan2.1 behind 'model.'",
        ),
        *(
            Artefact(
                f"causvid-bidirectional-checkpoint-{n}", f"{REPOSITORY}/bidirectional_checkpoint{n}",
                "model.pt: 'generator', keys of the original Wan2.1 behind 'model.'",
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
    artefact, place = ARTEFACTS[name], Path(target)
    try:
        source = Folder(artefact.address)
        sizes = source.sizes()
        if not sizes:
            raise UserError(f"{artefact.address} is not there, or empty")
        tally = Tally(len(sizes))
        for file, size in sizes.items():
            path = place / file
            if path.is_file() and path.stat().st_size == size:
                tally.skipped += 1
                continue
            with told(str(path)):
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f".{path.name}.partial")
                source.fs.get_file(source.join(file), str(partial))
                partial.replace(path)
            tally.done += 1
    except UserError as error:
        raise UserError(
            f"{name} can't be fetched: {error}. By hand: copy what {artefact.address} holds to {place}/. "
            f"It is {artefact.layout}"
        ) from error
    return tally
