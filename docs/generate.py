"""What is generated of the site: tables in its pages, the API, the notebooks.

    python docs/generate.py

renews the tables between the marks of docs/*.md from the registries of the
code, docs/comparison.md and docs/figures.json. `make docs` takes this file as a
hook of MkDocs, which adds a page for each module and for each notebook; for
that nothing of the library is imported.
"""

import ast
import csv
import json
import pathlib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)
_ARROWS = {"up": "↑", "down": "↓", "as_retrained": "≈"}
_RANGES = {"share": "0 to 1", "nats": "0 or more, nats", "steps": "steps"}
_FIRST = "Retrained", "Original", "**PSG**"


def main() -> None:
  """Renews the tables of all pages."""
  for path in (*sorted(DOCS.glob("*.md")), ROOT / "README.md"):
    before = path.read_text()
    after = renewed(before)
    if after != before:
      path.write_text(after)
      print(path)


def renewed(page: str) -> str:
  """Returns a page with its generated parts made anew."""
  return _BLOCK.sub(
    lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", page
  )


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  lines = [heads, ["---"] * len(heads), *rows]
  return "\n".join(
    f"| {' | '.join(str(x).replace('|', chr(92) + '|') for x in line)} |"
    for line in lines
  )


def _summary(fn: Any) -> str:
  return (fn.__doc__ or "").partition("\n")[0]


def _request(job: Any) -> str:
  """What a recipe forgets, in words."""
  if job.forget_classes:
    return f"class {', '.join(map(str, job.forget_classes))}"
  if job.where:
    return f"`{job.where}`"
  return "what you say"


def recipes() -> str:
  """The recipes: data, network, request and training."""
  from experiments import recipes

  rows = []
  for name, job in recipes.JOBS.items():
    training = job.training
    images = "your images" if name == "own" else job.dataset
    if job.num_train:
      images = f"{images}, the first {job.num_train:,}"
    rows.append(
      (
        *(f"`{name}`", images),
        f"{job.model} × {job.width:g}" if job.width != 1 else job.model,
        _request(job),
        f"{training.num_epochs} epochs of {training.batch_size},"
        f" {training.learning_rate:g} {training.schedule}",
      )
    )
  heads = ("recipe", "images", "network", "forgets", "training")
  return _table(heads, rows)


def unlearning() -> str:
  """What the unlearning recipes change of the default."""
  import dataclasses

  from experiments import recipes

  default = dataclasses.asdict(recipes.UNLEARNING["default"])
  rows = [
    (
      f"`{name}`",
      "; ".join(
        f"`{option} {value}`"
        for option, value in dataclasses.asdict(options).items()
        if value != default[option]
      )
      or "the defaults",
    )
    for name, options in recipes.UNLEARNING.items()
  ]
  return _table(("`--method`", "what differs from the default"), rows)


def results() -> str:
  """Of each published comparison: retraining, the original, and PSG."""
  columns = {
    "Forget accuracy": "forget",
    "Retain accuracy": "retain",
    "Normalised KL, forget": "KL, forget",
    "Normalised KL, retain": "KL, retain",
    "Time": "time",
  }
  rows = []
  for section in _comparisons():
    title = section.partition("\n")[0].strip()
    link = f"[{title}](comparison.md#{slug(title)})"
    for cells in _rows_of(section):
      if cells[""] in _FIRST:
        values = [
          next((v for k, v in cells.items() if k.startswith(name)), "")
          for name in columns
        ]
        rows.append((link, cells[""], *values))
        link = ""
  return _table(("", "", *columns.values()), rows)


def _comparisons() -> list[str]:
  """The sections of comparison.md that have the yardstick."""
  text = (DOCS / "comparison.md").read_text()
  sections = re.split(r"^## ", text, flags=re.M)[1:]
  return [x for x in sections if "| Yardstick |" in x]


def _rows_of(section: str) -> list[Mapping[str, str]]:
  """The rows of the first table of a section, by the head of the column."""
  lines = re.findall(r"^\|.*\|$", section, flags=re.M)
  heads, _, *rows = (
    [cell.strip() for cell in line.strip("|").split("|")] for line in lines
  )
  return [dict(zip(heads, row, strict=False)) for row in rows]


def slug(title: str) -> str:
  """Returns the anchor that a title has on the site."""
  return re.sub(r"[^\w]+", "-", title.lower()).strip("-")


def metrics() -> str:
  """The metrics, those that differ in the part of the data in one line."""
  from psg_jax import metrics

  groups: dict[tuple[str, ...], list[str]] = {}
  for metric in metrics.METRICS.values():
    part = next(
      (x for x in metrics.SPLITS if metric.name.endswith(f"_{x}")), ""
    )
    name = metric.name.removesuffix(f"_{part}")
    title = metric.title
    if part:
      title = re.sub(r" \((forget|retain), (training|test)\)$", "", title)
    key = (
      f"`{name}`",
      f"{title}; {metric.source}" if metric.source else title,
      f"{_ARROWS[metric.direction]} {_ideal(metric.ideal)}",
      _RANGES.get(metric.unit, "its own"),
      ", ".join(sorted(_needs(metric))) or "–",
    )
    groups.setdefault(key, []).append(part)
  rows = [(*key[:2], _parts(parts), *key[2:]) for key, parts in groups.items()]
  heads = ("metric", "what; from", "of", "best", "range", "needs")
  return _table(heads, rows)


def _ideal(ideal: float | str) -> str:
  return ideal if isinstance(ideal, str) else f"{ideal:g}".replace("inf", "∞")


def _needs(metric: Any) -> set[str]:
  """What there must be beside the model's logits and the labels."""
  firsts = {
    need.removeprefix("model.").partition(".")[0] for need in metric.needs
  }
  return firsts - {"labels", "logits"}


def _parts(parts: list[str]) -> str:
  if len(parts) == 4:
    return "all four parts"
  return ", ".join(part.replace("_", " ") for part in parts if part) or "–"


def checks() -> str:
  """The checks of models, with the false alarms that were counted."""
  from psg_jax import traces

  counted = _figures()
  rows = []
  table = (*traces.CHECKS, traces.probe(), traces.relearning(1.0))
  for check in table:
    key = f"{check.name}/{check.split}"
    number = counted["false_alarms"].get(key)
    rows.append(
      (
        *(f"`{check.name}`", check.split.replace("_", " "), check.title),
        "outside, on either side" if check.direction == "both" else "above",
        "yes" if check.needs_original else "no",
        "not counted"
        if number is None
        else f"{number} of {counted['num_retrained']}",
        check.source or "–",
      )
    )
  heads = (
    *("check", "images", "what is read", "evidence where a model is"),
    *("needs the original", "false alarms", "source"),
  )
  return _table(heads, rows)


def alarms() -> str:
  """What was counted of all checks together, in words."""
  counted = _figures()
  number = counted["num_retrained"]
  lines = [
    f"- The digits, {number} retrained models (`{counted['command']}`), each"
    f" judged by the others: the checks of the table, at a level of"
    f" {100 * counted['level']:g} % each, reject"
    f" {counted['rejected_by_any']} of {number} by one check or more. The"
    f" unlearned model is rejected by {len(counted['against_unlearned'])} of"
    f" {len(counted['false_alarms'])} checks."
  ]
  for section in _comparisons():
    title = section.partition("\n")[0].strip()
    (sentence,) = re.findall(
      r"^(\d+ retrained models: .*)$", section, flags=re.M
    )
    lines.append(f"- The yardstick, {title}: {sentence}")
  return "\n".join(lines)


def _figures() -> dict[str, Any]:
  figures: dict[str, Any] = json.loads((DOCS / "figures.json").read_text())
  return figures


def methods() -> str:
  """All methods, with a line of each docstring."""
  from psg_jax import baselines

  rows = [
    (
      f"`{name}`",
      method.title,
      _summary(method.fn),
      method.paper,
      ", ".join(f"`{x}`" for x in method.needs) or "–",
    )
    for name, method in baselines.METHODS.items()
  ]
  return _table(("name", "title", "what it does", "from", "also needs"), rows)


def experiments() -> str:
  """The experiments of the paper, what they took and where they were run."""
  from experiments.pages import tables
  from experiments.reproduction import catalogue, results

  rows = []
  for name, experiment in catalogue.EXPERIMENTS.items():
    expected = results.read(name, "cpu")
    took = where = "–"
    if expected is not None:
      took = tables.seconds(expected["seconds"])
      where = expected["origin"]["date"]
    rows.append((f"`{name}`", experiment.title, took, where))
  return _table(("name", "what", "time at `cpu`", "measured"), rows)


def reproduced() -> str:
  """What experiments over models gave at size cpu, a table each."""
  from experiments.pages import experiment as page
  from experiments.reproduction import catalogue, results

  parts = []
  for name, experiment in catalogue.EXPERIMENTS.items():
    expected = results.read(name, "cpu")
    if expected is None or "step" in experiment.by:
      continue
    heads, *rows = page.lines(experiment, expected["rows"])
    parts += [f"### {experiment.title}", "", experiment.note, ""]
    if sentence := " ".join(page.statements(expected["rows"])):
      parts += [sentence, ""]
    parts += [_table(heads, rows), ""]
  return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip()


_CLASSES = {
  "fashion_mnist_classes": "Fashion-MNIST, each of ten classes",
  "cifar10_classes": "CIFAR-10, each of ten classes",
  "mri": "Brain MRI, glioma, three seeds",
  "cfp_os": "Fundus photographs, a disease, three seeds",
}


def summary() -> str:
  """Of class forgetting: both models, ours and theirs, a line a data set."""
  from experiments.pages import experiment as page
  from experiments.reproduction import catalogue, results

  parts = ("forget", "retain")

  def pair(values: Iterable[float | None]) -> str:
    return " / ".join(page.show("accuracy", x) for x in values)

  rows = []
  for name, title in _CLASSES.items():
    expected = results.read(name, "cpu")
    if expected is None:
      continue
    figures = {row.key["model"]: row.figures for row in expected["rows"]}
    published = {
      (x.row["model"], x.figure): x.value
      for x in catalogue.EXPERIMENTS[name].published
    }
    accuracies = {
      model: pair(values[f"accuracy_test_{x}"].mean for x in parts)
      for model, values in figures.items()
    }
    ours, theirs = figures["recommended"], figures["released"]
    distances = (
      page.mean_sd(x, ours.get(x, results.NOTHING))
      for x in (f"normalised_kl_divergence_test_{part}" for part in parts)
    )
    rows.append(
      (
        *(title, accuracies["retrained"], accuracies["released"]),
        page.show("kl", theirs["kl_divergence_test_forget"].mean),
        pair(published.get(("released", f"accuracy_test_{x}")) for x in parts),
        accuracies["recommended"],
        f"**{page.show('kl', ours['kl_divergence_test_forget'].mean)}**",
        *distances,
      )
    )
  heads = (
    *("", "retrained", "released code", "KL", "published for it"),
    *("recommended", "KL", "normalised, forget", "normalised, retain"),
  )
  return _table(heads, rows)


def sources() -> str:
  """Of each source or device: what proxies expect, and what came of it."""
  from experiments.pages import experiment as page
  from experiments.reproduction import designs, results

  expected = results.read("sources", "cpu")
  if expected is None:
    return "(not measured)"
  models = ("retrained", designs.AGAIN, "original", "recommended", "proxies")
  by_request: dict[str, dict[str, Any]] = {}
  for row in expected["rows"]:
    model = by_request.setdefault(row.key["request"], {})
    model[row.key["model"]] = row.figures
  rows = []
  for request, figures in by_request.items():
    low, value, high = (
      page.show(name, figures["proxies"][name].mean)
      for name in ("expected_low", "expected_accuracy", "expected_high")
    )
    distances = (
      page.show("normalised_", figures[name][_DISTANCE].mean)
      for name in ("recommended", "proxies")
    )
    accuracies = (
      page.show("accuracy", figures[name]["accuracy_train_forget"].mean)
      for name in models
    )
    rows.append(
      (request, f"{value} ({low} to {high})", *accuracies, *distances)
    )
  heads = ("forgotten", "proxies expect", *models[:3], "default", "by proxies")
  return _table((*heads, "KL, default", "KL, by proxies"), rows)


_DISTANCE = "normalised_kl_divergence_train_forget"


def refits() -> str:
  """Of new last layers: how far targets were, by what was tried."""
  path = pathlib.Path(__file__).parent / "tuning" / "refits.csv"
  with path.open(newline="") as file:
    trials = list(csv.DictReader(file))
  names = ("layers", "steps", "batch_size", "learning_rate", "copies")
  problems = ("fashion_mnist", "cifar10, size cpu", "brain_tumor_mri")
  groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
  for trial in trials:
    if trial["problem"].startswith(problems):
      key = tuple(trial[name] for name in names)
      groups.setdefault(key, []).append(trial)
  most = max(map(len, groups.values()))
  rows = [
    (
      *key,
      *(
        f"{statistics.geometric_mean(float(x[name]) for x in group):.2f}"
        for name in ("without", "half", "alone")
      ),
    )
    for key, group in groups.items()
    if key[2] == "16" and len(group) == most
  ]
  heads = ("layers", "steps", "batch", "rate", "copies")
  return _table((*heads, "without", "half of targets", "alone"), rows)


def claims() -> str:
  """What can be said with how many retrained models."""
  from psg_jax import verification

  numbers = range(4)
  known = {number: verification.claims(number) for number in numbers}
  texts = list(dict.fromkeys(x for n in numbers for x in known[n].can))
  rows = [
    (text, next(n for n in numbers if text in known[n].can)) for text in texts
  ]
  never = "\n".join(f"- {text}" for text in known[3].cannot)
  return (
    f"{_table(('can be said', 'retrained models, at least'), rows)}\n\n"
    f"And never, from one training run:\n\n{never}"
  )


BLOCKS = {
  fn.__name__: fn
  for fn in (
    *(recipes, unlearning, results, metrics, checks, alarms),
    *(methods, claims, experiments, reproduced, refits, sources, summary),
  )
}
"""What stands between the marks of each name."""


def on_config(config: Any) -> Any:
  """Adds the pages of the API to the navigation; a hook of MkDocs."""
  config.nav.append({"API": ["api/index.md", *sorted(_api_pages())]})
  return config


def on_files(files: Any, config: Any) -> Any:
  """Adds pages for modules and notebooks; a hook of MkDocs."""
  from mkdocs.structure import files as mkdocs_files

  pages = {**_api_pages(), "api/index.md": _api_index(), **_notebook_pages()}
  for name, content in pages.items():
    files.append(mkdocs_files.File.generated(config, name, content=content))
  return files


def _modules() -> dict[str, str]:
  """Summaries of the library's public modules by their names."""
  summaries = {}
  for path in sorted((ROOT / "psg_jax").rglob("*.py")):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
      parts = parts[:-1]
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    summaries[".".join(parts)] = docstring.partition("\n")[0]
  return summaries


def _api_pages() -> dict[str, str]:
  return {
    f"api/{name}.md": f"# {name}\n\n::: {name}\n    options:\n"
    "      show_root_heading: false\n      show_root_toc_entry: false\n"
    for name in _modules()
    if name != "psg_jax"
  }


def _api_index() -> str:
  rows = [
    (f"[`{name}`]({name}.md)", summary)
    for name, summary in _modules().items()
    if name != "psg_jax"
  ]
  return (
    "# API\n\n`psg_jax` has `fit`"
    " ([`training.train`](psg_jax.training.md)), `search`"
    " ([`boundary.search`](psg_jax.boundary.md)), `split`"
    " ([`forget.split`](psg_jax.forget.requests.md)), `unlearn`"
    " ([`unlearning.unlearn`](psg_jax.unlearning.md)), `evaluate`"
    " ([`evaluation.evaluate`](psg_jax.evaluation.md)) and its modules, which"
    f" are imported when they are asked for.\n\n{_table(('', ''), rows)}\n"
  )


def _notebook_pages() -> dict[str, str]:
  return {
    f"notebooks/{path.stem}.md": notebook(json.loads(path.read_text()))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
  }


def notebook(content: Mapping[str, Any]) -> str:
  """Returns a notebook as a page: its text, its code, and what it printed."""
  parts = []
  for cell in content["cells"]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
      parts.append(source)
      continue
    parts.append(f"```python\n{source}\n```")
    for output in cell.get("outputs", ()):
      data = output.get("data", {})
      if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        parts.append(f'<img alt="" src="data:image/png;base64,{picture}">')
      elif text := "".join(output.get("text", data.get("text/plain", ""))):
        parts.append(f"```text\n{text.rstrip()}\n```")
  return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
  main()
