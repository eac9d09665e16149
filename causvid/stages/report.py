"""The report: one self-contained page, ``report.html``, from everything the other stages wrote."""

from __future__ import annotations

from pathlib import Path

from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec


@register("stage", "report")
class Report:
    """Renders the page."""

    name = "report"

    def reads(self, spec: Spec) -> tuple[str, ...]:
        return tuple(key for key in spec.data if key not in ("runtime", "sweep"))

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        ode = ("ode_pairs", "ode_init") if spec["init"]["name"] == "ode" else ()
        return ("teacher", *ode, "distill", "sample_teacher", "sample", "evaluate")

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return ()

    def run(self, context: Context) -> None:
        raise NotImplementedError
