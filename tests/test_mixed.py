"""Pictures and videos of several shapes, together from files to an update of the teacher and of the student."""

from __future__ import annotations

import json

import pytest
import torch
from toy import toy_spec
from typer.testing import CliRunner
from videos import levels, turned, video

from causvid import checks, cli, experiment, runs, spec
from causvid.build import World
from causvid.data import pack as packing
from causvid.data import steps
from causvid.data.clips import Wanted, png
from causvid.data.encode import encode
from causvid.data.latents import load
from causvid.errors import UserError
from causvid.models.codecs import TimeFold
from causvid.models.text import Words

WANTED = Wanted(16, 24, 5, 10, also=((24, 16),), pictures=True)
IDENTITY = {"codec": {"name": "time_fold", "frames": 2}, "text_encoder": {"name": "words", "dim": 4, "length": 6}}
WIDE, TALL, PICTURE = (3, 6, 16, 24), (3, 6, 24, 16), (1, 6, 16, 24)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of 4 wide and 2 tall videos and 3 wide pictures, and the counts of each step."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "raw").mkdir()
    wide = video(levels(20, 32, 48))
    for name, content in {
        **{f"wide{n}.mp4": wide for n in range(4)}, "tall0.mp4": video(levels(20, 48, 32)),
        "tall1.mp4": turned(wide, 90),
        **{f"picture{n}.png": png(levels(4, 32, 48)[n]) for n in range(3)}, "long.png": png(levels(1, 16, 96)[0]),
    }.items():  # fmt: skip
        (folder / "raw" / name).write_bytes(content)
    tallies = [steps.process(str(folder / "raw"), str(folder / "clips"), WANTED, workers=1)]
    tallies.append(encode(str(folder / "clips"), str(folder / "latents"), TimeFold(2), Words((), 4, 6), IDENTITY))
    tallies.append(packing.pack(str(folder / "latents"), str(folder / "store")))
    return folder, [tally.as_json() for tally in tallies]


def test_each_clip_takes_the_size_most_like_it(made):
    folder, tallies = made
    assert tallies[0] == {"given": 10, "done": 9, "skipped": 0, "quarantined": 1}
    assert tallies[1:] == [{"given": 9, "done": 9, "skipped": 0, "quarantined": 0}] * 2
    (listed,) = (folder / "clips" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(listed) == {"clip": "long.png", "reason": "its aspect ratio 6.00 is more than 2 times off 1.50"}


def test_a_second_run_does_nothing(made):
    again = steps.process(str(made[0] / "raw"), str(made[0] / "clips"), WANTED, workers=1)
    assert again.as_json() == {"given": 10, "done": 0, "skipped": 9, "quarantined": 1}


@pytest.mark.parametrize("sizes", ["16", "16x", "16x24,", "x24", "15x24", "99999x2"])
def test_sizes_are_even_numbers_with_an_x_between(sizes, tmp_path):
    (tmp_path / "raw").mkdir()
    found = CliRunner().invoke(
        cli.app, ["data", "process", str(tmp_path / "raw"), str(tmp_path / "out"), "--also", sizes]
    )
    # a comma at the end is harmless: then there is no clip in the folder
    assert ("holds no clips" if sizes.endswith(",") else "also: expected sizes as in" if sizes in ("16", "16x", "x24")
            else "height and width: even") in str(found.exception)  # fmt: skip


def test_without_the_option_pictures_are_too_short(made, tmp_path):
    tally = steps.process(str(made[0] / "raw"), str(tmp_path / "out"), Wanted(16, 24, 5, 10, aspect=4), workers=1)
    assert sorted(row["clip"] for row in tally.quarantine) == ["long.png", *(f"picture{n}.png" for n in range(3))]
    assert "has 1 frames at 10 fps; 5 are wanted" in str(tally.quarantine)


def test_the_loader_gives_batches_of_one_shape_and_every_row(made):
    batches = [latents for latents, _, _ in load(str(made[0] / "store"), 2, image_batch=3, stop=4)]
    assert sorted(tuple(each.shape) for each in batches) == [(2, *WIDE), (2, *WIDE), (2, *TALL), (3, *PICTURE)]


def options(folder, group=2):
    return [
        f"world.dataset={{name: store, path: {folder / 'store'}, shape: {list(WIDE)}, "
        f"also: [{list(TALL)}, {list(PICTURE)}], group: {group}}}",
        "world.text_encoder={name: words, dim: 4, length: 6}", "model.patch=[8, 8]",
    ]  # fmt: skip


def test_samples_of_a_group_have_one_shape_however_they_are_asked_for(made, tmp_path):
    world = World(spec.load(toy_spec(tmp_path), options(made[0])))
    shapes = [world.batch(range(2 * n, 2 * n + 2))[0].shape[1:] for n in range(5)]
    assert sorted(set(shapes)) == sorted([PICTURE, TALL, WIDE]) and len(shapes) == 5
    for number in range(10):  # one by one as in pairs: a share of a batch is the same on any number of ranks
        pair = world.batch(range(number // 2 * 2, number // 2 * 2 + 2))[0]
        assert torch.equal(world.batch([number])[0][0], pair[number % 2])
    assert world.batch(range(4), "test")[0].shape[1:] == WIDE
    with pytest.raises(UserError, match="a batch of 3 samples lies in several groups of 2; give a multiple of every"):
        world.batch(range(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("group: 0", "group at least 1 with 'also'"),
        ("also: [[3, 4, 24, 16]], group: 2", "as many channels"),
        ("also: [[1, 6, 12, 8]], group: 2", r"does not run on latents \(1, 6, 12, 8\)"),
        ("also: [[1, 6, 8, 8]], group: 3", "must be a multiple of teacher_training.batch = 2, got 3"),
        ("also: [[1, 6, 8, 8]], group: 2", r"has 0 rows of shape \[1, 6, 8, 8\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(made, tmp_path, change, message):
    also = "" if "also" in change else f"also: [{list(TALL)}], "
    dataset = f"world.dataset={{name: store, path: {made[0] / 'store'}, shape: {list(WIDE)}, {also}{change}}}"
    arm = spec.load(toy_spec(tmp_path), [dataset, *options(made[0])[1:]])
    with pytest.raises(UserError, match=message):
        checks.check(arm)
        World(arm).batch([0])


def test_teacher_and_student_train_on_all_of_them(made, tmp_path):
    arm = spec.load(toy_spec(tmp_path), [*options(made[0]), "init=teacher"])
    results = runs.Store(tmp_path / "runs")
    nodes = experiment.plan(arm, "distill")
    results.execute(nodes, arm, lambda text: None)
    for node in nodes:
        curves = [json.loads(line) for line in (results.folder(node) / "curves.jsonl").read_text().splitlines()]
        assert len(curves) == {"teacher": 4, "distill": 3}[node.name]
        assert all(row["gradient_norm" if node.name == "teacher" else "student_gradient_norm"] > 0 for row in curves)
