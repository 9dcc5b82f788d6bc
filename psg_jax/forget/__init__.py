"""Which images to forget: requests, their splits, previews and hashes.

A request combines classes, an SQL condition over the metadata, and ids. It can
be stored as a file, and its hash together with the hash of the forgotten ids
states what was asked for and what it meant.
"""

from psg_jax.forget.columns import group_codes
from psg_jax.forget.previews import Counts, GroupPreview, Preview, preview
from psg_jax.forget.requests import (
  Request,
  class_indices,
  ids_hash,
  matching,
  request_hash,
  split,
  split_request,
)

__all__ = [
  "Counts",
  "GroupPreview",
  "Preview",
  "Request",
  "class_indices",
  "group_codes",
  "ids_hash",
  "matching",
  "preview",
  "request_hash",
  "split",
  "split_request",
]
