"""JSON of others: what is taken, and what is refused in one line."""

import pytest

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
    b' ' * (json_files.MAX_BYTES + 1),
  ],
  ids=range(17),
)
def test_refuses_in_one_line_that_names_the_file(content):
  with pytest.raises(UserError) as caught:
    json_files.parse(content, '/runs/x.json')
  line = str(caught.value)
  assert line.startswith('/runs/x.json ') and '\n' not in line and len(line) < 300
