"""The released unlearning loop in eager PyTorch, to be timed against.

Written from the mathematics. Where the way it is written matters, PyTorch gets
the faster one: all inputs are kept in memory, standardised, instead of passing
through a loader, and the frozen model's weights ask for no gradient.

PyTorch is a development extra (`torch`), imported nowhere else in the programs.
"""

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

try:
  import torch
except ImportError:
  raise ValueError(
    "benchmark needs PyTorch: install the extra `torch`"
  ) from None

from safetensors import torch as safetensors_torch

# Places of the eight blocks in the state dict, and their strides; a dropout
# layer, off in this protocol, has the places 3 and 7.
_STRIDES = {0: 1, 1: 1, 2: 2, 4: 1, 5: 1, 6: 2, 8: 1, 9: 1}
_GREY_LEVELS = 255.0


class _AllCNN(torch.nn.Module):
  """All-CNN with BatchNorm, of the sizes that a state dict has."""

  def __init__(self, state: dict[str, torch.Tensor]) -> None:
    super().__init__()
    layers: list[torch.nn.Module] = []
    for place in range(max(_STRIDES) + 1):
      if place not in _STRIDES:
        layers.append(torch.nn.Identity())
        continue
      filters, channels, size, _ = state[f"features.{place}.0.weight"].shape
      layers.append(
        torch.nn.Sequential(
          torch.nn.Conv2d(
            channels, filters, size, _STRIDES[place], size // 2, bias=False
          ),
          torch.nn.BatchNorm2d(filters),
          torch.nn.ReLU(inplace=True),
        )
      )
    self.features = torch.nn.Sequential(*layers)
    num_classes, num_features = state["classifier.0.weight"].shape
    self.classifier = torch.nn.Sequential(
      torch.nn.Linear(num_features, num_classes)
    )
    self.load_state_dict(state)

  def forward(self, inputs: torch.Tensor) -> torch.Tensor:
    return self.classifier(self.features(inputs).mean((2, 3)))


def set_threads(num_threads: int) -> None:
  """Sets the number of threads that PyTorch computes with."""
  torch.set_num_threads(num_threads)


def version() -> str:
  """Returns PyTorch's version."""
  return str(torch.__version__)


def load(
  path: str | os.PathLike[str], *, is_channels_last: bool = False
) -> torch.nn.Module:
  """Builds the network of a state dict.

  Args:
    path: A `.safetensors` file, as `torch_weights.save` writes it.
    is_channels_last: Whether the network computes in this layout.

  Returns:
    The network, in training mode.
  """
  network = _AllCNN(safetensors_torch.load_file(path))
  if is_channels_last:
    # mypy does not know this overload on a module.
    network = network.to(memory_format=torch.channels_last)  # type: ignore
  return network


def to_inputs(
  images: np.ndarray,
  *,
  mean: np.ndarray,
  std: np.ndarray,
  is_channels_last: bool = False,
) -> torch.Tensor:
  """Standardises uint8 images `[N, H, W, C]` to float32 `[N, C, H, W]`."""
  pixels = torch.from_numpy(images).float() / _GREY_LEVELS
  inputs = (pixels - torch.tensor(mean)) / torch.tensor(std)
  # A clone, since with one channel the permuted strides pass for either layout
  # and `contiguous` would leave them as they are.
  return inputs.permute(0, 3, 1, 2).clone(
    memory_format=torch.channels_last
    if is_channels_last
    else torch.contiguous_format
  )


def to_integers(values: np.ndarray) -> torch.Tensor:
  """Returns classes or rows as PyTorch's int64 `[N]`."""
  return torch.from_numpy(np.asarray(values, np.int64))


def freeze(network: torch.nn.Module) -> torch.nn.Module:
  """Copies a network into inference mode, without gradients of weights."""
  return copy.deepcopy(network).eval().requires_grad_(False)


def predict(network: torch.nn.Module, inputs: torch.Tensor) -> np.ndarray:
  """Returns logits `[N, K]` in inference mode."""
  frozen = freeze(network)
  with torch.no_grad():
    return torch.cat([frozen(part) for part in inputs.split(256)]).numpy()


def single_step_labels(
  frozen: torch.nn.Module,
  inputs: torch.Tensor,
  labels: torch.Tensor,
  *,
  attack_mean: Sequence[float] = (0.4914, 0.4822, 0.2265),
  attack_std: Sequence[float] = (0.2023, 0.1994, 0.2010),
  step_size: float = 0.1,
) -> torch.Tensor:
  """Takes the single step of the released code without noise (λ = γ = 0).

  The standardised input `u` is de-normalised with constants of the attack's
  own, whatever it was normalised with:

      p = u attack_std + attack_mean
      p' = round(clip(p + ε sign(∇ mean CE), 0, 1))

  Args:
    frozen: The network, as `freeze` returns it.
    inputs: float `[B, C, H, W]`, standardised.
    labels: int `[B]`, the classes to leave.
    attack_mean: What the attack takes as the mean; of more values than there
      are channels the first are used.
    attack_std: As `attack_mean`.
    step_size: `ε`, in the attack's pixel units.

  Returns:
    int64 `[B]`, the class predicted at `p'`.
  """
  num_channels = inputs.shape[1]
  mean, std = (
    torch.tensor(values[:num_channels]).reshape(-1, 1, 1)
    for values in (attack_mean, attack_std)
  )
  pixels = (inputs * std + mean).requires_grad_()
  loss = torch.nn.functional.cross_entropy(
    frozen((pixels - mean) / std), labels
  )
  (gradient,) = torch.autograd.grad(loss, pixels)
  with torch.no_grad():
    moved = (pixels + step_size * gradient.sign()).clamp(0.0, 1.0)
    moved = torch.round(moved * _GREY_LEVELS) / _GREY_LEVELS
    return frozen((moved - mean) / std).argmax(1)


def search(
  frozen: torch.nn.Module,
  inputs: torch.Tensor,
  labels: torch.Tensor,
  *,
  batch_size: int,
) -> np.ndarray:
  """Returns the labels of `single_step_labels` for all inputs, `[N]`."""
  parts = zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
  return torch.cat(
    [single_step_labels(frozen, *part) for part in parts]
  ).numpy()


def shuffle(
  num_rows: int, batch_size: int, *, seed: int
) -> Sequence[torch.Tensor]:
  """Shuffles rows into minibatches, the last of which may be smaller."""
  generator = torch.Generator().manual_seed(seed)
  return torch.randperm(num_rows, generator=generator).split(batch_size)


def train(
  network: torch.nn.Module,
  inputs: torch.Tensor,
  labels: torch.Tensor,
  batches: Sequence[torch.Tensor],
  *,
  learning_rate: float,
  momentum: float,
  weight_decay: float,
) -> torch.nn.Module:
  """Takes one step of SGD a minibatch, BatchNorm in training mode.

  Args:
    network: Where to start; left as it is.
    inputs: float `[N, C, H, W]`, standardised.
    labels: int `[N]`, of the cross-entropy.
    batches: Rows of each minibatch.
    learning_rate: Of SGD.
    momentum: Of SGD.
    weight_decay: Of SGD.

  Returns:
    The trained network.
  """
  trained, optimizer = _start(network, learning_rate, momentum, weight_decay)
  for rows in batches:
    _step(trained, optimizer, inputs[rows], labels[rows])
  return trained


def unlearn(
  network: torch.nn.Module,
  inputs: torch.Tensor,
  labels: torch.Tensor,
  *,
  learning_rate: float = 1e-5,
  momentum: float = 0.9,
  num_epochs: int = 10,
  batch_size: int = 64,
  seed: int = 0,
) -> torch.nn.Module:
  """Runs the released loop: labels of the frozen model at every minibatch.

  Args:
    network: The original network, left as it is.
    inputs: float `[N, C, H, W]`, the forget set, standardised.
    labels: int `[N]`.
    learning_rate: Of SGD.
    momentum: Of SGD.
    num_epochs: Passes over the forget set.
    batch_size: Images a step.
    seed: Of the order, with the number of the pass added.

  Returns:
    The unlearned network.
  """
  frozen = freeze(network)
  unlearned, optimizer = _start(network, learning_rate, momentum, 0.0)
  for epoch in range(num_epochs):
    for rows in shuffle(len(inputs), batch_size, seed=seed + epoch):
      reached = single_step_labels(frozen, inputs[rows], labels[rows])
      _step(unlearned, optimizer, inputs[rows], reached)
  return unlearned


def parts(
  network: torch.nn.Module,
  inputs: torch.Tensor,
  labels: torch.Tensor,
  batches: Sequence[torch.Tensor],
) -> dict[str, Callable[[], Any]]:
  """Returns the parts of the work, each over all minibatches, by name.

  Args:
    network: Left as it is.
    inputs: float `[N, C, H, W]`, standardised.
    labels: int `[N]`.
    batches: Rows of each minibatch.

  Returns:
    The functions to call.
  """
  frozen, trained = freeze(network), copy.deepcopy(network).train()
  weights = list(trained.parameters())

  def forward(model: torch.nn.Module) -> float:
    with torch.no_grad():
      return sum(model(inputs[rows]).sum().item() for rows in batches)

  def gradient(model: torch.nn.Module, *, is_of_input: bool) -> float:
    total = 0.0
    for rows in batches:
      batch = inputs[rows].requires_grad_(is_of_input)
      loss = torch.nn.functional.cross_entropy(model(batch), labels[rows])
      of = [batch] if is_of_input else weights
      total += torch.autograd.grad(loss, of)[0].abs().sum().item()
    return total

  def steps() -> None:
    changed, optimizer = _start(network, 1e-5, 0.9, 0.0)
    for rows in batches:
      _step(changed, optimizer, inputs[rows], labels[rows])

  return {
    "forward": lambda: forward(frozen),
    "forward_input_gradient": lambda: gradient(frozen, is_of_input=True),
    "forward_training": lambda: forward(trained),
    "forward_weight_gradient": lambda: gradient(trained, is_of_input=False),
    "update_step": steps,
  }


def _start(
  network: torch.nn.Module,
  learning_rate: float,
  momentum: float,
  weight_decay: float,
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
  """Returns a copy of the network in training mode, and its optimiser."""
  trained = copy.deepcopy(network).train()
  optimizer = torch.optim.SGD(
    trained.parameters(),
    lr=learning_rate,
    momentum=momentum,
    weight_decay=weight_decay,
  )
  return trained, optimizer


def _step(
  network: torch.nn.Module,
  optimizer: torch.optim.Optimizer,
  inputs: torch.Tensor,
  labels: torch.Tensor,
) -> None:
  optimizer.zero_grad()
  torch.nn.functional.cross_entropy(network(inputs), labels).backward()
  optimizer.step()
