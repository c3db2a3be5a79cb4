"""The command line: `python -m mmjax.main --config=FILE[:words] [--mode=…] [--config.key=value …]`.

Only light modules are imported before the flags and the config are read, so that --help answers at
once and a wrong key is refused before JAX is loaded.
"""

import argparse
import json
import os
import pathlib
import re
import sys
from typing import NoReturn

from mmjax import sections
from mmjax.engine import config as config_lib
from mmjax.errors import UserError

MODES = ('train', 'evaluate', 'predict', 'prepare', 'embed', 'export')
MAY_CHANGE = re.compile(r'log\..*|data\.workers|data\.threads|data\.cache')  # on resume
# When a run is read.
READING = re.compile(MAY_CHANGE.pattern + r'|decode\..*|model\.pack')


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


_FLAGS = {
    '--config': {
        'metavar': 'NAME[:words]',
        'help': "an installed config, like 'stage3:smoke', or a file",
    },
    '--workdir': {'help': 'where the run lives [runs/<config>-<words>]'},
    '--mode': {'default': 'train', 'choices': MODES, 'help': 'what to do [train]'},
    '--input': {'help': 'what --mode=predict answers'},
    '--question': {'help': 'a question about --input'},
    '--output': {'help': 'where a mode writes [<workdir>/<mode>]'},
    '--overwrite': {'action': 'store_true', 'help': 'start the run in --workdir anew'},
    '--init_from': {'help': "weights of another run: DIR or 'DIR:from→to'"},
    '--allow_data_change': {
        'action': 'store_true',
        'help': 'continue although the data changed',
    },
    '--max_steps': {'type': int, 'help': 'stop after so many updates, saved'},
    '--print_config': {'action': 'store_true', 'help': 'print the resolved config and stop'},
    '--dry_run': {
        'action': 'store_true',
        'help': 'print plan, parameters and memory; train nothing',
    },
    '--coordinator': {'help': 'host:port of process 0, for many hosts'},
    '--processes': {'type': int, 'help': 'number of processes'},
    '--process': {'type': int, 'help': 'index of this process'},
}


def _parser() -> _Parser:
    parser = _Parser(
        prog='python -m mmjax.main',
        description='Trains, evaluates and applies models in stages.',
        add_help=False,
        allow_abbrev=False,
    )
    about = 'show this; with --config, its keys too'
    parser.add_argument('--help', '-h', action='store_true', help=about)
    for name, options in _FLAGS.items():
        parser.add_argument(name, **options)
    return parser


def split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Splits arguments into flags and the (key, text) pairs of --config.key=text."""
    rest = []
    overrides = []
    arguments = iter(argv)
    for argument in arguments:
        match = re.fullmatch(r'--?config\.([^=]+)(?:=(.*))?', argument, re.DOTALL)
        if match is None:
            rest.append(argument)
            continue
        key, text = match.groups()
        if text is None:
            text = next(arguments, None)
        if text is None or text.startswith('--'):
            raise UserError(f'--config.{key} needs a value')
        overrides.append((key, text))
    return rest, overrides


def default_workdir(config_flag: str) -> str:
    """Returns runs/<config>-<words> for 'configs/<config>.py:words'."""
    path, _, argument = config_flag.partition(':')
    return 'runs/' + '-'.join([pathlib.Path(path).stem, *filter(None, argument.split(','))])


def claim(
    workdir,
    config: dict,
    defaults: dict,
    *,
    overwrite: bool,
    may_change: re.Pattern = MAY_CHANGE,
) -> bool:
    """Checks that `workdir` may hold this run; changes nothing. Returns whether one is there.

    A key that the saved config lacks counts as its default.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f'--workdir={workdir} is a file')
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
    differences = config_lib.differences(config_lib.with_defaults(old, defaults), config)
    changed = [difference for difference in differences if not may_change.fullmatch(difference[0])]
    if changed:
        what = '; '.join(f'{key} was {old!r}, is {new!r}' for key, old, new in changed)
        remedy = '--overwrite, or another --workdir'
        if may_change is READING:
            remedy = f'another --workdir with --init_from={workdir}'
        raise UserError(f'{workdir} holds a run with another config: {what} ({remedy})')
    return True


def execute(argv: list[str]) -> int:
    """Runs one command; returns its exit code. Faults that a user can fix are UserErrors."""
    rest, overrides = split_overrides(argv[1:])
    parser = _parser()
    flags = parser.parse_args(rest)
    if flags.help:
        print(parser.format_help())
        cls = config_lib.Config
        if flags.config:
            cls = config_lib.config_class(config_lib.load(flags.config).get('task') or '')
        print('keys of the config:')
        print(config_lib.help_text(cls))
        return 0
    if flags.config is None:
        raise UserError('give --config, for example --config=stage3:smoke')
    if flags.max_steps is not None and flags.max_steps < 1:
        raise UserError(f'--max_steps={flags.max_steps} is not at least 1')
    config = config_lib.load(flags.config)
    config_lib.override(config, overrides)
    resolved = config_lib.resolve(config)
    plain = json.loads(json.dumps(sections.to_dict(resolved)))
    if flags.print_config:
        print(json.dumps(plain, indent=1))
        return 0
    from etils import epath

    mode = flags.mode
    workdir = epath.Path(flags.workdir or default_workdir(flags.config))
    reads = mode in ('evaluate', 'predict', 'embed', 'export')
    if mode != 'train' and flags.overwrite:
        raise UserError(f'--overwrite starts a run anew, --mode={mode} does not')
    may_change = READING if reads else MAY_CHANGE
    defaults = json.loads(json.dumps(sections.to_dict(type(resolved)())))
    existing = mode != 'prepare' and claim(
        workdir, plain, defaults, overwrite=flags.overwrite, may_change=may_change
    )
    if reads and not (existing or flags.init_from):
        raise UserError(f'--mode={mode} needs a trained run; {workdir} holds none')
    finished = workdir / 'results.json'
    trains = mode == 'train' and not flags.dry_run
    if trains and existing and finished.exists() and not flags.overwrite:
        print(finished.read_text())
        print(f'{workdir} is finished (--overwrite starts anew)')
        return 0

    from mmjax.engine import modes

    command = modes.Command(
        mode=mode,
        workdir=workdir,
        argv=argv,
        existing=existing,
        overwrite=flags.overwrite,
        input=flags.input,
        question=flags.question,
        output=flags.output,
        init_from=flags.init_from,
        allow_data_change=flags.allow_data_change,
        max_steps=flags.max_steps,
        dry_run=flags.dry_run,
        coordinator=flags.coordinator,
        processes=flags.processes,
        process=flags.process,
    )
    return modes.run(resolved, command)


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns 0 done, 1 a fault in one sentence, 75 stopped by a signal."""
    argv = sys.argv if argv is None else argv
    try:
        return execute(argv)
    except UserError as error:
        print(f'mmjax: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (1, 75):
        os._exit(code)  # loader threads and a broken peer must not delay the way out
    sys.exit(code)
