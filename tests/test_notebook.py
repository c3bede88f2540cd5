"""The notebooks in examples/: their cells run, and what is shown is what they say."""

import json
import pathlib

import jax
import matplotlib
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / 'examples'


def cells(name):
  notebook = json.loads((FOLDER / name).read_text())
  return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


@pytest.mark.slow
def test_from_arrays_to_autoattack(monkeypatch, tmp_path):
  matplotlib.use('Agg')
  monkeypatch.chdir(tmp_path)
  names = {}
  # As in a user's program, which the tests' strictness is not for.
  with jax.numpy_rank_promotion('allow'):
    for number, cell in enumerate(cells('arrays_to_autoattack.ipynb')):
      exec(compile(''.join(cell['source']), f'cell {number}', 'exec'), names)
  outcome, curves = names['outcome'], names['curves']
  assert outcome.names == ('apgd-ce', 'apgd-t', 'fab-t', 'square')
  assert outcome.clean_accuracy > 0.9
  # Digits that a linear network loses at this size, nearly all of them.
  shares = {name: [x.robust_accuracy for x in c.values()] for name, c in curves.items()}
  robust, standard = shares['adversarial training'], shares['logistic regression']
  assert robust == sorted(robust, reverse=True)
  assert robust[3] > standard[3] + 0.3
  assert outcome.robust_accuracy <= robust[3]
  assert np.abs(outcome.adversarial - names['rows'][0]).max() <= 0.2 + 1e-6
  assert (tmp_path / 'runs' / 'notebook' / 'checkpoint.npy').exists()


def test_it_is_kept_as_it_ran():
  """All cells in turn, without an error, and with the last figure."""
  found = cells('arrays_to_autoattack.ipynb')
  assert [cell['execution_count'] for cell in found] == list(range(1, len(found) + 1))
  outputs = [output for cell in found for output in cell['outputs']]
  assert not [x for x in outputs if x['output_type'] in ('error', 'stream')]
  assert sum('image/png' in x.get('data', {}) for x in outputs) == 2
