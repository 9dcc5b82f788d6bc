"""Files that appear as a whole or not at all, and pages from templates."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file; one of before is replaced."""
  partial = path.with_suffix(".partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


def save_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """Writes an npz file; one of before is replaced."""
  partial = path.with_suffix(".partial.npz")
  np.savez(partial, **arrays)
  os.replace(partial, path)


def write_page(path: pathlib.Path, template: str, **values: Any) -> None:
  """Fills a template of this folder, escaping values, and writes the page.

  Args:
    path: The page.
    template: The template's file name.
    **values: What it names; all of it must be given.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  write_text(path, environment.get_template(template).render(**values))
