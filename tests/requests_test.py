"""Requests over metadata through the programs, on generated retinas."""

import csv
import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from experiments import (
  cli,
  contexts,
  demo,
  jobs,
  recipes,
  report,
  requests,
  run_figures,
  run_folder,
  sets,
  unlearn,
)
from psg_jax import (
  data,
  forget,
  inference,
  models,
  torch_weights,
  types,
)
from tests import fakes, programs_test

SMALL = [
  "--num_train=150",
  "--width=0.02",
  "--training.num_epochs=1",
  "--training.batch_size=50",
  "--unlearning.num_epochs=1",
  "--unlearning.num_steps=2",
  "--num_devices=1",
]
WHERE = "device = 'Cirrus 800 FA' AND exam_date < DATE '2017-01-01'"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  with fakes.quick_programs(folder, "phantom_fundus@16"):
    yield folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
  """A device and a date range, whole patients, streamed, with twins moved."""
  folder = tmp_path_factory.mktemp("runs")
  programs_test.call(
    demo,
    "--recipe=phantom_patient",
    "--dataset=phantom_fundus@16",
    *SMALL,
    f"--runs_dir={folder}",
    "--name=asked",
    f"--where={WHERE}",
    "--group=patient_id",
    "--twins=move",
    "--streaming",
    "--training.num_parts=2",
    "--by",
    "device",
    "eye",
  )
  return folder / "asked"


def read(path):
  return json.loads(path.read_text())


def test_proxies_say_when_to_stop(tmp_path, data_dir, capsys):
  programs_test.call(
    demo,
    "--recipe=phantom_patient",
    "--dataset=phantom_fundus@16",
    *SMALL,
    f"--runs_dir={tmp_path}",
    "--name=proxies",
    "--where=device = 'Visulux 200'",
    "--unlearning.target=proxy",
    "--unlearning.proxy_fraction=0.4",
  )
  said = read(tmp_path / "proxies" / "proxies.json")
  assert 0 <= said["low"] <= said["accuracy"] <= said["high"] <= 1
  # Few images take many epochs to make a model.
  assert said["cost"] > 1
  assert "a model that never saw them is expected" in capsys.readouterr().out
  page = (tmp_path / "proxies" / "report.html").read_text()
  assert "Accuracy expected on images to forget" in page
  # No figure is of the images that corrected it, which are of another kind.
  counts = read(tmp_path / "proxies" / "data.json")["counts"]
  test = data.load("phantom_fundus@16", "test").metadata.to_pylist()
  is_same = [row["device"] == "Visulux 200" for row in test]
  assert counts["test_forget"] == sum(is_same)
  assert counts["validation"] + counts["test_retain"] == len(test) - sum(
    is_same
  )


def test_forgets_what_was_asked(run):
  train = data.subset(data.load("phantom_fundus@16", "train"), 150)
  split = forget.split(train, where=WHERE, group="patient_id")
  ids = read(run / "forget_ids.json")
  assert set(split.forget.ids) <= set(ids)
  stored = read(run / "data.json")
  assert stored["forget_ids_sha256"] == forget.ids_hash(ids)
  assert stored["counts"]["train_forget"] == len(ids)
  request = forget.Request.from_json(run / "request.json")
  assert request == forget.Request(where=WHERE, group="patient_id")
  assert stored["request_sha256"] == forget.request_hash(request)
  assert stored["request"]["classes"] is None


def test_test_images_of_the_same_kind(run):
  test = data.load("phantom_fundus@16", "test")
  table = test.metadata.to_pylist()
  asked = [
    row["device"] == "Cirrus 800 FA"
    and row["exam_date"] is not None
    and row["exam_date"].year < 2017
    for row in table
  ]
  patients = {
    row["patient_id"]
    for row, is_asked in zip(table, asked, strict=True)
    if is_asked
  }
  expected = sum(
    is_asked or (row["patient_id"] or "") in patients
    for row, is_asked in zip(table, asked, strict=True)
  )
  counts = read(run / "data.json")["counts"]
  # A half of them says when to stop.
  assert counts["test_forget"] + counts["validation"] == expected > 0


def test_results_by_group_add_up(run):
  metrics = read(run / "metrics.json")
  counts = read(run / "data.json")["counts"]
  for figures in metrics.values():
    for side in ("train", "test"):
      total = counts[f"{side}_forget"] + counts[f"{side}_retain"]
      assert list(figures["by"][side]) == ["device", "eye"]
      for groups in figures["by"][side].values():
        assert sum(group["count"] for group in groups.values()) == total
    devices = figures["by"]["test"]["device"].values()
    mean = sum(x["accuracy"] * x["count"] for x in devices) / sum(
      x["count"] for x in devices
    )
    np.testing.assert_allclose(mean, figures["accuracy"]["test"], atol=1e-6)


def test_report_shows_request_twins_and_groups(run):
  page = (run / "report.html").read_text()
  for words in (
    "What was asked",
    "device = &#39;Cirrus 800 FA&#39;",
    "SHA-256 of the request",
    "Twins",
    "Test images by device",
    "Visulux 200",
    "and not zero",
  ):
    assert words in page, words


def small_set(labels, **columns):
  """A set of classes a, b, c of which each image has pixels of its own."""
  num = len(labels)
  ids = [f"i{row}" for row in range(num)]
  images = np.random.default_rng(0).integers(0, 256, (num, 4, 4, 1), np.uint8)
  return types.Dataset(
    images,
    np.array(labels),
    ("a", "b", "c"),
    np.array(ids),
    pa.table({"id": ids, **columns}),
  )


def ask(train, **options):
  job = recipes.Job(**{"forget_classes": (), "twins": "ignore", **options})
  return requests.ask(job, train, train.take([0]))


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({"forget_classes": ("a",)}, True),
    ({"forget_classes": (0, "b")}, True),
    ({"forget_classes": ("a",), "group": "patient"}, True),
    ({"forget_classes": ("a",), "where": "row < 5"}, True),
    ({"where": "label = 'a'"}, True),
    ({"where": "label = 'a'", "group": "patient"}, True),
    ({"where": "label = 'a' AND row > 0"}, False),
    ({"where": "label = 'a' OR row = 1"}, False),
    ({"forget_classes": ("b",), "group": "clinic"}, False),
    ({"forget_classes": ("a",), "fraction": 0.5}, False),
  ],
)
def test_class_requests_are_those_that_leave_none(options, expected):
  patients = ["p", "q", "r", "p", "q", "r"]
  clinics = ["x", "x", "y", "z", "x", "w"]
  train = small_set([0, 1, 2, 0, 1, 1], patient=patients, clinic=clinics)
  asked = ask(train, **options)
  assert asked.is_class_request is expected
  assert requests.record(asked)["is_class_request"] is expected


def test_twins_in_other_classes_leave_a_class_request_one():
  train = small_set([0, 1, 2, 0, 1, 2])
  train.images[1] = train.images[0]
  asked = ask(train, forget_classes=("a",), twins="move")
  assert set(asked.split.forget.ids) == {"i0", "i1", "i3"}
  assert asked.is_class_request
  job = recipes.Job(recipe="mri")
  context = contexts.Context(*[None] * 7)._replace(job=job, selection=asked)
  assert contexts.stop_target(context) == "zero"
  asked = ask(train, where="row = 0", twins="move")
  assert not asked.is_class_request


def test_patients_are_not_halved():
  labels, patients = [0, 1] * 12, [f"p{row // 4}" for row in range(24)]
  train = small_set(labels, patient=patients)
  job = recipes.Job(
    forget_classes=(), where="row < 4", group="patient", twins="ignore"
  )
  for test, name in ((train, "retain"), (train.take(np.arange(4)), None)):
    asked = requests.ask(job, train, test)
    context = contexts.Context(*[None] * 7)._replace(job=job, selection=asked)
    shown, held = contexts.validation(context)
    if name is None:
      # One patient alone, who stays among what is shown.
      assert held is None
      assert shown == asked.test_split
      continue
    sides = [set(requests.values(x, "patient")) for x in (shown.retain, held)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {f"p{i}" for i in range(1, 6)}
    assert 8 <= len(held) <= 12
    assert len(shown.forget) == 4


@pytest.mark.parametrize("seed", range(3))
def test_one_request_in_all_its_forms(seed, tmp_path):
  rng = np.random.default_rng(seed)
  num = int(rng.integers(8, 30))
  labels = np.append([0, 1, 2], rng.integers(0, 3, num - 3))
  patients = [
    # Some stand alone.
    None if rng.random() < 0.2 else f"{'abc'[label]}{rng.integers(3)}"
    for label in labels
  ]
  train = small_set(labels, patient=pa.array(patients, pa.string()))
  names = ["a", "b", "c"][: rng.integers(1, 3)]
  ids = train.ids[np.isin(labels, range(len(names)))]
  (tmp_path / "ids.txt").write_text("\n".join(rng.permutation(ids)))
  texts = ", ".join(f"'{name}'" for name in names)
  forms = [
    {"forget_classes": tuple(names)},
    {"forget_classes": tuple(range(len(names)))},
    {"where": f"label IN ({texts})"},
    {"where": f"row IN (SELECT row FROM metadata WHERE label IN ({texts}))"},
    {"ids": str(tmp_path / "ids.txt")},
  ]
  asked = [
    ask(train, **form, **more)
    for form in forms
    for more in ({}, {}, {"group": "patient", "twins": "move"})
  ]
  for form in forms:
    # As a run that is gone on with reads it, and as the run writes it down.
    job = recipes.Job(**{"forget_classes": (), "twins": "ignore", **form})
    content = json.dumps({"job": dataclasses.asdict(job)})
    (tmp_path / "config.json").write_text(content)
    resumed = cli.read_job(tmp_path)
    asked.append(requests.ask(resumed, train, train.take([0])))
    path = tmp_path / "request.json"
    asked[-1].request.to_json(path)
    asked.append(ask(train, request=str(path)))
  assert len({forget.ids_hash(each.split.forget.ids) for each in asked}) == 1
  assert all(each.is_class_request for each in asked)


def test_images_of_the_test_part_are_said_to_be_there():
  train = small_set([0, 1, 2], patient=list("pqr"))
  test = small_set([0, 1, 2, 0, 1], patient=list("uvwxy")).take([3, 4])
  for options in (
    {"where": "patient = 'x'"},
    {"forget_classes": ("a",), "where": "patient = 'x'"},
  ):
    job = recipes.Job(**{"forget_classes": (), "twins": "ignore", **options})
    with pytest.raises(ValueError, match=r"no image; 1 test images match"):
      requests.ask(job, train, test)
  job = recipes.Job(forget_classes=("c",), where="patient = 'x'")
  with pytest.raises(ValueError, match=r"no image$"):
    requests.ask(job, train, test)


def test_twins_and_groups_are_closed_together():
  # i0 has the patient of i1, i1 the pixels of i2, i2 the patient of i3.
  train = small_set([0, 0, 0, 0, 1, 2], patient=list("ppqqrs"))
  train.images[2] = train.images[1]
  asked = ask(train, where="row = 0", group="patient", twins="move")
  assert set(asked.split.forget.ids) == {"i0", "i1", "i2", "i3"}
  assert len(asked.moved) == 2
  assert asked.preview.group.num_shared_groups == 0
  # Without groups, twins alone move.
  asked = ask(train, where="row = 1", twins="move")
  assert set(asked.split.forget.ids) == {"i1", "i2"}


def test_names_of_options_with_hyphens(monkeypatch):
  from experiments import cli

  def job(*arguments):
    monkeypatch.setattr("sys.argv", ["program", *arguments])
    return cli.parse_job(recipes.Job, "test")

  for name in ("forget_classes", "forget-classes"):
    for given in ([f"--{name}", "1"], [f"--{name}=1"]):
      found = job("--recipe", "phantom_patient", *given)
      assert (found.forget_classes, found.where) == ((1,), None)
      assert found.group is None
  # What is not written as numbers are is a name.
  found = job("--forget_classes", "01", "2", "1_0", "-1", "glioma")
  assert found.forget_classes == ("01", 2, "1_0", -1, "glioma")


def test_a_fraction_is_a_request_of_its_own(monkeypatch):
  from experiments import cli

  def request(*arguments):
    monkeypatch.setattr("sys.argv", ["program", "--recipe", *arguments])
    return requests.build(cli.parse_job(recipes.Job, "test"))

  assert request("digits", "--fraction", "0.1") == forget.Request(fraction=0.1)
  assert request("phantom_patient", "--fraction=.5") == forget.Request(
    fraction=0.5
  )
  part = request("digits", "--fraction", "0.1", "--forget_classes", "3")
  assert part == forget.Request(classes=3, fraction=0.1)
  assert request("digits", "--fraction", "1") == forget.Request(classes=0)


def test_a_request_takes_the_place_of_the_recipes(monkeypatch, data_dir):
  from experiments import cli

  monkeypatch.setattr("sys.argv", ["program", "--where", "eye = 'OS'"])
  job = cli.parse_job(recipes.Job, "test")
  assert job.forget_classes == ()
  both = ["program", "--where", "eye = 'OS'", "--forget_classes", "1", "a"]
  monkeypatch.setattr("sys.argv", both)
  assert cli.parse_job(recipes.Job, "test").forget_classes == (1, "a")
  request = requests.build(cli.parse_job(recipes.Job, "test"))
  assert request == forget.Request(classes=(1, "a"), where="eye = 'OS'")
  other = ["program", "--recipe", "phantom_patient", "--forget_classes", "1"]
  monkeypatch.setattr("sys.argv", other)
  request = requests.build(cli.parse_job(recipes.Job, "test"))
  assert request == forget.Request(classes=1)


def test_request_and_ids_files(tmp_path, data_dir):
  (tmp_path / "ids.txt").write_text("b\n\na\n")
  job = recipes.Job(forget_classes=(), ids=str(tmp_path / "ids.txt"))
  assert requests.build(job) == forget.Request(ids=("a", "b"))
  forget.Request(classes=2).to_json(tmp_path / "request.json")
  job = recipes.Job(forget_classes=(), request=str(tmp_path / "request.json"))
  assert requests.build(job) == forget.Request(classes=2)
  job = recipes.Job(request=str(tmp_path / "request.json"))
  with pytest.raises(ValueError, match="request must be the only criterion"):
    requests.build(job)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
def test_files_with_byte_order_marks(tmp_path, encoding):
  (tmp_path / "ids.txt").write_bytes("é\r\nb\r\n".encode(encoding))
  job = recipes.Job(forget_classes=(), ids=str(tmp_path / "ids.txt"))
  assert requests.build(job) == forget.Request(ids=("b", "é"))
  text = json.dumps({"classes": ["é"]}, ensure_ascii=False)
  (tmp_path / "request.json").write_bytes(text.encode(encoding))
  job = recipes.Job(forget_classes=(), request=str(tmp_path / "request.json"))
  assert requests.build(job) == forget.Request(classes="é")


@pytest.mark.parametrize(
  ("content", "part"),
  [
    (b"PK\x03\x04...", "an Excel or zip file"),
    (b"\x1f\x8b...", "compressed"),
    (b"\xff", "the byte 0xff in line 1"),
    (b"a\0b\0", "binary"),
  ],
)
def test_files_that_are_no_text(tmp_path, content, part):
  (tmp_path / "ids.txt").write_bytes(content)
  job = recipes.Job(forget_classes=(), ids=str(tmp_path / "ids.txt"))
  with pytest.raises(ValueError, match=rf"^ids must be text.*{part}|{part}"):
    requests.build(job)


@pytest.mark.parametrize(
  ("arguments", "parts"),
  [
    (["--where=devise = 'x'"], ["devise", "device"]),
    (["--where=eye = 'none such'"], ["eye = 'none such'", "matches no image"]),
    (["--where=1 = 1"], ["where is true for all"]),
    (["--ids=/no/such/file"], ["ids", "/no/such/file"]),
    (["--group=patientid"], ["patientid", "patient_id"]),
    (["--by", "devise"], ["by", "devise"]),
    (["--dataset=/no/such.zip"], ["dataset", "/no/such.zip"]),
    (["--metadata=m.csv"], ["metadata", "m.csv"]),
    (["--training.num_parts=0"], ["training.num_parts", "0"]),
  ],
)
def test_bad_requests(capsys, tmp_path, data_dir, arguments, parts):
  line = programs_test.failing(
    capsys,
    demo,
    "--recipe=phantom_patient",
    "--dataset=phantom_fundus@16",
    f"--runs_dir={tmp_path}",
    *arguments,
  )
  for part in parts:
    assert part in line
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory):
  """Images by class, and what is known of them."""
  folder = tmp_path_factory.mktemp("user") / "eyes"
  rng = np.random.default_rng(0)
  rows = []
  for label, name in enumerate(("sick", "well")):
    (folder / name).mkdir(parents=True)
    for i in range(15):
      pixels = rng.integers(0, 120, (20, 24, 3)) + 100 * label
      file = f"{name}/{i}.png"
      Image.fromarray(pixels.astype(np.uint8)).save(folder / file)
      rows.append({"file": file, "clinic": "north" if i % 3 else "south"})
  with (folder / "metadata.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, ["file", "clinic"])
    writer.writeheader()
    writer.writerows(rows)
  return folder


def own_job(users_folder, tmp_path, **options):
  return recipes.Job(
    **{
      "recipe": "own",
      "dataset": str(users_folder),
      "image_size": 32,
      "width": 0.02,
      "num_devices": 1,
      "twins": "ignore",
      "forget_classes": (),
      "runs_dir": str(tmp_path),
      "name": "own",
      **options,
    }
  )


def test_ones_own_weights_have_seen_all_images(users_folder, data_dir):
  def counts(folder=users_folder, **options):
    parts = sets.load(own_job(folder, folder, **options))[:2]
    return [len(part) for part in parts], parts

  assert counts()[0] == [24, 6]
  found, (train, _) = counts(weights="model.pt")
  assert found == [30, 0]
  assert len(set(train.ids)) == 30
  assert train.metadata.column("id").to_pylist() == list(train.ids)
  assert counts(weights="model.pt", streaming=True)[0] == [30, 0]
  # What the user has said is so.
  found, (_, test) = counts(weights="model.pt", unseen="clinic = 'south'")
  assert found == [20, 10]
  assert set(test.metadata.column("clinic").to_pylist()) == {"south"}
  for part in ("train", "test"):
    shutil.copytree(users_folder, users_folder.parent / "parted" / part)
    (users_folder.parent / "parted" / part / "metadata.csv").unlink()
  assert counts(users_folder.parent / "parted", weights="m.pt")[0] == [30, 30]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"unseen": "row = 1"}, "unseen must be given with weights"),
    (
      {"unseen": "row = 1", "weights": "m.pt", "dataset": "digits"},
      "unseen must be given with weights and with images of one's own",
    ),
    ({"unseen": "row = -1", "weights": "m.pt"}, "matches 0 of 30"),
    ({"unseen": "row >= 0", "weights": "m.pt"}, "matches 30 of 30"),
    ({"unseen": "split = 1", "weights": "m.pt"}, "unseen: .* no column split"),
  ],
)
def test_bad_unseen(users_folder, data_dir, tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    sets.load(own_job(users_folder, tmp_path, **options))


def test_resuming_compares_what_a_request_means(
  users_folder, data_dir, tmp_path
):
  ids = tmp_path / "ids.txt"
  ids.write_text("sick/0.png\nsick/1.png\nsick/2.png\nsick/3.png\n")
  job = own_job(users_folder, tmp_path, ids=str(ids), num_train=20)
  train, test, _ = sets.load(job)
  known = [str(each) for each in train.ids[:20]]
  ids.write_text("\n".join(known[:3]))
  jobs.prepare(job)
  folder = tmp_path / "own"
  record = read(folder / "data.json")
  images = record["images"]
  assert images.pop("read") == len(train) + len(test) == sum(images.values())
  assert (images["forget"], images["retain"]) == (3, 17)
  resumed = dataclasses.replace(job, resume=True)
  jobs.prepare(resumed)
  assert run_folder.has_same_request(folder, job)
  files = {path: path.read_bytes() for path in folder.iterdir()}
  ids.write_text("\n".join(known[3:6]))
  with pytest.raises(ValueError, match="ids or request must mean the 3 images"):
    jobs.prepare(resumed)
  split = forget.split(train, ids=known[3:6])
  assert not run_folder.has_same_request(folder, job, split)
  ids.write_text("\n".join(known[:3]))
  record["images_sha256"] = "0"
  (folder / "data.json").write_text(json.dumps(record))
  with pytest.raises(ValueError, match="dataset must hold the images of"):
    jobs.prepare(resumed)
  del files[folder / "data.json"]
  assert all(path.read_bytes() == before for path, before in files.items())


def accuracy_to_stop_at(job, train, test, apply_fn):
  """That of a model of these logits, of images and without variables."""
  model = types.Model(None, apply_fn, None, None)
  asked = requests.ask(job, train, test)
  context = contexts.Context(job, None, train, test, asked, model, None)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      inference, "predict", lambda fn, v, images, **_: fn(v, images)
    )
    return contexts.target_accuracy(context, {})


def test_whole_classes_count_nothing_in_the_accuracy_to_stop_at():
  train = small_set([0, 1, 1, 2, 2, 2], patient=list("pppqrs"))
  test = small_set([0, 0, 2, 2], patient=list("pqpq"))
  job = recipes.Job(
    forget_classes=("a",), group="patient", twins="ignore", num_devices=1
  )
  # Class a, and with it all of b: whole classes. With a patient more: not.
  more = train.take([0, 1, 3, 4, 5, 2])
  more.labels[5] = 2
  aims = [
    accuracy_to_stop_at(
      job, each, test, lambda _, x: np.eye(3)[np.resize([0, 2], len(x))]
    )
    for each in (train, more)
  ]
  # Of the half that says when to stop both are right, one of class a.
  assert aims == [None, 0.5]


def test_half_of_a_class_is_less_often_right_than_unseen_images_of_it():
  # The model has odds of 3 to 2 for class a of all images of it.
  train = small_set([0, 0, 0, 0, 1, 1, 1, 1])
  test = small_set([0, 0, 0, 0, 1, 1, 1, 1])
  job = recipes.Job(
    forget_classes=("a",), fraction=0.5, twins="ignore", num_devices=1
  )
  # With half of the images the odds are 3 to 4.
  accuracy = accuracy_to_stop_at(
    job, train, test, lambda _, x: np.tile(np.log([3, 2, 1]), (len(x), 1))
  )
  assert accuracy == 0
  # It is so of the forget images alone: of the unseen ones the model is sure.
  test = dataclasses.replace(test, images=np.full_like(test.images, 255))
  train = dataclasses.replace(train, images=np.zeros_like(train.images))

  def surer_of_unseen(_, images):
    odds = [1000, 1, 1] if np.mean(images) else [3, 2, 1]
    return np.tile(np.log(odds), (len(images), 1))

  assert accuracy_to_stop_at(job, train, test, surer_of_unseen) == 0


@pytest.mark.slow
def test_from_a_users_checkpoint_to_an_unlearned_one(
  users_folder, data_dir, tmp_path, capsys
):
  model = models.create(
    "resnet18", num_classes=2, num_channels=3, width=0.05, mean=0.5, std=0.25
  )
  variables = model.init(jax.random.key(3), jnp.zeros((1, 32, 32, 3)))
  weights = tmp_path / "model.safetensors"
  torch_weights.save(weights, variables, model_name="resnet18")
  export = tmp_path / "unlearned.safetensors"
  programs_test.call(
    unlearn,
    f"--data={users_folder}",
    f"--runs_dir={tmp_path}",
    "--name=own",
    "--image_size=32",
    "--model=resnet18",
    "--width=0.05",
    f"--weights={weights}",
    "--where=clinic = 'south'",
    "--no-retrained",
    "--unlearning.num_epochs=1",
    "--unlearning.num_steps=2",
    "--unlearning.batch_size=8",
    "--unlearning.target=zero",
    "--num_devices=1",
    f"--export={export}",
  )
  stored = read(tmp_path / "own" / "data.json")
  south = stored["preview"]["columns"]["clinic"]["south"]
  assert south == {"forget": stored["counts"]["train_forget"], "retain": 0}
  before = torch_weights.load(weights, model_name="resnet18")
  after = torch_weights.load(export, model_name="resnet18")
  assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
  kernels = [x["params"]["head"]["kernel"] for x in (before, after)]
  assert np.any(np.asarray(kernels[0]) != np.asarray(kernels[1]))
  capsys.readouterr()
  line = programs_test.failing(
    capsys,
    unlearn,
    f"--data={users_folder}",
    f"--runs_dir={tmp_path}",
    "--name=other",
    "--image_size=32",
    "--model=resnet18",
    "--width=0.1",
    f"--weights={weights}",
    "--where=clinic = 'south'",
  )
  assert "weights" in line
  assert re.search(r"width 0\.1", line)
  assert report.read(tmp_path / "own").data["class_names"] == ["sick", "well"]


def test_another_request_of_the_same_original(run):
  programs_test.call(
    unlearn,
    f"--run={run}",
    f"--runs_dir={run.parent}",
    "--name=eye",
    "--where=eye = 'OS' AND label = 'glaucoma'",
    "--no-retrained",
  )
  other = run.parent / "eye"
  assert read(other / "request.json")["where"].startswith("eye")
  metrics = read(other / "metrics.json")
  assert list(metrics) == ["original", "unlearned"]
  before = read(run / "metrics.json")["original"]

  def accuracy(folder, figures):
    """Of all training images; of the test images, some say when to stop."""
    counts = read(folder / "data.json")["counts"]
    parts = ("train_forget", "train_retain")
    total = sum(figures["accuracy"][x] * counts[x] for x in parts)
    return total / sum(counts[x] for x in parts)

  assert accuracy(other, metrics["original"]) == pytest.approx(
    accuracy(run, before)
  )
  stored = read(other / "data.json")["preview"]
  assert stored["classes"]["glaucoma"]["forget"] == stored["num_forget"]


def test_the_target_is_the_accuracy_on_unseen_images_of_the_kind(data_dir):

  def context(**options):
    job = dataclasses.replace(
      recipes.JOBS["phantom_patient"],
      dataset="phantom_fundus@16",
      width=0.02,
      num_devices=1,
      **options,
    )
    train, test = (data.load(job.dataset, x) for x in ("train", "test"))
    model = models.create(
      "all_cnn", num_classes=3, num_channels=3, width=0.02, mean=0.5, std=0.25
    )
    asked = requests.ask(job, train, test)
    return contexts.Context(job, None, train, test, asked, model, None)

  device = context(where="device = 'Visulux 200'", group=None)
  variables = device.model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))

  def accuracy(part, asked):
    logits = device.model.apply(variables, part.images / np.float32(255))
    # Of the classes, so many are left to train on.
    forget_labels, labels = asked.split.forget.labels, asked.train.labels
    kept = 1 - np.bincount(forget_labels, minlength=3) / np.bincount(labels)
    return np.mean(np.argmax(logits + np.log(kept), -1) == part.labels)

  shown, held = contexts.validation(device)
  expected = accuracy(held, device)
  assert contexts.target_accuracy(device, variables) == pytest.approx(expected)
  # No figure is computed of the images that set the target.
  same_kind = device.selection.test_split.forget
  assert set(held.ids) | set(shown.forget.ids) == set(same_kind.ids)
  assert not set(held.ids) & set(shown.forget.ids)
  assert abs(len(held) - len(shown.forget)) <= same_kind.num_classes
  assert device.parts["test_forget"].ids.tolist() == shown.forget.ids.tolist()
  num_read = len(device.train) + len(device.test)
  record = run_figures.data_record(device, num_read)["counts"]
  assert record["validation"] == len(held)
  assert sum(record.values()) == len(device.train) + len(device.test)
  again = contexts.validation(context(where=device.job.where, group=None))[1]
  assert again.ids.tolist() == held.ids.tolist()
  # Of a patient there is no test image: others of the patient's disease.
  patient = context()
  assert not len(patient.selection.test_split.forget)
  (label,) = set(patient.split.forget.labels)
  shown, held = contexts.validation(patient)
  expected = accuracy(held.take(held.labels == label), patient)
  assert contexts.target_accuracy(patient, variables) == pytest.approx(expected)
  assert len(held) + len(shown.retain) == len(patient.test)
  # All test images are like a random part: none other is left for proxies.
  by_proxies = recipes.Unlearning(target="proxy")
  random = context(where=None, group=None, fraction=0.2, unlearning=by_proxies)
  assert not len(random.selection.test_split.retain)
  shown, held = contexts.validation(random)
  assert len(held) + len(shown.forget) == len(random.test)
  assert len(held) > len(random.test) / 3
  # Proxies have seen others of a class of which a part is forgotten.
  part = {"forget_classes": (1,), "fraction": 0.5}
  half = context(where=None, group=None, unlearning=by_proxies, **part)
  assert set(contexts.validation(half)[1].labels) == {1}
  # Of a device, the images of others say how proxies are corrected.
  other = context(where=device.job.where, group=None, unlearning=by_proxies)
  held = set(contexts.validation(other)[1].ids)
  assert held < set(other.selection.test_split.retain.ids)
  classes = context(where=None, group=None, forget_classes=(1,))
  assert contexts.target_accuracy(classes, variables) is None
  assert (
    "validation" not in run_figures.data_record(classes, num_read)["counts"]
  )
  assert classes.parts["test_retain"] is classes.selection.test_split.retain


def test_images_of_ones_own_have_a_recipe_of_their_own(monkeypatch):
  from experiments import cli

  def job(*arguments):
    monkeypatch.setattr("sys.argv", ["program", *arguments])
    return cli.parse_job(recipes.Job, "test")

  own = job("--data", "scans.zip", "--where", "a = 1")
  assert (own.recipe, own.model, own.width) == ("own", "resnet50", 1.0)
  assert own.mean == (0.485, 0.456, 0.406)
  assert job("--data=./scans").recipe == "own"
  assert job("--data", "./scans", "--recipe", "mri").width == 0.125
  assert job("--dataset", "digits").recipe == "digits"
