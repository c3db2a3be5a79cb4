"""The command line: `python -m mmjax.main --config=FILE[:words] [--mode=…] [--config.key=value …]`.

Only light modules are imported before the flags are read, so that --help answers at once.
"""

import json
import os
import pathlib
import re
import sys

from absl import app, flags
from ml_collections import config_flags

from mmjax.errors import UserError

MODES = ('train', 'evaluate', 'predict', 'prepare', 'embed', 'export')
MAY_CHANGE = re.compile(r'log\..*|data\.workers|data\.threads|data\.cache')  # on resume
# How the weights of a run are read.
READING = re.compile(MAY_CHANGE.pattern + r'|decode\..*|model\.pack')

_CONFIG = config_flags.DEFINE_config_file('config', help_string='FILE.py or FILE.py:word,word')
_WORKDIR = flags.DEFINE_string('workdir', None, 'where the run lives [runs/<config>-<words>]')
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'what to do')
_INPUT = flags.DEFINE_string('input', None, 'what --mode=predict answers')
_QUESTION = flags.DEFINE_string('question', None, 'what is asked about --input')
_OUTPUT = flags.DEFINE_string('output', None, 'where a mode writes [<workdir>/<mode>]')
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'start the run in --workdir anew')
_INIT = flags.DEFINE_string('init_from', None, "weights of another run: DIR or 'DIR:from→to'")
_DATA = flags.DEFINE_bool('allow_data_change', False, 'continue although the data changed')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0, for many hosts')
_PROCESSES = flags.DEFINE_integer('processes', None, 'number of processes')
_PROCESS = flags.DEFINE_integer('process', None, 'index of this process')


def parse(argv: list[str]):
    """Reads the flags; a wrong one is a UserError that names it. Returns the locked config."""
    app.define_help_flags()
    argv = [argv[0], *map(_find_config, argv[1:])]
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(str(error)) from None
    except (AttributeError, KeyError) as error:
        words = re.findall(r"""['"]([^'"\\\\]+)""", str(error)) or ['?']
        name = words[0]
        key = next((a for a in argv[1:] if re.search(rf'[.]{re.escape(name)}(=|\.|$)', a)), name)
        hint = f"; did you mean '{words[1]}'?" if 'Did you mean' in str(error) else ''
        raise UserError(f"the config has no key '{name}' ({key}){hint}") from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument '{rest[1]}'")
    if _CONFIG.value is None:
        raise UserError('give --config=FILE, for example --config=configs/stage3.py')
    return _CONFIG.value


def _find_config(argument: str) -> str:
    """Replaces the name in `--config=stage3:smoke` by the path of that installed config."""
    match = re.fullmatch(r'(--?config=)([^:]+)(.*)', argument, re.DOTALL)
    if not match or pathlib.Path(match.group(2)).is_file():
        return argument
    name = match.group(2)
    here = pathlib.Path(__file__).parent
    folders = [folder for folder in (here / 'configs', here.parent / 'configs') if folder.is_dir()]
    known = {path.stem: path for folder in folders for path in sorted(folder.glob('[a-z]*.py'))}
    if name not in known:
        raise UserError(f"no config file '{name}', nor a config named so: {', '.join(known)}")
    return f'{match.group(1)}{known[name]}{match.group(3)}'


def default_workdir(config_flag: str) -> str:
    """Returns runs/<config>-<words> for 'configs/<config>.py:words'."""
    path, _, argument = config_flag.partition(':')
    return 'runs/' + '-'.join([pathlib.Path(path).stem, *filter(None, argument.split(','))])


def claim(workdir, config: dict, *, overwrite: bool, may_change: re.Pattern = MAY_CHANGE) -> bool:
    """Checks that `workdir` may hold this run; changes nothing. Returns whether one is there."""
    from mmjax.engine.config import differences

    saved = workdir / 'config.json'
    if not saved.exists():
        if workdir.exists() and any(not p.name.endswith('.tmp') for p in workdir.iterdir()):
            raise UserError(f'{workdir} is not empty and holds no run of mmjax (no config.json)')
        return False
    try:
        old = json.loads(saved.read_text())['config']
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{saved} is not a config of mmjax') from None
    if overwrite:
        return True
    found = differences(old, json.loads(json.dumps(config)))
    changed = [difference for difference in found if not may_change.fullmatch(difference[0])]
    if changed:
        what = '; '.join(f'{key} was {old!r}, is {new!r}' for key, old, new in changed)
        remedy = '--overwrite, or another --workdir'
        if may_change is READING:
            remedy = f'another --workdir with --init_from={workdir}'
        raise UserError(f'{workdir} holds a run with another config: {what} ({remedy})')
    return True


def execute(argv: list[str]) -> int:
    """Runs one command; returns its exit code. User-fixable faults are DataErrors."""
    config = parse(argv)
    from etils import epath

    workdir = epath.Path(_WORKDIR.value or default_workdir(flags.FLAGS['config'].config_filename))
    plain = config.to_dict()
    reads = _MODE.value in ('evaluate', 'predict', 'embed', 'export')
    if _MODE.value != 'train' and _OVERWRITE.value:
        raise UserError(f'--overwrite starts a run anew, --mode={_MODE.value} does not')
    may_change = READING if reads else MAY_CHANGE
    existing = _MODE.value != 'prepare' and claim(
        workdir, plain, overwrite=_OVERWRITE.value, may_change=may_change
    )
    if reads and not (existing or _INIT.value):
        raise UserError(f'--mode={_MODE.value} needs a trained run; {workdir} holds none')
    finished = workdir / 'results.json'
    if _MODE.value == 'train' and existing and finished.exists() and not _OVERWRITE.value:
        print(finished.read_text())
        print(f'{workdir} is finished (--overwrite starts anew)')
        return 0

    from mmjax.engine import modes

    return modes.run(
        _MODE.value,
        config,
        plain,
        workdir,
        argv=argv,
        existing=existing,
        overwrite=_OVERWRITE.value,
        input=_INPUT.value,
        question=_QUESTION.value,
        output=_OUTPUT.value,
        init_from=_INIT.value,
        allow_data_change=_DATA.value,
        processes=(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value),
    )


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns 0 done, 1 a fault told in one sentence, 75 preempted and saved."""
    argv = sys.argv if argv is None else argv
    try:
        return execute(argv)
    except UserError as error:
        print(f'mmjax: {error}', file=sys.stderr)
        return 1
    except SystemExit:  # absl has printed its --help
        return 0


if __name__ == '__main__':
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (1, 75):
        os._exit(code)  # loader threads and a broken peer must not delay the way out
    sys.exit(code)
