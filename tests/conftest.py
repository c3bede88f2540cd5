"""Tests run on four virtual CPU devices, with silent broadcasting refused."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '4')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax  # noqa: E402
import pytest  # noqa: E402

# [B] * [B, 1] would broadcast to [B, B] without a word.
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def float64():
  """Runs a test in double precision."""
  with jax.enable_x64(True):
    yield
