"""The audit: known answers, and from end to end on a few digits."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import scipy.stats

from experiments import attack, audit, contexts, jobs
from experiments.pages import audit as audit_page
from psg_jax import data, ensembles, models, ulira
from tests import fakes, programs_test

SMALL = [
  "--num_train=150",
  "--width=0.05",
  "--training.num_epochs=1",
  "--training.batch_size=16",
  "--unlearning.num_epochs=1",
  "--unlearning.num_steps=3",
  "--unlearning.batch_size=8",
  "--num_devices=1",
  "--twins=ignore",
  "--num_models=16",
  "--num_targets=6",
  "--retain_fraction=0.5",
  *("--forget_classes", *map(str, range(10)), "--fraction=0.5"),
]
# A target that is reached before the first pass: nothing is done.
NOTHING = ("--set", "psg.target_accuracy=1")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  patch = pytest.MonkeyPatch()
  patch.setenv("PSG_JAX_DATA", str(folder))
  data.load("digits", "test")
  # A network that is compiled in no time.
  model = fakes.linear_model(32 * 32, 10)
  patch.setattr(models, "create", lambda *args, **options: model)
  yield folder
  patch.undo()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
  """A folder with the run `one`, an audit of a method that does nothing."""
  folder = tmp_path_factory.mktemp("runs")
  programs_test.call(
    audit,
    *(*SMALL, f"--runs_dir={folder}", "--name=one", "--mode=sharded"),
    *NOTHING,
  )
  return folder


def go_on(runs, *arguments):
  """Calls the program on the module's run once more."""
  programs_test.call(
    audit, *SMALL, f"--runs_dir={runs}", "--name=one", "--resume", *arguments
  )
  return read(runs / "one" / "audit.json")


def read(path):
  return json.loads(path.read_text())


def confidences(num_models, num_targets, *shifts, seed=0):
  """Confidences of unit variance about levels of each image, by shift."""
  rng = np.random.default_rng(seed)
  level = 10 * rng.normal(size=num_targets)
  return [
    shift + level + rng.normal(size=(num_models, num_targets))
    for shift in shifts
  ]


def test_exact_unlearning_is_chance_and_none_has_the_known_power():
  original, exact, never = confidences(32, 200, 2.0, 0.0, 0.0)
  found = attack.evaluate(original, exact, never)
  aucs = {side: each.auc for side, each in found.attacks.items()}
  assert aucs["unlearned"] == pytest.approx(0.5, abs=0.02)
  assert aucs["control"] == pytest.approx(0.5, abs=0.03)
  expected = scipy.stats.norm.cdf(2 / math.sqrt(2))
  assert aucs["original"] == pytest.approx(expected, abs=0.02)
  for side, (low, high) in found.intervals.items():
    assert low < aucs[side] < high < low + 0.06
  # KL of two normal distributions 2 apart is 2, and chance is the control's.
  medians = {side: np.median(each) for side, each in found.klom.items()}
  excess = medians["unlearned"] - medians["control"]
  assert excess == pytest.approx(0, abs=0.08)
  assert medians["original"] > medians["control"] + 1.5
  assert found.klom_method == "gaussian"


def test_many_models_make_histograms(monkeypatch):
  monkeypatch.setattr(attack, "auc_interval", lambda *_, **__: (0.0, 1.0))
  original, exact, never = confidences(200, 3, 2.0, 0.0, 0.0)
  found = attack.evaluate(original, exact, never)
  assert found.klom_method == "histogram"
  # What chance makes of a hundred a side in twenty bins, and 2 apart.
  assert found.klom["control"].max() < 1.5
  assert found.klom["original"].min() > found.klom["unlearned"].max() + 0.5


def test_sides_of_one_distribution_have_one_klom():
  original, exact, never = confidences(32, 400, 0.0, 0.0, 0.0)
  found = attack.evaluate(original, exact, never).klom
  assert np.mean(found["original"]) == pytest.approx(
    np.mean(found["control"]), abs=0.03
  )


def test_interval_counts_models_and_not_pairs():
  # Images of a model move together: 400 of them tell hardly more than one.
  rng = np.random.default_rng(0)
  own, noise = rng.normal(size=(2, 16, 1)), rng.normal(size=(2, 16, 400))
  low, high = attack.auc_interval(*(own + 0.1 * noise))
  assert low < 0.5 < high
  assert high - low > 0.2
  assert np.ptp(attack.auc_interval(*noise)) < 0.1


def test_interval_covers_as_often_as_it_says():
  is_covered = []
  for seed in range(60):
    rng = np.random.default_rng(seed)
    own, noise = rng.normal(size=(2, 8, 1)), rng.normal(size=(2, 8, 20))
    low, high = attack.auc_interval(*(0.7 * own + noise))
    is_covered.append(low <= 0.5 <= high)
  assert np.mean(is_covered) == pytest.approx(0.9, abs=0.08)


def one_each(num_models, num_targets, seed=0):
  """A plan of the audited images alone."""
  rng = np.random.default_rng(seed)
  first = rng.permuted(
    np.arange(num_targets) % 2 == np.zeros((num_models // 2, 1)), axis=1
  )
  is_trained = np.stack([first, ~first], 1).reshape(num_models, num_targets)
  rows = np.arange(num_targets)
  return audit.Plan(rows, is_trained, np.zeros((num_models, 1), int), rows)


def test_pairs_take_the_model_that_was_trained_on_an_image():
  plan = one_each(8, 6)
  values = (
    np.where(plan.is_trained, 1.0, 0.0) + 10 * np.arange(8)[:, None] // 20
  )
  found = plan.by_pair(plan.is_trained.astype(float), is_trained=True)
  np.testing.assert_array_equal(found, np.ones((4, 6)))
  found = plan.by_pair(plan.is_trained.astype(float), is_trained=False)
  np.testing.assert_array_equal(found, np.zeros((4, 6)))
  both = sum(plan.by_pair(values, is_trained=x) for x in (True, False))
  np.testing.assert_array_equal(both, values[::2] + values[1::2])


def test_positives_and_negatives_after_unlearning_are_of_models_that_did():
  plan = one_each(4, 6)
  labels = np.zeros(6, int)
  # The confidence is the first logit: 1 or 2 before, and 3 or 4 after.
  before, after = (
    np.stack([low + plan.is_trained, 0.0 * plan.is_trained], -1)
    for low in (1.0, 3.0)
  )
  found = plan.confidences(before, after, labels)
  expected = {
    "original": 2,
    "unlearned": 4,
    "never_trained": 1,
    "never_unlearned": 3,
  }
  assert set(found) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], np.full((2, 6), value))


def test_what_a_model_s_images_have_in_common_cancels():
  # It is most of the variance, and differs between models: telling the two
  # kinds by separate models would miss what memory adds.
  plan = one_each(32, 40)
  rng = np.random.default_rng(0)
  values = 3 * rng.normal(size=(32, 1)) + rng.normal(size=(32, 40))
  values += 2 * plan.is_trained
  found = attack.evaluate(
    plan.by_pair(values, is_trained=True),
    plan.by_pair(values - 2 * plan.is_trained, is_trained=True),
    plan.by_pair(values, is_trained=False),
  )
  for side, shift in (("original", 2.0), ("unlearned", 0.0), ("control", 0.0)):
    low, high = found.intervals[side]
    expected = scipy.stats.norm.cdf(shift / math.sqrt(2 * (3**2 + 1)))
    assert found.attacks[side].auc == pytest.approx(expected, abs=0.07)
    # The control has half as many models.
    assert high - low < (0.6 if side == "control" else 0.25)


def test_exact_unlearning_has_seen_none_of_the_audited_images():
  # What others of a kind add to each other is gone with all of them: to be told
  # from models before unlearning would be no trace of the image.
  plan = one_each(32, 40)
  rng = np.random.default_rng(0)
  own = rng.normal(size=(32, 1)) + rng.normal(size=(32, 40))
  before, after = own + 1.5 * plan.is_trained, own - 1.0
  arguments = (
    plan.by_pair(before, is_trained=True),
    plan.by_pair(after, is_trained=True),
    plan.by_pair(before, is_trained=False),
  )
  found = attack.evaluate(*arguments, plan.by_pair(after, is_trained=False))
  low, high = found.intervals["unlearned"]
  assert low < 0.5 < high
  assert found.change is not None
  assert found.change[1] < 0
  expected = found.attacks["unlearned"].auc - found.attacks["original"].auc
  assert np.mean(found.change) == pytest.approx(expected)
  # Which is what the models before unlearning would be taken for.
  assert attack.evaluate(*arguments).intervals["unlearned"][0] > 0.5


def test_figures_that_diverged_models_take_are_left_out():
  original, exact, never = confidences(8, 50, 1.0, 0.0, 0.0)
  full = attack.evaluate(original, exact, never)
  for count, sides in ((3, 2), (4, 3), (7, 3), (8, 3)):
    unlearned = exact.copy()
    # One of the two models of a pair.
    unlearned[count:, ::2] = np.nan
    found = attack.evaluate(original, unlearned, never)
    assert len(found.attacks) == sides
    assert ("unlearned" in found.klom) == (count == 8)
    assert found.attacks["original"].auc == full.attacks["original"].auc
    record = found.as_dict()
    json.dumps(record)
    assert (record["attack"]["unlearned"] is None) == (sides == 2)


def example(before, after, control):
  """An audit with intervals of 0.02 about these AUCs."""
  attacks = {
    side: {"auc": auc, "auc_interval": [auc - 0.02, auc + 0.02]}
    for side, auc in zip(attack.SIDES, (before, after, control), strict=True)
  }
  return {
    "attack": attacks,
    "change": [after - before - 0.02, after - before + 0.02],
    "method": {"title": "PSG"},
    "scale": {
      "models": 32,
      "audited_images": 64,
      "epochs": 5,
      "image_passes": 112_000,
    },
    "seconds": {"total": 314.0},
    "diverged": [],
  }


@pytest.mark.parametrize(
  ("before", "after", "words"),
  [
    (0.7, 0.505, "does not find what tells models that unlearned an image"),
    (0.7, 0.505, "an AUC of up to 0.525 is possible"),
    (0.505, 0.505, "nor can it before"),
    (0.505, 0.7, "more surely than trained from never trained before"),
    (0.7, 0.6, "less surely than trained from never trained before"),
    (0.7, 0.71, "from models that never had it: AUC"),
    (0.7, 0.8, "more surely than trained"),
  ],
)
def test_headline_says_what_is_found_and_at_what_price(before, after, words):
  first, control, price = audit_page.statements(example(before, after, 0.5))
  assert words in first
  assert f"AUC {after:.3f}" in first
  assert f"without unlearning {before:.3f}" in first
  assert "0.500" in control
  assert price.startswith("32 models × 700 images × 5 epochs, 64 of")
  assert price.endswith("in 5 min 14 s.")


def test_plan_is_balanced_seeded_and_of_the_request(runs):
  options = audit.Options(
    recipe="digits",
    runs_dir=str(runs),
    name="plan",
    num_train=150,
    num_models=16,
    retain_fraction=0.25,
    twins="ignore",
  )
  context = jobs.prepare(options)
  plan = audit.draw(options, context)
  labels = context.train.labels
  assert set(labels[plan.targets]) == {0}
  # A quarter of those that match, but an even number.
  num_targets = len(plan.targets)
  assert num_targets == np.sum(labels == 0) // 8 * 2
  is_member = plan.membership(150)
  np.testing.assert_array_equal(is_member[:, plan.targets], plan.is_trained)
  np.testing.assert_array_equal(plan.is_trained[::2], ~plan.is_trained[1::2])
  assert set(plan.is_trained.sum(0)) == {8}
  assert set(plan.is_trained.sum(1)) == {num_targets // 2}
  others = np.delete(is_member, plan.targets, 1)
  assert set(others.sum(1)) == {round((150 - num_targets) / 4)}
  np.testing.assert_array_equal(others[::2], others[1::2])
  assert not np.array_equal(others[0], others[2])
  again = audit.draw(options, context)
  np.testing.assert_array_equal(plan.others, again.others)
  other = audit.draw(dataclasses.replace(options, seed=1), context)
  assert not np.array_equal(plan.targets, other.targets)
  whole = dataclasses.replace(options, retain_fraction=1.0)
  complete = audit.draw(whole, context).membership(150)
  assert set(complete.sum(1)) == {150 - num_targets // 2}


def test_doing_nothing_leaves_the_attack_as_it_was(runs):
  folder = runs / "one"
  found = read(folder / "audit.json")
  assert found["attack"]["unlearned"] == found["attack"]["original"]
  assert found["klom"]["unlearned"] == found["klom"]["original"]
  assert found["accuracy"]["unlearned"] == found["accuracy"]["original"]
  assert found["scale"] == {
    "models": 16,
    "audited_images": 6,
    "pool": read(folder / "data.json")["counts"]["train_forget"],
    "other_images": 72,
    "epochs": 1,
    "image_passes": 16 * (72 + 3),
  }
  seconds = found["seconds"]
  assert seconds["total"] == pytest.approx(
    sum(seconds[step] for step in audit_page.STEPS)
  )
  with np.load(folder / "audit.npz") as arrays:
    assert arrays["original"].shape == (8, 6)
    np.testing.assert_array_equal(arrays["original"], arrays["unlearned"])
    again = ulira.attack(arrays["original"], arrays["never_trained"])
    assert again.auc == found["attack"]["original"]["auc"]
    assert arrays["control_klom"].shape == (6,)
    forget_ids = {str(x) for x in read(folder / "forget_ids.json")}
    assert {str(x) for x in arrays["ids"]} <= forget_ids
  for name in ("config", "request", "options"):
    assert read(folder / f"{name}.json")
  assert not list(folder.rglob("*.partial*"))


def test_page_has_the_figures_and_no_address(runs):
  page = (runs / "one" / "audit.html").read_text()
  found = read(runs / "one" / "audit.json")
  auc = found["attack"]["original"]["auc"]
  assert f"{auc:.3f} [" in page
  for sentence in found["statements"]:
    assert sentence in page.replace("&#39;", "'")
  # The curve, two sets of ratios, KLOM, the times.
  assert page.count("<svg") == 5
  assert "↓ 0.5" in page
  assert f"↓ {found['klom']['control']['median']:.3f}" in page
  assert not re.search(r"https?://|<script|<link", page)
  folders = {
    "figures": (("roc", "scores", "klom", "time"), ("png", "pdf")),
    "tables": (("summary", "arguments"), ("csv", "md", "tex")),
  }
  for folder, (names, kinds) in folders.items():
    assert {x.name for x in (runs / "one" / folder).iterdir()} == {
      f"{name}.{kind}" for name in names for kind in kinds
    }


def no_work(*args, **kwargs):
  raise AssertionError("what was finished is done again")


@pytest.mark.slow
def test_another_method_takes_the_same_models(runs, monkeypatch):
  # Drawing takes longer than all else here.
  monkeypatch.setattr(audit_page, "build", lambda folder, *_: folder)
  monkeypatch.setattr(ensembles, "train", no_work)
  before = read(runs / "one" / "audit.json")
  # The oracle: chance within what eight pairs of models can say.
  found = go_on(runs, "--method=retrain")
  low, high = found["attack"]["unlearned"]["auc_interval"]
  assert low <= 0.5 <= high
  assert found["attack"]["original"] == before["attack"]["original"]
  assert found["method"]["name"] == "retrain"
  # An interrupted run: only the models that are missing unlearn.
  folder = runs / "one" / "unlearned" / "retrain"
  (folder / "0004.json").unlink()
  unlearned = []
  own = audit.unlearn

  def watch(*args):
    unlearned.append(args[-1])
    own(*args)

  monkeypatch.setattr(audit, "unlearn", watch)
  again = go_on(runs, "--method=retrain")
  assert unlearned == [4]
  assert again["attack"] == found["attack"]
  # And back: nothing is to be done.
  monkeypatch.setattr(audit, "unlearn", no_work)
  last = go_on(runs, *NOTHING)
  assert last["attack"] == before["attack"]


def test_a_model_that_diverges_does_not_lose_the_others(runs, monkeypatch):
  find = audit.baselines.find

  def fail_once(model, variables, split, key, **options):
    fail_once.calls += 1
    if fail_once.calls == 2:
      raise FloatingPointError("the loss is not finite in step 7")
    options = {k: options[k] for k in ("mesh", "show_progress")}
    return find("psg").fn(
      *(model, variables, split, key),
      target_accuracy=1.0,
      num_steps=3,
      **options,
    )

  fail_once.calls = 0
  monkeypatch.setattr(
    audit.baselines, "find", lambda name: find(name)._replace(fn=fail_once)
  )
  monkeypatch.setattr(ensembles, "train", no_work)
  found = go_on(runs, "--method=finetune")
  assert fail_once.calls == 16
  assert found["diverged"] == [
    {
      "model": 1,
      "step": 7,
      "reason": "diverged: the loss is not finite in step 7",
    }
  ]
  assert found["attack"]["unlearned"]["num_positives"] == 7 * 6
  assert found["klom"]["unlearned"] is None
  page = (runs / "one" / "audit.html").read_text()
  assert "Model 1 diverged: the loss is not finite in step 7" in page
  assert "not available" in page


def test_too_few_left_to_attack_is_said(runs, monkeypatch):
  def fail(*args, **options):
    raise FloatingPointError("the loss is not finite in step 1")

  find = audit.baselines.find
  monkeypatch.setattr(
    audit.baselines, "find", lambda name: find(name)._replace(fn=fail)
  )
  found = go_on(runs, "--method=neggrad")
  assert found["attack"]["unlearned"] is None
  assert len(found["diverged"]) == 16
  assert "diverged in 16 of 16 models" in found["statements"][0]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--num_models=8"], "num_models must be an integer of at least 16, got 8"),
    (["--num_models=18"], "num_models must be a multiple of 4"),
    (["--method=scrubs"], r"method must be one of .* did you mean 'scrub'\?"),
    (["--num_targets=1"], "num_targets must be an integer of at least 2"),
    (["--num_targets=5"], "num_targets must be even"),
    (
      ["--num_targets=100"],
      r"num_targets must be .*that match the request, \d+, got 100",
    ),
    (["--ids={one}"], "match the request, 1, got 6"),
    (
      ["--retain_fraction=0"],
      "retain_fraction must be finite, positive, at most 1",
    ),
    (["--retain_fraction=0.01"], "must leave each model 2 other images of 150"),
    (["--set", "scrub.num_epochs=1"], "set must be of the method audited, got"),
    (["--set", "psg.alpha=1"], "the argument in set of psg must be one of"),
    (["--weights=model.pt"], "weights must be None, as an audit"),
    (["--training.num_parts=2"], "training.num_parts must be 1"),
    (["--mode=pmap"], "pmap"),
  ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
  arguments, message, tmp_path, data_dir, capsys
):
  ids = tmp_path / "ids.txt"
  ids.write_text(f"{data.load('digits', 'train').ids[0]}\n")
  line = programs_test.failing(
    capsys,
    audit,
    *SMALL,
    f"--runs_dir={tmp_path / 'runs'}",
    *(each.format(one=ids) for each in arguments),
  )
  assert re.search(message, line)
  assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--num_targets=4"], "num_targets must be as in the audit .* 6, got 4"),
    (["--num_models=20"], "num_models must be as in the audit"),
    (["--seed=1"], "seed must be as in the run that is resumed"),
    ([], "target_accuracy of psg must be as in the models .* 1, got None"),
  ],
)
def test_resuming_something_else_is_refused(runs, arguments, message, capsys):
  line = programs_test.failing(
    capsys,
    audit,
    *(*SMALL, f"--runs_dir={runs}", "--name=one", "--resume", *arguments),
  )
  assert re.search(message, line)


def test_where_psg_ends(runs):
  options = audit.Options(
    recipe="digits", runs_dir=str(runs), name="target", num_train=150,
    num_models=16, twins="ignore",
  )  # fmt: skip
  context = jobs.prepare(options)

  def target(num_targets, **unlearning):
    job = dataclasses.replace(
      options,
      num_targets=num_targets,
      retain_fraction=1.0,
      unlearning=dataclasses.replace(options.unlearning, **unlearning),
    )
    here = context._replace(job=job)
    return audit.of_model(here, audit.draw(job, here), 0)

  num_pool = len(context.split.forget)
  part, whole = target(6), target(num_pool)
  assert part.job.unlearning.target == "unseen"
  assert not contexts.is_class_request(part)
  assert len(part.split.retain) == 144
  assert whole.job.unlearning.target == "zero"
  assert target(6, target="zero").job.unlearning.target == "zero"
