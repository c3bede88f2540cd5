"""Command lines: what is parsed from them, what is refused, what the pages show."""

import importlib
import re
import subprocess
import sys

import pytest
from ml_collections import config_dict

from jaxrobust import __main__, __version__
from jaxrobust.config import overrides
from jaxrobust.data import __main__ as data
from jaxrobust.errors import UserError
from jaxrobust.models import download
from jaxrobust.runs import cli, flags

PROGRAMS = (
  *('train', 'evaluate', 'generate', 'analyze', 'report', 'sweep', 'convert', 'plan'),
)


def program(name: str) -> flags.Program:
  return importlib.import_module(f'jaxrobust.{name}').PROGRAM


def parse(name: str, *arguments: str) -> flags.Given:
  return flags.parse(program(name), arguments)


@pytest.mark.parametrize('name, flag', [('sweep', 'list'), ('report', 'status')])
@pytest.mark.parametrize(
  'written, value',
  [
    ('--{}', True),
    ('--{}=true', True),
    ('--{}=yes', True),
    ('--{}=1', True),
    ('--{}=false', False),
    ('--{}=no', False),
    ('--{}=0', False),
    ('--no{}', False),
    ('', False),
  ],
)
def test_a_boolean_says_what_it_says(name, flag, written, value):
  given = parse(name, '--workdir=x', *filter(None, [written.format(flag)]))
  assert given.flags[flag + '_' * (flag == 'list')] is value


def test_flags_have_types():
  given = parse('plan', '--topology=v4:2x2x1', '--utilization=1/2', '--suggest=no')
  assert given.flags['utilization'] == 0.5 and given.flags['suggest'] is False
  assert given.flags['what'] == 'train'
  assert parse('plan', '--what', 'sample').flags['what'] == 'sample'


@pytest.mark.parametrize(
  'name, arguments, words',
  [
    ('plan', ['--what=trian'], ['--what', 'trian', 'train, evaluate, sample']),
    ('plan', ['--utilization=half'], ['--utilization', 'half', '8/255']),
    ('plan', ['--suggest=perhaps'], ['--suggest', 'perhaps', 'true or false']),
    ('plan', ['--workdir=x'], ['--workdir=x', 'no workdir']),
    ('report', ['--workdir=x', '--config=digits'], ['--config', 'no config']),
    ('report', ['--workdir=x', '--config.seed=1'], ['--config', 'no config']),
    ('train', [], ['--workdir is missing']),
    ('train', ['--workdir=x', '--confg=1'], ['--confg', '--workdir, --config']),
    ('train', ['--wrkdir=x'], ['--wrkdir', 'did you mean --workdir?']),
    ('train', ['--workdir=x', '--confg.seed=1'], ['did you mean --config.seed?']),
    ('train', ['--workdir=x', '--seed=1'], ['did you mean --config.seed?']),
    ('train', ['--workdir=x', '--threat.epsilon=1'], ['--config.threat.epsilon?']),
    ('generate', ['--workdir=x', '--seed=1'], ['did you mean --config.seed?']),
    ('train', ['--workdir=x', 'digits'], ["'digits'", '--name=value']),
    ('train', ['--workdir=x', '--num_processes=two'], ['--num_processes', 'integer']),
    ('generate', ['--workdir=x', '--stage=fits'], ['--stage', 'fit, evaluate']),
  ],
)
def test_refuses_in_one_line(name, arguments, words):
  with pytest.raises(UserError) as caught:
    parse(name, *arguments)
  line = str(caught.value)
  assert '\n' not in line and all(word in line for word in words), line


def test_a_flag_that_is_like_none_gets_no_suggestion():
  """Its dashes are no likeness: --list and --register share six letters with them."""
  with pytest.raises(UserError, match='--list is not a flag of .*--config.FIELD$'):
    parse('train', '--workdir=x', '--list=false')


def test_overrides_are_kept_apart_in_every_spelling():
  given = parse(
    *('train', '--workdir', 'x', '--config=a.py:b', '--config.a.b=1', '--config.c'),
    *('--noconfig.d', '--config.e', '2', '--config.f=', '--coordinator=auto'),
  )
  assert given.config == 'a.py:b' and given.workdir == 'x'
  assert given.overrides == {'a.b': '1', 'c': 'true', 'd': 'false', 'e': '2', 'f': ''}
  assert '--config.a.b=1' in given.to_pass_on()
  assert '--coordinator=auto' in given.to_pass_on()


def test_several_files_to_register(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  given = parse('sweep', '--workdir=x', '--register=a.py', '--register', '~/b.py')
  assert given.register == ('a.py', '/home/me/b.py')
  assert given.to_pass_on() == ['--register=a.py', '--register=/home/me/b.py']
  with pytest.raises(UserError, match='--register has no use here'):
    parse('report', '--workdir=x', '--register=a.py')


def test_the_home_folder_in_every_path(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  given = parse('evaluate', '--workdir=~/runs/a', '--checkpoint=~/b.npy')
  assert given.workdir == '/home/me/runs/a'
  assert given.flags['checkpoint'] == '/home/me/b.npy'
  config = make_config()
  overrides.apply(config, {'data.samples': '~/set'})
  assert config.data.samples == '/home/me/set'


def make_config():
  return config_dict.ConfigDict(
    {
      'seed': 0,
      'threat': {'epsilon': 0.1, 'norm': 'linf'},
      'data': {'samples': '', 'flip': True, 'count': config_dict.placeholder(int)},
      'steps': (0.1, 0.2),
      'any': config_dict.placeholder(object),
    }
  ).lock()


@pytest.mark.parametrize(
  'path, text, value',
  [
    ('threat.epsilon', '8/255', 8 / 255),
    ('threat.epsilon', '.5', 0.5),
    ('threat.epsilon', '1', 1.0),
    ('threat.epsilon', ' 128 / 255 ', 128 / 255),
    ('threat.norm', 'l2', 'l2'),
    ('seed', '12', 12),
    ('seed', '1_000', 1000),
    ('seed', '1e6', 1_000_000),
    ('data.flip', 'no', False),
    ('data.count', '5', 5),
    ('data.count', 'None', None),
    ('data.samples', '', ''),
    ('steps', '(1/255,2/255)', (1 / 255, 2 / 255)),
    ('steps', '1/4, -0.5', (0.25, -0.5)),
    ('steps', '0.3', (0.3,)),
    ('any', '3', 3),
    ('any', 'text', 'text'),
  ],
)
def test_overrides_have_the_type_of_their_field(path, text, value):
  config = make_config()
  overrides.apply(config, {path: text})
  found = config.to_dict()
  for name in path.split('.'):
    found = found[name]
  assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
  'path, text, words',
  [
    ('threat.epsilom', '1', '--config.threat.epsilon?'),
    ('epsilon', '1', '--config.threat.epsilon?'),
    ('threat.epsilon.x', '1', '--config.threat.epsilon'),
    ('zzzz', '1', 'any, data, seed, steps, threat'),
    ('threat.every', '1', '--helpfull'),
    ('threat.epsilo', '1', '--config.threat.epsilon?'),
    ('threat', '1', 'threat.epsilon, threat.norm'),
    ('threat.epsilon', 'nan', '8/255'),
    ('threat.epsilon', 'inf', '8/255'),
    ('threat.epsilon', '1e999', '8/255'),
    ('threat.epsilon', '8/0', '8/255'),
    ('threat.epsilon', '__import__("os")', '8/255'),
    ('seed', '1.5', 'integer'),
    ('data.flip', 'maybe', 'true or false'),
  ],
)
def test_wrong_overrides_are_refused_in_one_line(path, text, words):
  with pytest.raises(UserError) as caught:
    overrides.apply(make_config(), {path: text})
  line = str(caught.value)
  assert line.startswith(f'--config.{path}') and words in line and '\n' not in line


def test_a_share_of_real_images_without_a_sample_set_is_warned_of(caplog):
  """Of a sweep, whose points may have a set, it is not."""
  share = '--config.data.real_fraction=0.33'
  for name, more, is_warned in (
    ('train', (), True),
    ('train', ('--config.data.samples=data/x',), False),
    ('sweep', (), False),
  ):
    caplog.clear()
    cli.check(program(name), ['--workdir=x', '--config=digits', share, *more])
    assert (share in caplog.text) == is_warned


@pytest.mark.parametrize('name', PROGRAMS)
def test_a_page_lists_the_flags_that_the_program_takes_and_no_others(name):
  taken = program(name)
  page = flags.page(taken)
  for flag in taken.flags:
    assert f'  --{flag.name}' in page and flag.help.split()[0] in page
  assert ('  --workdir=' in page) == (taken.workdir != 'none')
  assert ('  --config=' in page.rpartition('Flags:')[2]) == (taken.config != 'none')
  assert taken.name == name and 'Exit codes' in page
  assert max(map(len, page.splitlines())) <= 90


def test_the_map_names_every_program(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['jaxrobust', '--help'])
  with pytest.raises(SystemExit) as ended:
    __main__.main()
  page = capsys.readouterr().out
  assert ended.value.code == 0
  for name in (*PROGRAMS, 'data', 'download'):
    assert f'\n  {name}' in page


def test_the_command_runs_a_program_and_corrects_a_name():
  run = lambda *arguments: subprocess.run(
    [sys.executable, '-m', 'jaxrobust', *arguments], capture_output=True, text=True
  )
  assert run('--version').stdout == f'{__version__}\n'
  wrong = run('trian', '--workdir=x')
  assert wrong.returncode == cli.ERROR and wrong.stderr.endswith('mean train?\n')
  missing = run('train', '--config=digits')
  assert missing.returncode == cli.ERROR and '--workdir is missing' in missing.stderr


@pytest.mark.parametrize(
  ('main', 'command', 'said'),
  [
    (data.main, 'prepar cifar10', "'prepar' .* did you mean prepare?"),
    (data.main, 'select a b --cont=3', '--cont=3; did you mean --count?'),
    (data.main, 'plan 1M --hosts=2 --dataset=cifar11', 'did you mean cifar10?'),
    (data.main, 'plan 1M --hosts=2 --real_fraction=half', "'half': use a number"),
    (download.main, '--foldr=x', '--foldr=x; did you mean --folder?'),
    (download.main, 'cifar10_linf_wrn28-10_wit', 'mean cifar10_linf_wrn28-10_with?'),
  ],
)
def test_commands_with_positions_report_mistakes_in_a_line(main, command, said, capsys):
  assert main(command.split()) == 1
  out, err = capsys.readouterr()
  assert out == '' and err.count('\n') == 1
  assert re.search(said.replace('?', r'\?'), err)


def test_commands_with_positions_know_the_home_folder_and_fractions(monkeypatch):
  monkeypatch.setenv('HOME', '/home/somebody')
  args = data._parser().parse_args(['select', '~/a', '~/b', '--top_fraction=1/5'])
  assert (args.set, args.out, args.top_fraction) == (
    '/home/somebody/a',
    '/home/somebody/b',
    0.2,
  )
