"""When is a result new? The identities of the recipe's stages, as the spec, files and sources around them change."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_spec

from causvid import experiment, fingerprint, runs, spec
from causvid.errors import UserError
from causvid.spec import Spec
from causvid.validate import Bound

JUDGED = {"evaluate", "report"}
AFTER_ODE = {"ode_init", "distill", "sample_start", "sample", *JUDGED}
AFTER = {
    "teacher": {"teacher", "ode_pairs", "sample_teacher", *AFTER_ODE},
    "ode_pairs": {"ode_pairs", *AFTER_ODE},
    "ode_init": AFTER_ODE,
    "distill": {"distill", "sample", *JUDGED},
    "samples": {"sample_teacher", "sample_start", "sample", *JUDGED},
    "rollouts": {"sample", *JUDGED},
    "evaluate": JUDGED,
    "report": {"report"},
    "nothing": set(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("identity")


def identities(folder, *overrides):
    return {node.name: node.identity for node in experiment.plan(spec.load(toy_spec(folder), overrides))}


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("model.dim=48", "teacher"),
        ("world.dataset.frames=15", "teacher"),
        ("seed=1", "teacher"),
        ("precision=bf16", "teacher"),
        ("teacher_training.batch=3", "teacher"),
        ("teacher_training.loss.shift=4.0", "teacher"),
        ("teacher=causal", "teacher"),
        ("causal.position=window_relative", "teacher"),
        ("ode_pairs.count=5", "ode_pairs"),
        ("causal.mask.block_frames=2", "ode_init"),
        ("student.steps=3", "ode_init"),
        ("ode_init.batch=3", "ode_init"),
        ("loss.guidance=1.25", "distill"),
        ("student.input=self_rollout", "distill"),
        ("distill.iterations=4", "distill"),
        ("evaluation.samples=4", "samples"),
        ("evaluation.rollout_factor=5", "rollouts"),
        ("evaluation.metrics=[shapes_truth, shapes_truth]", "evaluate"),
        ("about=other words", "report"),
        ("runtime.threads=2", "nothing"),
        ("runtime.device=auto", "nothing"),
        ("runtime.checkpoint_seconds=5", "nothing"),
        ("teacher_training.loss.shift=5", "nothing"),
    ],
)
def test_a_change_reaches_what_reads_it_and_what_follows(override, first, folder):
    before, after = identities(folder), identities(folder, override)
    assert {name for name in before if before[name] != after[name]} == AFTER[first]


def test_order_and_short_forms_do_not_matter(folder, tmp_path):
    (tmp_path / "other.yaml").write_text(
        f"ode_init: {{batch: 2}}\nbase: {toy_spec(folder)}\nteacher: {{name: bidirectional}}\n"
    )
    nodes = experiment.plan(spec.load(str(tmp_path / "other.yaml")))
    assert {node.name: node.identity for node in nodes if node.name != "report"} == {
        name: value for name, value in identities(folder).items() if name != "report"
    }


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(VALUES, VALUES)
def test_equal_text_is_equal_values(left, right):
    assert json.loads(runs.canonical(left)) == left
    if runs.canonical(left) == runs.canonical(right):
        assert left == right


class Reader:
    """A stage that reads one component."""

    name = "reader"

    def __init__(self, *files):
        self.files = files

    def reads(self, spec):
        return ("part",)

    def inputs(self, spec):
        return ()

    def outside(self, spec):
        return self.files

    def run(self, context):
        (context.folder / "ran").touch()


def node_of(name, *files):
    part = {"nested": [Bound("loss", {"name": name})]}
    return runs.graph(Spec("x", {"part": part}), {"reader": Reader(*files)}, "reader")[0]


PACKAGE = {
    "__init__.py": "constant = 1\n",
    "part.py": (
        "'''Doc.'''\nfrom .helper import scale\nfrom . import other\n\ndef thing():\n    '''Doc.'''\n    return scale\n"
    ),
    "helper.py": "scale = 2\n",
    "other.py": "import their_package.deep\n",
    "deep.py": "depth = 1\n",
    "unrelated.py": "x = 1\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    root = tmp_path / "their_package"
    root.mkdir()
    for name, text in PACKAGE.items():
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    forget()
    yield root
    for name in [name for name in sys.modules if name.startswith("their_package")]:
        del sys.modules[name]
    forget()


def forget():
    fingerprint._module_source.cache_clear()
    fingerprint._is_own.cache_clear()


@pytest.mark.parametrize(
    ("name", "old", "new", "changes"),
    [
        ("part.py", "return scale", "return 2 * scale", True),
        ("helper.py", "2", "3", True),
        ("deep.py", "1", "2", True),
        ("__init__.py", "1", "2", True),
        ("unrelated.py", "1", "2", False),
        ("part.py", "'''Doc.'''", "'''Other words,\nlonger.'''  # and a comment", False),
        ("part.py", "return scale", "return (\n        scale  # here\n    )", False),
    ],
)
def test_the_source_of_a_users_component_counts_with_what_it_imports(name, old, new, changes, package):
    before = node_of("their_package.part:thing").identity
    text = (package / name).read_text()
    assert old in text
    (package / name).write_text(text.replace(old, new))
    forget()
    assert (node_of("their_package.part:thing").identity != before) is changes


def test_a_component_without_source_is_refused():
    with pytest.raises(UserError, match="source of module"):
        node_of("math:sqrt")


def test_a_docstring_counts_for_nothing():
    plain, documented = (
        ast.dump(fingerprint.without_docstrings(ast.parse(text)))
        for text in ("def f():\n    return 1\n", "def f():\n    '''Words.'''\n    return 1\n")
    )
    assert plain == documented


@pytest.mark.parametrize(
    "content", ["[]", "3", "{}", '{"values": 3}', '{"values": {}, "sources": [], "files": 1}', "", "{"]
)
def test_a_damaged_record_of_another_result_is_passed_over(content, tmp_path):
    node = node_of("dmd")
    other = tmp_path / "reader" / "0123456789abcdef"
    other.mkdir(parents=True)
    (other / "DONE").write_text("{}")
    (other / "record.json").write_text(content)
    store = runs.Store(tmp_path)
    assert store.explain(node) in ("never run", "would run: ")
    assert store.execute([node], Spec("x", {}), print) == (["reader"], [])


def test_explain_compares_with_the_nearest_result_and_names_files(tmp_path):
    held = tmp_path / "weights.bin"
    store = runs.Store(tmp_path / "runs")
    for name, content in [("dmd", "1"), ("gan", "2")]:
        held.write_text(content)
        store.execute([node_of(name, held)], Spec("x", {}), print)
    held.write_text("3")
    assert store.explain(node_of("gan", held)) == "would run: file weights.bin changed"
    other = held.rename(tmp_path / "other.bin")
    told = store.explain(node_of("gan", other))
    assert told == "would run: file other.bin is read now; file weights.bin is no longer read"


def test_a_file_that_is_missing_is_told(tmp_path):
    with pytest.raises(UserError, match="can't be read"):
        node_of("dmd", tmp_path / "gone")


def test_a_folder_without_its_last_word_is_not_finished(tmp_path):
    store, node = runs.Store(tmp_path), node_of("dmd")
    store.execute([node], Spec("x", {}), print)
    assert store.done(node)
    (store.folder(node) / "DONE").unlink()
    assert not store.done(node) and store.explain(node).startswith("started, not finished")
    (store.folder(node) / "DONE").mkdir()
    assert not store.done(node)
    assert Path(store.folder(node) / "record.json").is_file()


def test_the_teacher_does_not_depend_on_losses_that_it_does_not_use(folder):
    nodes = {node.name: node.record["sources"] for node in experiment.plan(spec.load(toy_spec(folder)))}
    losses = {name for name in nodes["teacher"] if name.startswith("causvid.losses.")}
    assert losses == {"causvid.losses.flow"}
    assert not any(name.startswith("causvid.losses.") for name in nodes["sample"])


def test_the_sampler_of_the_student_counts_in_training_only_where_it_is_used_there(folder):
    for student_input, counts in (("data", False), ("self_rollout", True)):
        before, after = (
            identities(folder, f"student.input={student_input}", f"student.sampler.context_t={t}") for t in (0.0, 0.1)
        )
        assert (before["distill"] != after["distill"]) is counts and before["sample"] != after["sample"]


def test_the_cache_of_streams_counts_where_the_student_is_sampled(folder):
    before, after = identities(folder), identities(folder, "student.cache=full")
    assert {name for name in before if before[name] != after[name]} == {"sample_start", "sample", "evaluate", "report"}


def test_a_report_is_of_its_name_and_base(folder, tmp_path):
    """The page shows both: another spec of the same values has a page of its own, and nothing else."""
    (tmp_path / "named.yaml").write_text(f"base: {toy_spec(folder)}\n")
    before = identities(folder)
    after = {node.name: node.identity for node in experiment.plan(spec.load(str(tmp_path / "named.yaml")))}
    assert {name for name in before if before[name] != after[name]} == {"report"}


@pytest.mark.parametrize(
    ("name", "changes"), [("flat_helper.py", True), ("flat_library/deep.py", True), ("flat_unrelated.py", False)]
)
def test_modules_beside_a_users_flat_module_count_if_it_imports_them(name, changes, tmp_path, monkeypatch):
    (tmp_path / "flat_library").mkdir()
    texts = {
        "flat_part.py": "import json\nimport torch\nimport flat_helper\nfrom flat_library.deep import depth\n"
        "def thing():\n    return flat_helper.scale * depth\n",
        "flat_helper.py": "scale = 1\n", "flat_library/__init__.py": "", "flat_library/deep.py": "depth = 1\n",
        "flat_unrelated.py": "x = 1\n",
    }  # fmt: skip
    for path, text in texts.items():
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    forget()
    before = node_of("flat_part:thing")
    assert not any(found.split(".")[0] in ("torch", "json") for found in before.record["sources"])
    (tmp_path / name).write_text(texts[name].replace("1", "2"))
    forget()
    assert (node_of("flat_part:thing").identity != before.identity) is changes
    for module in [module for module in sys.modules if module.startswith("flat_")]:
        del sys.modules[module]
    forget()
