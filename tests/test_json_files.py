"""JSON of others: what is taken, and what is refused in one line."""

import os

import pytest
from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.files import json_files


def test_takes_an_object_with_its_values():
  found = json_files.parse('{"a": [1, 0.5, null, "é", "\\u00e9"]}'.encode(), 'x.json')
  assert found == {'a': [1, 0.5, None, 'é', 'é']}


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'{"a": ',
    b'[]',
    b'5',
    b'"text"',
    b'null',
    b'{"a": Infinity}',
    b'{"a": -Infinity}',
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b'{"a": "\xff"}',
    b'\xff\xfe{}',
    b'{"a": "\\ud800"}',
    b'[' * 100_000,
    b'{"a":' * 100_000,
    b'{"a": ' + b'9' * 5_000 + b'}',
    b'{"a": 18446744073709551616}',
    b' ' * (json_files.MAX_BYTES + 1),
  ],
  ids=range(18),
)
def test_refuses_in_one_line_that_names_the_file(content):
  with pytest.raises(UserError) as caught:
    json_files.parse(content, '/runs/x.json')
  line = str(caught.value)
  assert line.startswith('/runs/x.json ') and '\n' not in line and len(line) < 300


SHAPE = {'a': int, 'b': [(float, type(None))], 'c?': {'d': str}}


@pytest.mark.parametrize(
  'value', [{'a': 1, 'b': []}, {'a': -1, 'b': [1, 0.5, None], 'c': {'d': ''}, 'e': []}]
)
def test_fields_as_they_are_read(value):
  json_files.check(value, 'x.json', SHAPE)


@pytest.mark.parametrize(
  'value, words',
  [
    ([], 'x.json .* a list and not an object'),
    ({'b': []}, 'x.json .* no a'),
    ({'a': True, 'b': []}, 'x.json: a .* True and not a whole number'),
    ({'a': 0.5, 'b': []}, 'x.json: a .* 0.5 and not a whole number'),
    ({'a': 2**63, 'b': []}, 'x.json: a .* 9223.* and not a whole number'),
    ({'a': 1, 'b': [0, '5']}, 'x.json: b: 1 .* text and not a number or null'),
    ({'a': 1, 'b': [], 'c': {'d': None}}, 'x.json: c: d .* None and not text'),
  ],
)
def test_another_type_is_refused_with_its_place(value, words):
  with pytest.raises(UserError, match=words):
    json_files.check(value, 'x.json', SHAPE)


def test_only_files_are_read(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  for name in ('pipe', ''):
    with pytest.raises(UserError, match=f'{tmp_path / name} is not a file'):
      json_files.read(epath.Path(tmp_path / name))
