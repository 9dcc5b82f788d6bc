"""The released code's step, written down anew from the mathematics.

In NumPy and float64, with the gradients by hand, for one small network:

    u = (x - mean) / std
    h = conv(u, kernel)                 # 3 × 3, padded with zeros
    n = (h - μ) / sqrt(σ² + ε)          # μ, σ² of the batch, or running ones
    z = mean over pixels of relu(n scale + bias) @ head.kernel + head.bias

Nothing here imports the library.
"""

import copy

import numpy as np

_EPSILON = 1e-5
_MOMENTUM = 0.1
# Of the released attack, whatever the data was normalised with.
ATTACK_MEAN = np.array([0.4914, 0.4822, 0.2265])
ATTACK_STD = np.array([0.2023, 0.1994, 0.2010])


def _patches(inputs):
  """The 3 × 3 surroundings `[B, H, W, 3, 3, C]` of each pixel."""
  padded = np.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
  return windows.transpose(0, 1, 2, 4, 5, 3)


def network(variables, inputs, labels, *, is_training):
  """Evaluates the mean cross-entropy at standardised inputs.

  Returns:
    Logits, the gradient with respect to the parameters, that with respect to
    the inputs, and the running statistics after a training step.
  """
  block, head = (variables["params"][name] for name in ("block_0", "head"))
  running = variables["batch_stats"]["block_0"]
  patches = _patches(inputs)
  h = np.einsum("bhwijc,ijcf->bhwf", patches, block["kernel"])
  num_values = h[..., 0].size
  batch_mean, batch_var = h.mean((0, 1, 2)), h.var((0, 1, 2))
  mean, var = running["mean"], running["var"]
  if is_training:
    mean, var = batch_mean, batch_var
  deviation = np.sqrt(var + _EPSILON)
  n = (h - mean) / deviation
  activated = n * block["scale"] + block["bias"]
  features = np.maximum(activated, 0).mean((1, 2))
  logits = features @ head["kernel"] + head["bias"]
  shifted = np.exp(logits - logits.max(1, keepdims=True))
  errors = shifted / shifted.sum(1, keepdims=True)
  errors[np.arange(len(labels)), labels] -= 1
  errors /= len(labels)

  of_features = errors @ head["kernel"].T / (h.shape[1] * h.shape[2])
  of_activated = of_features[:, None, None] * (activated > 0)
  of_n = of_activated * block["scale"]
  of_h = of_n / deviation
  if is_training:
    # μ and σ² depend on every value of the batch.
    of_h -= of_n.mean((0, 1, 2)) / deviation
    of_h -= n * (of_n * n).mean((0, 1, 2)) / deviation
  gradient = {
    "block_0": {
      "kernel": np.einsum("bhwijc,bhwf->ijcf", patches, of_h),
      "scale": (of_activated * n).sum((0, 1, 2)),
      "bias": of_activated.sum((0, 1, 2)),
    },
    "head": {"kernel": features.T @ errors, "bias": errors.sum(0)},
  }
  # Each pixel is part of nine surroundings: the kernel turned around.
  of_inputs = np.einsum(
    "bhwijf,ijcf->bhwc", _patches(of_h), block["kernel"][::-1, ::-1]
  )
  updated = {
    "mean": (1 - _MOMENTUM) * running["mean"] + _MOMENTUM * batch_mean,
    "var": (1 - _MOMENTUM) * running["var"]
    + _MOMENTUM * batch_var * num_values / (num_values - 1),
    "count": running["count"] + 1,
  }
  return logits, gradient, of_inputs, {"block_0": updated}


def search(
  variables,
  images,
  labels,
  noise,
  *,
  mean,
  std,
  step_size=0.1,
  distance_weight=0.0,
  noise_scale=0.0,
):
  """Takes the single step.

  Returns:
    The points in the units of the images, their logits, the attack's pixels
    before and after the step, and the direction whose sign was taken.
  """
  u = (images - mean) / std
  pixels = u * ATTACK_STD + ATTACK_MEAN
  _, _, of_inputs, _ = network(variables, u, labels, is_training=False)
  # The network's input is (p - attack mean) / attack std.
  direction = of_inputs / ATTACK_STD
  direction = direction + distance_weight * (u - pixels) + noise_scale * noise
  moved = np.clip(pixels + step_size * np.sign(direction), 0, 1)
  moved = np.round(moved * 255) / 255
  u = (moved - ATTACK_MEAN) / ATTACK_STD
  logits, *_ = network(variables, u, labels, is_training=False)
  return u * std + mean, logits, pixels, moved, direction


def update(variables, images, targets, *, mean, std, learning_rate, num_steps):
  """SGD with momentum 0.9 on the cross-entropy of the whole batch."""
  variables = copy.deepcopy(variables)
  velocity = None
  u = (images - mean) / std
  for _ in range(num_steps):
    _, gradient, _, statistics = network(
      variables, u, targets, is_training=True
    )
    if velocity is None:
      velocity = copy.deepcopy(gradient)
    else:
      for layer, names in velocity.items():
        for name in names:
          names[name] = 0.9 * names[name] + gradient[layer][name]
    for layer, names in velocity.items():
      for name in names:
        variables["params"][layer][name] = (
          variables["params"][layer][name] - learning_rate * names[name]
        )
    variables["batch_stats"] = statistics
  return variables
