"""One judgement of a folder from beginning to end: who can judge, the rows, and the files that are left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from causvid import weights
from causvid.eval import judges, judging, results, sampling
from causvid.eval.clips import Policy
from causvid.eval.suites import Prompt


def evaluate(
    folder: Path,
    prompts: Sequence[Prompt],
    out: Path,
    policy: Policy,
    per_prompt: int,
    names: Sequence[str] | None = None,
    judges_folder: Path | None = None,
    others: Iterable[Path] = (),
    device: str = "cpu",
    show: Callable[[int, int], None] = lambda done, total: None,
    static_filter: int = 0,
) -> judging.Evaluation:
    """Judge a folder of videos and write ``rows.jsonl``, ``results.json``, ``upstream_eval_results.json`` into ``out``.

    Goes on where it was stopped. How the videos were sampled is read from ``sampling.json`` beside them.

    Args:
        judges_folder: weights of the reference judge; None: only what needs none is judged.
        static_filter: of how many videos a prompt temporal flickering is judged on the static ones; 0: no filter.
        others: rows of other judgements, whose answers to equal questions are taken over.

    Raises:
        UserError: nothing can be judged; or a dimension that ``names`` asks for can't.
    """
    judging.scan(folder, prompts, per_prompt, static_filter)  # refuses a folder that is none before anything is written
    with (
        results.Store(out / "rows.jsonl", others) as store,
        judges.judges(names, judges_folder, out / "judge.log", device, static_filter > 0) as (asked, unjudged),
    ):
        found = judging.judge_folder(
            folder,
            prompts,
            store,
            policy,
            per_prompt,
            asked,
            unjudged,
            sampling.recorded(folder),
            show,
            static_filter,
        )
    weights.write_json(out / "results.json", found.as_json())
    known = {name: score for name, score in found.scores.items() if score is not None}
    results.write_upstream(out / "upstream_eval_results.json", known, found.rows)
    return found
