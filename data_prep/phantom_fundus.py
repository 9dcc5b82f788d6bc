"""`phantom_fundus`: drawn retinas with disease, device, patient, eye and date.

No photograph and no person is in it: a seeded generator draws fundi so that
requests by device, patient, eye, date or measurement can be tried, and tested,
where no data may be shared. Glaucoma shows in a large cup of the optic disc,
diabetic retinopathy in haemorrhages (dark red) and exudates (yellow). The disc
is on the nose's side: right in a right eye (OD), left in a left one (OS). Each
device has its colour cast, vignette, magnification and noise. Some values are
missing, as in real records.
"""

import datetime
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFilter

from data_prep import builder, threads

CLASS_NAMES = ("diabetic_retinopathy", "glaucoma", "healthy")
NUM_PATIENTS = {"train": 375, "test": 100}
"""Of 2 to 6 images each: about 1,500 and 400 in all."""
_SEED = 0
_FIRST_DAY = datetime.date(2012, 1, 1)
_NUM_DAYS = 9 * 365
# Drawn this much larger, and averaged, up to the pixels of the last line.
_OVERSAMPLING = 3
_MAX_DRAWN = 2048


class Device(NamedTuple):
  """How a camera's pictures look.

  Attributes:
    cast: Factor of red, green and blue.
    vignette: Part of the light that is lost at the edge, in [0, 1].
    zoom: Magnification.
    noise: Standard deviation, in pixels in [0, 1].
  """

  cast: tuple[float, float, float]
  vignette: float
  zoom: float
  noise: float


DEVICES = {
  "Cirrus 800 FA": Device((1.00, 1.00, 1.00), 0.25, 1.00, 0.015),
  "Visulux 200": Device((0.86, 1.12, 1.25), 0.10, 0.90, 0.030),
  "RetiCam NW6": Device((1.12, 0.84, 0.70), 0.55, 1.08, 0.045),
}


class Exam(NamedTuple):
  """One picture to be drawn, with all that is true of it.

  Attributes:
    label: Index of the disease.
    columns: Metadata, None where the record lacks it.
    eye: OD or OS, even where the record lacks it.
    device: Name, likewise.
    cup_to_disc: Diameter of the cup in that of the disc, likewise.
    patient_seed: Of what all pictures of a patient's eye share.
    seed: Of what this picture has of its own.
  """

  label: int
  columns: dict[str, Any]
  eye: str
  device: str
  cup_to_disc: float
  patient_seed: int
  seed: int


class PsgPhantomFundus(builder.ImageBuilder):
  """Draws all pictures; patients are on one side of the split."""

  OPTIONS = frozenset({"size"})

  def _info(self) -> tfds.core.DatasetInfo:
    return self.image_info(
      description="Drawings of retinas with disease, device and patient.",
      class_names=CLASS_NAMES,
      image_shape=(self.size, self.size, 3),
      origin="a seeded generator",
      columns={
        "device": pa.string(),
        "patient_id": pa.string(),
        "eye": pa.string(),
        "exam_date": pa.date32(),
        "left_vert_pf": pa.float64(),
        "right_vert_pf": pa.float64(),
        "cup_to_disc": pa.float64(),
      },
    )

  def splits(self) -> builder.Splits:
    """Makes up the exams, which are drawn one by one."""
    self.refuse_source("is generated")
    return {
      split: (self._examples(split, exams), len(exams))
      for split, exams in make_exams().items()
    }

  def _examples(
    self, split: str, exams: list[Exam]
  ) -> Iterator[builder.Example]:
    drawn = threads.ordered_map(lambda exam: draw(exam, self.size), exams)
    for row, (exam, image) in enumerate(drawn):
      yield builder.Example(
        image=image,
        label=exam.label,
        id=f"{split}/{row:06d}",
        columns=exam.columns,
      )


def make_exams() -> dict[str, list[Exam]]:
  """Makes up the patients and their pictures.

  Returns:
    Split -> pictures in random order, the same on every machine.
  """
  generator = np.random.default_rng(_SEED)
  # So that a patient's number says nothing about the split.
  numbers = iter(generator.permutation(sum(NUM_PATIENTS.values())).tolist())
  exams = {}
  for split, count in NUM_PATIENTS.items():
    rows = [
      exam
      for index in range(count)
      for exam in _patient(generator, next(numbers), index % len(CLASS_NAMES))
    ]
    exams[split] = [rows[row] for row in generator.permutation(len(rows))]
  return exams


def _patient(
  generator: np.random.Generator, number: int, label: int
) -> list[Exam]:
  """Makes 2 to 6 pictures of a patient: one to three visits, both eyes."""
  is_glaucoma = CLASS_NAMES[label] == "glaucoma"
  # They overlap: as in patients, some cases cannot be told from one picture.
  middle, spread = (0.68, 0.09) if is_glaucoma else (0.38, 0.09)
  cups = generator.normal(middle, spread, 2)
  opening = generator.normal(9.0, 1.5, 2)
  exams = []
  for _ in range(int(generator.integers(1, 4))):
    device = str(generator.choice(list(DEVICES)))
    day = _FIRST_DAY + datetime.timedelta(int(generator.integers(_NUM_DAYS)))
    measured = np.clip(opening + generator.normal(0.0, 0.2, 2), 4.0, 14.0)
    for side, eye in enumerate(("OS", "OD")):
      cup = float(np.clip(cups[side] + generator.normal(0, 0.01), 0.1, 0.95))
      columns = {
        "device": device,
        "patient_id": f"P{number:04d}",
        "eye": eye,
        "exam_date": day,
        "left_vert_pf": round(float(measured[0]), 2),
        "right_vert_pf": round(float(measured[1]), 2),
        "cup_to_disc": round(cup, 2),
      }
      exams.append(
        Exam(
          label=label,
          columns=_forget_some(generator, columns),
          eye=eye,
          device=device,
          cup_to_disc=cup,
          patient_seed=2 * number + side,
          seed=int(generator.integers(2**32)),
        )
      )
  return exams


MISSING = {
  "device": 0.02,
  "patient_id": 0.03,
  "eye": 0.03,
  "exam_date": 0.05,
  "left_vert_pf": 0.12,
  "right_vert_pf": 0.12,
  "cup_to_disc": 0.10,
}


def _forget_some(
  generator: np.random.Generator, columns: dict[str, Any]
) -> dict[str, Any]:
  chances = generator.random(len(columns))
  return {
    name: None if chance < MISSING[name] else value
    for (name, value), chance in zip(columns.items(), chances, strict=True)
  }


def draw(exam: Exam, size: int) -> Image.Image:
  """Draws a picture.

  Args:
    exam: What to draw.
    size: Pixels a side.

  Returns:
    The RGB picture.
  """
  device = DEVICES[exam.device]
  shot = np.random.default_rng(exam.seed)
  factor = max(1, min(_OVERSAMPLING, _MAX_DRAWN // size))
  canvas = _Canvas(size * factor, device.zoom, is_mirrored=exam.eye == "OS")
  _draw_eye(canvas, np.random.default_rng(exam.patient_seed), exam.cup_to_disc)
  if CLASS_NAMES[exam.label] == "diabetic_retinopathy":
    _draw_lesions(canvas, np.random.default_rng([exam.patient_seed, 1]))
  drawn = canvas.image.reduce(factor) if factor > 1 else canvas.image
  return _photograph(drawn, device, shot)


class _Canvas:
  """Draws in units of the fundus's radius, from the centre, nose right."""

  def __init__(self, size: int, zoom: float, *, is_mirrored: bool) -> None:
    self.size = size
    self._scale = zoom * size / 2
    self._sign = -1 if is_mirrored else 1
    self.image = Image.new("RGB", (size, size))

  def _point(self, x: float, y: float) -> tuple[float, float]:
    centre = self.size / 2
    return centre + self._sign * x * self._scale, centre + y * self._scale

  def spot(
    self,
    x: float,
    y: float,
    radius: tuple[float, float],
    colour: tuple[int, int, int],
    *,
    blur: float = 0.0,
    strength: float = 1.0,
  ) -> None:
    """Paints an ellipse, its edge as soft as `blur` says."""
    left, top = self._point(x, y)
    wide, high = radius[0] * self._scale, radius[1] * self._scale
    soft = blur * self._scale
    margin = int(3 * soft) + 1
    box = (
      int(left - wide) - margin,
      int(top - high) - margin,
      int(left + wide) + margin + 1,
      int(top + high) + margin + 1,
    )
    # What is to be blurred widely is drawn small, which looks the same.
    shrink = max(1, int(soft / 2))
    full = (box[2] - box[0], box[3] - box[1])
    mask = Image.new("L", (full[0] // shrink + 1, full[1] // shrink + 1))
    ImageDraw.Draw(mask).ellipse(
      (
        (left - wide - box[0]) / shrink,
        (top - high - box[1]) / shrink,
        (left + wide - box[0]) / shrink,
        (top + high - box[1]) / shrink,
      ),
      fill=round(255 * strength),
    )
    if soft:
      mask = mask.filter(ImageFilter.GaussianBlur(soft / shrink))
    mask = mask.resize(full, box=(0, 0, full[0] / shrink, full[1] / shrink))
    self.image.paste(colour, box, mask)

  def line(
    self, points: np.ndarray, width: float, colour: tuple[int, int, int]
  ) -> None:
    """Paints a line through points `[N, 2]`, thinner towards its end."""
    pen = ImageDraw.Draw(self.image)
    ends = [self._point(x, y) for x, y in points.tolist()]
    for step, (start, end) in enumerate(itertools.pairwise(ends)):
      thickness = width * self._scale * (1 - 0.7 * step / len(ends))
      pen.line((*start, *end), colour, max(1, round(thickness)))


# Where the middle of the disc and of the macula is in a right eye.
_DISC = (0.48, -0.02)
_MACULA = (-0.22, 0.05)


def _draw_eye(
  canvas: _Canvas, generator: np.random.Generator, cup_to_disc: float
) -> None:
  """Draws what every eye has; the same generator gives the same eye."""
  tone = generator.uniform(0.8, 1.15)
  base_colour = (round(190 * tone), round(88 * tone), round(42 * tone))
  light = (round(205 * tone), round(110 * tone), round(60 * tone))
  canvas.image.paste(base_colour, (0, 0, canvas.size, canvas.size))
  canvas.spot(0.1, 0.0, (0.6, 0.6), light, blur=0.25, strength=0.8)
  for _ in range(12):
    x, y = generator.uniform(-0.9, 0.9, 2)
    shade = round(100 * generator.uniform(0.5, 1.2))
    canvas.spot(x, y, (0.2, 0.15), (170, shade, 45), blur=0.1, strength=0.25)
  x, y = np.asarray(_DISC) + generator.normal(0, 0.025, 2)
  _draw_vessels(canvas, generator, x, y)
  canvas.spot(*_MACULA, (0.13, 0.13), (110, 40, 22), blur=0.06, strength=0.75)
  radius = generator.uniform(0.17, 0.20)
  disc = (radius * 0.95, radius * 1.05)
  canvas.spot(x, y, disc, (235, 160, 90), blur=0.012)
  cup = (disc[0] * cup_to_disc, disc[1] * cup_to_disc)
  canvas.spot(x - 0.01, y, cup, (255, 240, 195), blur=0.012)


def _draw_vessels(
  canvas: _Canvas, generator: np.random.Generator, x: float, y: float
) -> None:
  """Draws arteries and veins that arch from the disc around the macula."""
  along = np.linspace(0.0, 1.0, 24)
  for up in (-1, 1):
    for reach, height, width in (
      (-1.35, 0.62, 0.050),
      (-1.20, 0.85, 0.036),
      (0.55, 0.75, 0.036),
    ):
      wiggle = generator.uniform(0.01, 0.03)
      phase = generator.uniform(0, 2 * np.pi)
      bend = generator.uniform(0.85, 1.15) * height
      across = x + reach * along**1.5
      rise = (
        y
        + up * bend * np.sin(np.pi * 0.62 * along)
        + (wiggle * np.sin(12 * along + phase))
      )
      colour = (128, 24, 20) if width > 0.04 else (158, 44, 28)
      canvas.line(np.stack([across, rise], 1), width, colour)
      start = int(generator.integers(6, 12))
      branch = np.stack(
        [
          across[start] + np.linspace(0, 0.5 * np.sign(reach), 12),
          rise[start] - up * np.linspace(0, 0.22, 12) ** 1.2,
        ],
        1,
      )
      canvas.line(branch, width * 0.6, colour)


def _draw_lesions(canvas: _Canvas, generator: np.random.Generator) -> None:
  """Draws haemorrhages, and exudates in clusters, from very few to many."""
  for _ in range(int(generator.integers(1, 16))):
    x, y = _somewhere(generator, 0.8)
    radius = generator.uniform(0.02, 0.055)
    stretch = generator.uniform(0.7, 1.4)
    canvas.spot(
      x, y, (radius, radius * stretch), (92, 10, 12), blur=0.008, strength=0.9
    )
  for _ in range(int(generator.integers(0, 4))):
    x, y = _somewhere(generator, 0.6)
    for _ in range(int(generator.integers(3, 9))):
      dx, dy = generator.normal(0, 0.06, 2)
      radius = generator.uniform(0.012, 0.032)
      canvas.spot(
        x + dx, y + dy, (radius, radius), (250, 226, 110), strength=0.95
      )


def _somewhere(
  generator: np.random.Generator, reach: float
) -> tuple[float, float]:
  """Returns a place off the disc."""
  while True:
    x, y = generator.uniform(-reach, reach, 2)
    is_off = np.hypot(x - _DISC[0], y - _DISC[1]) > 0.3
    if np.hypot(x, y) < reach and is_off:
      return float(x), float(y)


def _photograph(
  drawn: Image.Image, device: Device, generator: np.random.Generator
) -> Image.Image:
  """Adds light, colours, the round mask and noise, as the device has them."""
  size = drawn.width
  pixels = np.asarray(drawn, np.float32) / 255
  places = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
  shift = generator.normal(0, 0.03, 2)
  away = np.hypot(places[:, None] - shift[0], places[None, :] - shift[1])
  light = generator.uniform(0.88, 1.08) * (1 - device.vignette * away**2)
  cast = np.asarray(device.cast) * generator.normal(1, 0.015, 3)
  pixels = pixels * light[..., None] * cast
  pixels += generator.normal(0, device.noise, pixels.shape)
  # The mask's edge is as wide as a pixel.
  inside = (0.96 - np.hypot(places[:, None], places[None, :])) * size / 2
  pixels *= np.clip(inside + 0.5, 0, 1)[..., None]
  levels = (np.clip(pixels, 0, 1) * 255).round()
  return builder.from_array(levels.astype(np.uint8))
