"""`brain_tumor_mri`: 7,023 MRI slices of three kinds of tumour, and of none.

The archive's folders `Training` and `Testing` are the splits. It holds exact
copies of images, some of them on both sides: see the column `sha256`.

References:
  M. Nickparvar. Brain Tumor MRI Dataset. Kaggle, 2021.
"""

import pathlib
import types

from data_prep import image_tree, sources

CLASS_NAMES = ("glioma", "meningioma", "notumor", "pituitary")
URL = "https://www.kaggle.com/datasets/masoudnickparvar/brain-tumor-mri-dataset"
_FOLDERS = {"train": "Training", "test": "Testing"}


class PsgBrainTumorMri(image_tree.ImageTreeBuilder):
  """Keeps the archive's split; rows are shuffled with a fixed seed."""

  DESCRIPTION = "Magnetic resonance images of brains with and without tumour."
  FACTS = types.MappingProxyType({"homepage": URL, "license": "CC0"})

  def make_plan(self, source: pathlib.Path) -> image_tree.Plan:
    """Lists the four class folders of both splits."""
    tree = sources.open_tree(source, tuple(_FOLDERS.values()))
    splits = {
      split: sources.labelled_images(tree, folder, CLASS_NAMES)[1]
      for split, folder in _FOLDERS.items()
    }
    return image_tree.Plan(tree, CLASS_NAMES, splits)

  def advice(self) -> str:
    """Returns where the archive is to be had."""
    return f", such as the archive from {URL}"
