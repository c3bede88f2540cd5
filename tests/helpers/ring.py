"""A ring of eight Gaussians in the plane, which generators of points learn."""

import math

import numpy as np

from jaxrobust.data import pipeline

NUM_MODES = 8
DEVIATION = 0.05
_ANGLES = 2 * math.pi * np.arange(NUM_MODES) / NUM_MODES
MODES = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], -1)


def batches(rng: np.random.RandomState, shape: tuple[int, ...]) -> pipeline.Batch:
  """Points as images of one pixel with two channels, as the pipeline has images.

  Args:
    rng: of the points.
    shape: of the batches; the last axis is that of the images of one.

  Returns:
    images float32 [*shape, 1, 1, 2], 127.5 times points shifted by 1, labels their
    modes.
  """
  labels = rng.randint(0, NUM_MODES, shape)
  points = MODES[labels] + DEVIATION * rng.standard_normal((*shape, 2))
  slots = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
  images = np.float32(127.5 * (points + 1)).reshape(*shape, 1, 1, 2)
  return pipeline.Batch(images, np.int32(labels), slots < 0, slots)


def judge(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(the nearest mode of points [n, 2], whether it is within five deviations)."""
  away = np.linalg.norm(points[:, None] - MODES[None], axis=-1)
  return away.argmin(1), away.min(1) < 5 * DEVIATION
