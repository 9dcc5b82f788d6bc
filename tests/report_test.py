import json
import pathlib
import re
import subprocess
import sys
from html import parser
from typing import Any

import numpy as np
import pytest
import sklearn.datasets

from experiments import report
from experiments.pages import figures, headline, panels, tables

_DIGITS = tuple(str(digit) for digit in range(10))
_SECTIONS = (
  "key-figures",
  "examples",
  "comparison",
  "classes",
  "features",
  "curves",
  "confusion",
  "options",
)


def make_run(
  folder: pathlib.Path,
  *,
  class_names: tuple[str, ...] = _DIGITS,
  num_features: int = 40,
  num_channels: int = 1,
  models: tuple[str, ...] = figures.MODELS,
) -> pathlib.Path:
  """Writes a run folder as the programs do, of seeded, made up figures."""
  rng = np.random.default_rng(7)
  num_classes = len(class_names)
  folder.mkdir(parents=True)
  _write(
    folder / "config.json",
    {
      "job": {
        "recipe": "digits",
        "dataset": "digits",
        "model": "all_cnn",
        "width": 0.125,
        "forget_classes": [0],
        "resume": False,
        "data_dir": None,
        "seed": 2022,
        "training": {"num_epochs": 5, "learning_rate": 0.01},
      },
      "versions": {"python": "3.12.3", "jax": "0.10.2"},
      "device": "2 x cpu",
      "git_commit": None,
      "created": "2025-03-04T05:06:07+0000",
      "command": "python -m experiments.demo --width 0.125",
    },
  )
  _write(
    folder / "data.json",
    {
      "class_names": class_names,
      "counts": {
        "train_forget": 142,
        "train_retain": 1295,
        "test_forget": 36,
        "test_retain": 324,
      },
      "request": {"classes": [0]},
    },
  )
  metrics = {m: _metrics(rng, m, num_classes) for m in models}
  if "retrained" not in models:
    for each in metrics.values():
      each.pop("agreement", None)
      each.pop("kl_divergence", None)
    if "unlearned" in models:
      metrics["unlearned"]["relabelling"] |= {
        "agreement_with_retrained": None,
        "retrained_prediction_counts": None,
      }
  _write(folder / "metrics.json", metrics)
  _write(folder / "history.json", {m: _history(rng, m) for m in models})
  _save_examples(folder / "examples.npz", rng, num_classes, num_channels)
  labels = np.arange(num_features) % num_classes
  centres = rng.normal(0, 1.5, (num_classes, 24))
  features = {
    m: (centres[labels] + rng.normal(0, 1, (num_features, 24))).astype("f4")
    for m in models
  }
  forgotten = labels == 0
  for name in set(models) & {"retrained", "unlearned"}:
    near = rng.choice([6 % num_classes, num_classes - 1], forgotten.sum())
    features[name][forgotten] += 0.8 * (centres[near] - centres[0])
  np.savez(
    folder / "features.npz", **features, labels=labels, is_forget=forgotten
  )
  return folder


def _metrics(
  rng: np.random.Generator, model: str, num_classes: int
) -> dict[str, Any]:
  forget = {"original": 0.9815, "retrained": 0.0, "unlearned": 0.0278}[model]
  per_class = np.round(rng.uniform(0.93, 1.0, num_classes), 4).tolist()
  per_class[0] = forget
  matrix = np.zeros((num_classes, num_classes), int)
  for label, share in enumerate(per_class):
    matrix[label, label] = round(36 * share)
    wrong = rng.integers(1, num_classes, 36 - matrix[label, label])
    np.add.at(matrix[label], wrong, 1)
  result: dict[str, Any] = {
    "accuracy": {
      "train_forget": {"original": 1.0, "retrained": 0.0}.get(model, 0.0141),
      "train_retain": {"original": 0.9985, "retrained": 0.9977}.get(
        model, 0.99
      ),
      "test_forget": forget,
      "test_retain": {"original": 0.9691, "retrained": 0.9722}.get(
        model, 0.966
      ),
      "test": {"original": 0.9704, "retrained": 0.875}.get(model, 0.8722),
    },
    "per_class_accuracy": per_class,
    "confusion_matrix": matrix.tolist(),
    "seconds": {"original": 24.61, "retrained": 22.47, "unlearned": 1.582}[
      model
    ],
  }
  splits = ("train_forget", "train_retain", "test_forget", "test_retain")
  if model != "retrained":
    is_original = model == "original"
    values = (
      (0.0, 0.993, 0.0, 0.968)
      if is_original
      else (0.634, 0.984, 0.6111, 0.9599)
    )
    result["agreement"] = dict(zip(splits, values, strict=True))
    divergences = (
      (6.31, 0.0213, 6.12, 0.0817)
      if is_original
      else (1.284, 0.0352, 1.3071, 0.0921)
    )
    result["kl_divergence"] = dict(zip(splits, divergences, strict=True))
  if model == "unlearned":
    counts = rng.multinomial(142, rng.dirichlet(np.ones(num_classes - 1)))
    other = rng.multinomial(142, rng.dirichlet(np.ones(num_classes - 1)))
    result |= {
      "search_seconds": 0.513,
      "update_seconds": 1.069,
      "relabelling": {
        "crossed": 0.993,
        "median_distance": 0.0625,
        "agreement_with_retrained": 0.5845,
        "label_counts": [0, *counts.tolist()],
        "retrained_prediction_counts": [0, *other.tolist()],
      },
    }
  return result


def _history(rng: np.random.Generator, model: str) -> list[dict[str, Any]]:
  rows = []
  for epoch in range(1, 6):
    level = (2.3 if model == "original" else 2.0) * 0.35**epoch
    steps = level * rng.uniform(0.7, 1.6, 45)
    if model == "unlearned":
      rows.append(
        {
          "epoch": epoch,
          "forget_loss": 2 * level,
          "label_accuracy": 1 - level / 4,
          "retain_loss": 0.03 + 0.1 * level,
          "retain_accuracy": 0.99,
          "forget_step_losses": (2 * steps).tolist(),
          "retain_step_losses": (0.03 + 0.1 * steps).tolist(),
          "seconds": 0.2,
        }
      )
    else:
      rows.append(
        {
          "epoch": epoch,
          "loss": level,
          "accuracy": 1 - 0.3 * level,
          "step_losses": steps.tolist(),
          "seconds": 4.5,
        }
      )
  return rows


def _save_examples(
  path: pathlib.Path,
  rng: np.random.Generator,
  num_classes: int,
  num_channels: int,
) -> None:
  digits = sklearn.datasets.load_digits()
  small = digits.images[digits.target == 0][:8] / 16
  images = np.kron(small, np.ones((4, 4)))[..., None].astype(np.float32)
  images = np.repeat(images, num_channels, -1)
  distance = rng.uniform(0.03, 0.09, 8).astype(np.float32)
  change = rng.choice([-1, 0, 1], images.shape) * distance[:, None, None, None]
  moved = np.clip(images + change, 0, 1).astype(np.float32)
  np.savez(
    path,
    images=images,
    boundary=moved,
    old_labels=np.zeros(8, int),
    new_labels=1 + np.arange(8) % (num_classes - 1),
    distance=distance,
    is_crossed=np.arange(8) != 5,
  )


def _write(path: pathlib.Path, content: Any) -> None:
  path.write_text(json.dumps(content))


def _change(path: pathlib.Path, edit: Any) -> None:
  content = json.loads(path.read_text())
  edit(content)
  _write(path, content)


class _Reader(parser.HTMLParser):
  """Collects what the tests look at, and checks that elements are closed."""

  _EMPTY = ("meta", "img", "br", "link")

  def __init__(self) -> None:
    super().__init__(convert_charrefs=True)
    self.ids: list[str] = []
    self.tags: list[str] = []
    self.images: list[dict[str, str | None]] = []
    self.rows: list[list[str]] = []
    self.text = ""
    self._open: list[str] = []

  def handle_starttag(
    self, tag: str, attrs: list[tuple[str, str | None]]
  ) -> None:
    self.tags.append(tag)
    values = dict(attrs)
    if values.get("id"):
      self.ids.append(str(values["id"]))
    if tag == "img":
      self.images.append(values)
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")
    if tag not in self._EMPTY:
      self._open.append(tag)

  def handle_startendtag(
    self, tag: str, attrs: list[tuple[str, str | None]]
  ) -> None:
    self.handle_starttag(tag, attrs)
    self._open.pop() if tag not in self._EMPTY else None

  def handle_endtag(self, tag: str) -> None:
    assert self._open.pop() == tag

  def handle_data(self, data: str) -> None:
    if "style" in self._open:
      return
    self.text += data
    if {"td", "th"} & set(self._open):
      self.rows[-1][-1] += data.strip()

  def close(self) -> None:
    super().close()
    assert not self._open


def _parse(path: pathlib.Path) -> _Reader:
  reader = _Reader()
  reader.feed(path.read_text(encoding="utf-8"))
  reader.close()
  return reader


def _row(page: _Reader, start: str, group: int = 0) -> list[str]:
  """Returns the cells of the `group`-th row whose name begins so."""
  found = [row for row in page.rows if row and row[0].startswith(start)]
  return found[group][1:]


@pytest.fixture
def page_only(monkeypatch: pytest.MonkeyPatch) -> None:
  """Leaves out the files of pictures, where a test is not about them."""
  monkeypatch.setattr(figures, "save", lambda *_, **__: None)
  monkeypatch.setattr(figures, "save_examples", lambda *_: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = make_run(tmp_path_factory.mktemp("runs") / "digits")
  assert report.build(str(folder)) == folder / "report.html"
  return folder


@pytest.fixture(scope="module")
def page(run: pathlib.Path) -> _Reader:
  return _parse(run / "report.html")


def title_of(folder: pathlib.Path) -> str:
  """Returns the headline of a run."""
  run = report.read(folder)
  return headline.headline(run.job, run.data, run.models)[0]


def test_build_writes_page_and_pictures(run, page):
  for section in _SECTIONS:
    assert page.ids.count(section) == 1
  for name in (
    "summary",
    "examples",
    "classes",
    "features",
    "curves",
    "confusion",
  ):
    content = (run / "figures" / f"{name}.png").read_bytes()
    assert content.startswith(b"\x89PNG")
  assert not list(run.glob("*.partial"))
  assert (run / "report.html").stat().st_size < 3_000_000


def test_build_twice_writes_the_same_page(run, page_only):
  before = (run / "report.html").read_bytes()
  report.build(run)
  assert (run / "report.html").read_bytes() == before


def test_headline_and_lede(page):
  assert (
    "Class “0” was taken out of all_cnn trained on digits in 1.58 s,"
    " 14× faster than retraining" in page.text
  )
  assert (
    "accuracy went from 98.2% to 2.8% (a model retrained without them: 0.0%)."
    in (page.text)
  )
  assert "it went from 96.9% to 96.6%" in page.text


@pytest.mark.parametrize(
  ("start", "group", "expected"),
  [
    ("Forget, test", 0, ["98.2%", "0.0%", "2.8%"]),
    ("Retain, training", 0, ["99.9%", "99.8%", "99.0%"]),
    ("All, test", 0, ["97.0%", "87.5%", "87.2%"]),
    ("Forget, training", 1, ["0.0%", "reference", "63.4%"]),
    ("Retain, test", 2, ["0.0817", "reference", "0.0921"]),
    ("Total", 0, ["24.6 s", "22.5 s", "1.58 s"]),
    ("Share of retraining", 0, ["109.5%", "100.0%", "7.0%"]),
    ("– boundary search", 0, ["", "", "0.51 s"]),
    ("– update", 0, ["", "", "1.07 s"]),
  ],
)
def test_comparison_table(page, start, group, expected):
  assert _row(page, start, group) == expected


def test_examples_are_captioned_and_described(page):
  assert len(page.images) == 24
  assert all(image["alt"] for image in page.images)
  assert all(
    str(image["src"]).startswith("data:image/png;base64,")
    for image in page.images
  )
  assert "0 → 3" in page.text
  assert page.text.count("not reached: runner-up class") == 1
  # The typical change is about 0.06, which five times amplified is 0.3.
  assert "amplified 5 times" in page.text


def test_relabelling_and_options(page):
  assert "99.3%" in page.text
  assert "58.5%" in page.text
  assert _row(page, "training.learning_rate") == ["0.01"]
  assert _row(page, "data_dir") == ["none"]
  assert _row(page, "git commit") == ["not available"]
  assert "python -m experiments.demo --width 0.125" in page.text


def test_page_loads_nothing(run, page):
  text = (run / "report.html").read_text()
  assert "http:" not in text
  assert "https:" not in text
  assert not re.search(r"url\((?!#)", text)
  assert not {"script", "link", "iframe", "object"} & set(page.tags)
  # Identifiers are those of one page: parts of one SVG are not another's.
  assert len(page.ids) == len(set(page.ids))


def test_without_retrained(tmp_path, page_only):
  folder = make_run(tmp_path / "run", models=("original", "unlearned"))
  page = _parse(report.build(folder))
  assert _row(page, "Forget, test") == ["98.2%", "2.8%"]
  assert "was unlearned from all_cnn trained on digits in 1.58 s" in page.text
  assert "faster than retraining" not in page.text
  assert "KL divergence" not in page.text
  assert "no reference" in page.text


def test_without_unlearned(tmp_path, page_only):
  folder = make_run(tmp_path / "run", models=("original", "retrained"))
  (folder / "examples.npz").unlink()
  page = _parse(report.build(folder))
  assert _row(page, "Forget, test") == ["98.2%", "0.0%"]
  assert "class “0” has not been taken out yet" in page.text
  assert "examples" not in page.ids
  assert not page.images


def test_null_is_not_available(tmp_path, page_only):
  folder = make_run(tmp_path / "run")

  def edit(metrics: dict[str, Any]) -> None:
    for each in metrics.values():
      each["accuracy"]["test_forget"] = None
      each["per_class_accuracy"][3] = None
    metrics["unlearned"]["agreement"]["test_forget"] = None
    metrics["unlearned"]["kl_divergence"]["test_forget"] = float("inf")

  _change(folder / "metrics.json", edit)
  page = _parse(report.build(folder))
  assert _row(page, "Forget, test") == ["not available"] * 3
  assert _row(page, "Forget, test", 1)[-1] == "not available"
  assert _row(page, "Forget, test", 2)[-1] == "not finite"
  assert _row(page, "3") == ["not available"] * 3
  # The headline is judged by the training images instead.
  assert "On the training images to forget, accuracy went from 100.0%" in (
    page.text
  )


def test_warnings_are_shown(tmp_path, page_only):
  folder = make_run(tmp_path / "run")
  assert "Warning" not in _parse(report.build(folder)).text

  def edit(metrics: dict[str, Any]) -> None:
    metrics["unlearned"]["warnings"] = ["accuracy on test_retain fell"]

  _change(folder / "metrics.json", edit)
  page = _parse(report.build(folder))
  assert "Warning unlearned: accuracy on test_retain fell." in page.text
  # Of earlier versions, and of runs that set no image apart.
  assert "are in no figure" not in page.text


def test_text_is_escaped(tmp_path, page_only):
  names = ('<b>T-shirt</b> & "top"', "$x_1$", *_DIGITS[2:])
  folder = make_run(tmp_path / "run", class_names=names)
  _change(
    folder / "config.json",
    lambda config: config["job"].update(dataset="<script>x</script>"),
  )
  page = _parse(report.build(folder))
  assert not {"b", "script"} & set(page.tags)
  assert names[0] in page.text
  assert "$x_1$" in page.text


def test_many_classes(tmp_path, page_only):
  names = tuple(f"class number {i} of many" for i in range(300))
  folder = make_run(
    tmp_path / "run", class_names=names, num_channels=3, num_features=40
  )
  path = report.build(folder)
  page = _parse(path)
  assert "20 of 300 classes" in page.text
  assert _row(page, names[299])[0].endswith("%")
  assert path.stat().st_size < 3_000_000


def test_failed_unlearning_is_not_called_done(tmp_path):
  folder = make_run(tmp_path / "run")

  def edit(metrics: dict[str, Any]) -> None:
    metrics["unlearned"]["accuracy"]["test_forget"] = 0.9
    metrics["unlearned"]["seconds"] = 44.94

  _change(folder / "metrics.json", edit)
  title = title_of(folder)
  assert title == (
    "Class “0” is still mostly in all_cnn trained on digits after 44.9 s of"
    " unlearning"
  )


@pytest.mark.parametrize(
  ("request_", "expected"),
  [
    ({"classes": [1, 2]}, "Classes “1” and “2” was"),
    ({"classes": list(range(6))}, "Classes “0”, “1”, “2” and 3 more"),
    ({"classes": [4], "fraction": 0.3}, "30% of class “4”"),
    ({"classes": ["4"]}, "Class “4” was"),
    ({"where": "device = 'A'"}, "The part where device = 'A'"),
    ({"ids": ["a", "b"]}, "A set of 142 images"),
  ],
)
def test_request_in_words(tmp_path, request_, expected):
  folder = make_run(tmp_path / "run")
  _change(folder / "data.json", lambda data: data.update(request=request_))
  title = title_of(folder)
  assert title.startswith(expected.replace(" was", ""))


@pytest.mark.parametrize(
  "name",
  [
    "config.json",
    "metrics.json",
    "history.json",
    "data.json",
    "features.npz",
    "examples.npz",
  ],
)
def test_missing_or_broken_file_is_an_error(tmp_path, name):
  folder = make_run(tmp_path / "run")
  path = folder / name
  path.write_bytes(b"not what it should be")
  with pytest.raises(ValueError, match=re.escape(name)):
    report.build(folder)
  path.unlink()
  with pytest.raises(ValueError, match=re.escape(name)):
    report.build(folder)
  assert not (folder / "report.html").exists()


def test_missing_folder_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="nowhere"):
    report.build(tmp_path / "nowhere")


def test_program(tmp_path, page_only, monkeypatch, capsys):
  folder = make_run(tmp_path / "run", num_features=20)
  monkeypatch.setattr(sys, "argv", ["report", str(folder)])
  report.main()
  assert capsys.readouterr().out.strip() == str(folder / "report.html")
  assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_program_ends_in_one_line(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "experiments.report", str(tmp_path)],
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr.startswith("error: run must be a run folder")
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
  ("value", "expected"),
  [
    (0.0, "0.00 s"),
    (9.99, "9.99 s"),
    (9.999, "10.0 s"),
    (99.96, "1 min 40 s"),
    (3599.7, "1 h 0 min"),
    (7260.0, "2 h 1 min"),
    (None, "not available"),
  ],
)
def test_seconds(value, expected):
  assert tables.seconds(value) == expected


@pytest.mark.parametrize(
  ("change", "expected"),
  [(0.05, 10), (0.051, 5), (0.3, 1), (1.0, 1), (0.004, 100), (0.0, 1)],
)
def test_amplification(change, expected):
  images = np.zeros((3, 2, 2, 1))
  factor = figures.amplification(images, images + change)
  assert factor == pytest.approx(expected)
  moved = figures.difference(images, images + change, factor)
  assert moved.min() >= 0.5
  assert moved.max() <= 1.0


def test_choose_classes_keeps_the_forgotten_and_the_changed():
  before = [0.9] * 50
  after = list(before)
  after[30] = 0.1
  chosen = panels.choose_classes({"original": before, "unlearned": after}, [44])
  assert len(chosen) == panels.MAX_BARS
  assert {30, 44} <= set(chosen)
  assert chosen == sorted(chosen)


def test_choose_embedded_keeps_rare_forget_images():
  is_forget = np.arange(5000) < 20
  chosen = figures.choose_embedded(is_forget, max_points=600)
  assert len(chosen) == 600
  assert is_forget[chosen].sum() == 20


@pytest.mark.parametrize(
  "features",
  [np.zeros((3, 4)), np.zeros((30, 4)), np.full((30, 4), np.nan)],
)
def test_embed_without_a_map(features):
  assert figures.embed(features) is None
