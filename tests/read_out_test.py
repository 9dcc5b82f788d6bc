"""The clinical figures of a run, with answers that are known."""

import json

import numpy as np
import pytest

from experiments import read_out, report
from experiments.pages import clinical, figures, tables
from psg_jax import diagnosis, types, unlearning
from tests import report_test

_NAMES = ("well", "ill")


def _part(prefix: str, labels: list[int]) -> types.Dataset:
  count = len(labels)
  images = np.arange(count, dtype=np.uint8)[:, None, None, None]
  ids = np.array([f"{prefix}{i}" for i in range(count)])
  return types.Dataset(
    np.broadcast_to(images, (count, 4, 4, 1)).copy(),
    np.array(labels, np.int32),
    _NAMES,
    ids,
  )


def _logits(predictions: list[int], sureness: float = 2.0) -> np.ndarray:
  return sureness * np.eye(2)[predictions]


@pytest.fixture
def parts() -> dict[str, types.Dataset]:
  return {
    "train_forget": _part("f", [0, 1, 0, 1]),
    "train_retain": _part("r", [0, 0, 1, 1]),
    "test_forget": _part("g", [0, 1]),
    "test_retain": _part("t", [0, 0, 0, 0, 1, 1]),
  }


@pytest.fixture
def logits() -> dict[str, dict[str, np.ndarray]]:
  right = {
    "train_forget": _logits([0, 1, 0, 1]),
    "train_retain": _logits([0, 0, 1, 1]),
    "test_forget": _logits([0, 1]),
    "test_retain": _logits([0, 0, 0, 1, 1, 1]),
  }
  after = {
    **right,
    "train_retain": _logits([0, 1, 1, 1]),
    # Image t3 is mended; t0, and more surely t5, turn wrong.
    "test_retain": np.array([[0.0, 1], [1, 0], [1, 0], [1, 0], [0, 1], [3, 0]]),
  }
  return {"original": right, "unlearned": after}


def test_figures_equal_counts_by_hand(parts, logits):
  found = read_out.figures(parts, logits, ())
  before, after = (
    found[model]["clinical"] for model in ("original", "unlearned")
  )
  # Retained test images: well 3 of 4 found, ill 2 of 2.
  assert before["sensitivity"]["per_class"] == [0.75, 1.0]
  assert before["specificity"]["per_class"] == [1.0, 0.75]
  assert after["sensitivity"]["per_class"] == [0.75, 0.5]
  assert after["sensitivity"]["value"] == 0.625
  assert after["harmed_test_retain"]["num_harmed"] == 2
  assert after["harmed_test_retain"]["num_right"] == 5
  assert after["harmed_test_retain"]["value"] == pytest.approx(0.4)
  assert after["harmed_train_retain"]["value"] == pytest.approx(0.25)
  missed = after["false_negatives"]["per_class"]
  assert [(x["before"], x["after"]) for x in missed] == [(1, 1), (0, 1)]
  # What compares with the original is no figure of the original.
  assert "harmed_test_retain" not in before
  assert "false_negatives" not in before
  json.dumps(found)


def test_what_cannot_be_computed_says_why(parts, logits):
  attacks = read_out.figures(parts, logits, ())["unlearned"]["membership"]
  for name in read_out.ATTACKS:
    # Two non-members are too few for any attack.
    assert attacks[name]["value"] is None
    assert "needed" in attacks[name]["reason"]


def test_reasons_and_non_members_are_said():
  figure = {"value": None, "reason": "none of 5 groups has 10 images"}
  attack = {"value": 0.5, "non_members": "test_retain"}
  metrics = {
    "original": {
      "clinical": {"worst_subgroup": {"reason": figure}},
      "membership": {"mia_loss_auc": attack},
    }
  }
  assert clinical.reasons(tables.Models(metrics)) == [
    "none of 5 groups has 10 images"
  ]
  assert "which may differ" in (
    clinical.non_members(tables.Models(metrics)) or ""
  )
  attack["non_members"] = "test_forget"
  assert clinical.non_members(tables.Models(metrics)) is None


def test_attacks_say_how_far_chance_goes():
  attack = {"value": 0.4, "num_samples": 36}
  metrics = {"original": {"membership": {"mia_loss_auc": attack}}}
  # Two of sqrt(73 / 15552) = 0.0685.
  ideal = clinical.attack_ideal(tables.Models(metrics))
  assert ideal == "≈ ideal: as retrained, 0.5; 36 images a side, chance ±0.14"
  assert (
    clinical.attack_ideal(tables.Models({})) == "≈ ideal: as retrained, 0.5"
  )


def test_logits_that_are_not_finite_list_no_flips(parts, logits, tmp_path):
  broken = {x: np.full_like(y, np.nan) for x, y in logits["original"].items()}
  read_out.save_flips(tmp_path, parts, {**logits, "unlearned": broken})
  assert read_out.read_flips(tmp_path) == []


def test_flips_are_listed_surest_first_and_test_images_before(
  parts, logits, tmp_path
):
  read_out.save_flips(tmp_path, parts, logits)
  rows = read_out.read_flips(tmp_path)
  assert rows is not None
  assert [row["id"] for row in rows] == ["t5", "t0", "r1"]
  assert [row["part"] for row in rows] == [
    *("test_retain", "test_retain", "train_retain")
  ]
  assert rows[0] == {
    "part": "test_retain",
    "id": "t5",
    "label": "ill",
    "original_prediction": "ill",
    "unlearned_prediction": "well",
    "unlearned_probability": "0.9526",
  }
  with np.load(tmp_path / "flips.npz") as found:
    # Images carry their row as their grey value.
    assert found["images"][:, 0, 0, 0].tolist() == [5, 0, 1]
  assert not list(tmp_path.glob("*.partial"))


def test_no_flips_leave_an_empty_list(parts, logits, tmp_path):
  same = {**logits, "unlearned": logits["original"]}
  read_out.save_flips(tmp_path, parts, same)
  assert read_out.read_flips(tmp_path) == []
  with np.load(tmp_path / "flips.npz") as found:
    assert found["images"].shape == (0, 4, 4, 1)


def test_a_run_of_before_has_no_flips(tmp_path):
  assert read_out.read_flips(tmp_path) is None


@pytest.mark.parametrize("has_retrained", [True, False])
def test_judge_names_what_was_not_forgotten(has_retrained):
  forget = {"train_forget": 1.0, "test_forget": 1.0}
  retain = {"train_retain": 0.9, "test_retain": 0.9}
  never_seen = {"train_forget": 0.0, "test_forget": 0.0}
  accuracies = {
    "original": {**forget, **retain},
    "unlearned": {**forget, **retain},
  }
  if has_retrained:
    accuracies["retrained"] = {**never_seen, **retain}
  count = 10
  found = read_out.judge(
    accuracies,
    unlearning.Relabelling(
      labels=np.ones(count, np.int32),
      logits=np.zeros((count, 3), np.float32),
      is_crossed=np.zeros(count, bool),
      distance=np.zeros(count, np.float32),
      num_steps=np.zeros(count, np.int32),
    ),
    None,
    history=(),
    options={"num_steps": 1},
    is_class=True,
    num_classes=3,
  )
  assert found["diagnosis"]["verdict"] == diagnosis.NOTHING
  settings = [x["setting"] for x in found["diagnosis"]["findings"]]
  assert settings[0] is not None
  claims = found["claims"]
  about = [x for x in claims["cannot"] if "retrained model" in x]
  assert any("agreement" in x for x in about) is not has_retrained


def test_page_shows_figures_and_pictures(parts, logits, tmp_path, monkeypatch):
  monkeypatch.setattr(figures, "save", lambda *_, **__: None)
  monkeypatch.setattr(figures, "save_examples", lambda *_: None)
  folder = report_test.make_run(
    tmp_path / "run", class_names=_NAMES, models=("original", "unlearned")
  )
  content = json.loads((folder / "metrics.json").read_text())
  for name, each in read_out.figures(parts, logits, ()).items():
    content[name] |= each
  content["unlearned"] |= {
    "diagnosis": {
      "verdict": "harmed",
      "findings": [{"verdict": "harmed", "evidence": "<b>", "advice": "wait"}],
    },
    "claims": {"can": ["this"], "cannot": ["that"]},
  }
  (folder / "metrics.json").write_text(json.dumps(content))
  read_out.save_flips(folder, parts, logits)
  page = report.build(folder).read_text()
  for section in ("clinical", "flips", "judgement"):
    assert page.count(f'<section id="{section}"') == 1
  assert "40.0% (2 of 5)" in page
  assert "95% sure · test: t5" in page
  assert "2 test images and 1 training images" in page
  assert "&lt;b&gt;" in page
  assert "Diagnosis: harmed" in page
  assert "✗ that" in page


def test_worst_subgroup_names_the_group():
  figure = {"value": 0.5, "group": "B", "num_images": 12}
  metrics = {
    "original": {"clinical": {"worst_subgroup": {"device": figure}}},
    "unlearned": {"clinical": {"worst_subgroup": {"device": {"value": None}}}},
  }
  found = clinical.read_out(tables.Models(metrics), _NAMES)
  assert found is not None
  (group,) = found["summary"].groups
  row = next(x for x in group.rows if "device" in x.head.text)
  assert [x.text for x in row.cells] == ["50.0% (B, 12)", "not available"]
