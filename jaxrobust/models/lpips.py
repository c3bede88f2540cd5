"""LPIPS by AlexNet as features: their squared distance is the perceptual distance.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric": at five layers the channels of every position are scaled to unit length, and
squared differences are weighted by channel, averaged over positions and added up. So
they are distances of features scaled by sqrt(weight / positions). Constants and names
are those of the authors' package `lpips`, version 0.1, which makes the file:

  import lpips, safetensors.torch
  safetensors.torch.save_model(lpips.LPIPS(net='alex'), 'lpips.safetensors')

Images of 32x32 pixels have 5,760 features, those of 64x64 31,872.
"""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.files import arrays
from jaxrobust.models import safetensors

# Name of a convolution, its stride and padding, and whether a maximum precedes it.
_LAYERS = (
  ('net.slice1.0', 4, 2, False),
  ('net.slice2.3', 1, 2, True),
  ('net.slice3.6', 1, 1, True),
  ('net.slice4.8', 1, 1, False),
  ('net.slice5.10', 1, 1, False),
)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of [-1, 1]
_EPSILON = 1e-10  # added to the length of channels
_REMEDY = 'make it as jaxrobust/models/lpips.py says'
_MAX_BYTES = 2**26  # of the file, which has 10 MB
_LEAST_SIZE = 31  # of height and width; of less nothing is left at the third layer


def read(path: epath.Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Reads the weights.

  Args:
    path: `.safetensors`, as in the module's docstring.

  Returns:
    For each layer: kernel [h, w, in, out], bias [1, 1, 1, out], and the weights of
    channels [1, 1, 1, out], not negative.

  Raises:
    UserError: The file is absent, damaged or holds something else.
  """
  path = path.expanduser()
  if not path.exists():
    raise UserError(f'{path} gives no LPIPS by AlexNet (it is absent): {_REMEDY}')
  with arrays.open_file(path) as file:
    # One byte more than it may have is found to be too many.
    state = safetensors.tensors(file.read(_MAX_BYTES + 1), str(path))
  layers, before = [], 3
  for number, (name, *_) in enumerate(_LAYERS):
    heads = (f'lin{number}.model.1.weight', f'lins.{number}.model.1.weight')
    head = next((key for key in heads if key in state), heads[0])
    kernel, bias, weights = (
      state.get(key, np.zeros(())) for key in (f'{name}.weight', f'{name}.bias', head)
    )
    after = len(bias) if bias.ndim else 0
    if (
      kernel.ndim != 4
      or kernel.shape[:2] != (after, before)
      or (weights.size, bias.size) != (after, after)
      or any(x.dtype.kind != 'f' for x in (kernel, bias, weights))
    ):
      raise UserError(
        f'{path} gives no LPIPS by AlexNet ({name}.weight, {name}.bias or {head} is '
        f'absent, or of another shape): {_REMEDY}'
      )
    if weights.min() < 0:
      raise UserError(
        f'{path} gives no LPIPS by AlexNet ({head} is negative): {_REMEDY}'
      )
    wide, before = (1, 1, 1, after), after
    kernel = kernel.transpose(2, 3, 1, 0)
    layers.append((kernel, bias.reshape(wide), weights.reshape(wide)))
  return layers


def features(
  layers: list[tuple[np.ndarray, np.ndarray, np.ndarray]], images: jax.Array
) -> jax.Array:
  """The features.

  Args:
    layers: of `read`.
    images: float [B, H, W, 3] in [0, 1], H and W at least 31.

  Returns:
    float [B, F].

  Raises:
    UserError: for images of another shape.
  """
  if images.shape[-1] != 3 or min(images.shape[1:3]) < _LEAST_SIZE:
    raise UserError(
      f'LPIPS sees images of 3 channels and at least {_LEAST_SIZE} pixels, not '
      f'{list(images.shape[1:])}: use other features'
    )
  wide = lambda values: jnp.array(values, jnp.float32).reshape(1, 1, 1, -1)
  x, found = (2 * images - 1 - wide(_SHIFT)) / wide(_SCALE), []
  for (kernel, bias, weights), (_, stride, pad, pooled) in zip(
    layers, _LAYERS, strict=True
  ):
    if pooled:
      x = jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), 'VALID'
      )
    x = jax.lax.conv_general_dilated(
      x,
      jnp.asarray(kernel),
      (stride, stride),
      [(pad, pad)] * 2,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision=jax.lax.Precision.HIGHEST,
    )
    x = jax.nn.relu(x + bias)
    length = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
    unit = x / (length + _EPSILON)
    scaled = unit * jnp.sqrt(weights / (x.shape[1] * x.shape[2]))
    found.append(scaled.reshape(len(x), -1))
  return jnp.concatenate(found, -1)
