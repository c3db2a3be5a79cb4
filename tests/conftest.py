"""What every test runs under: CPU, parsed flags, a compilation cache, and no TensorFlow."""

import importlib.machinery
import os
import pathlib
import sys
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=1')
_CACHE = pathlib.Path(tempfile.gettempdir()) / f'mmjax-test-cache-{os.getuid()}'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')
ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that configs may name 'tests.toy_tasks:…'


class _Forbidden:
    """Makes `import tensorflow` and `import torch` raise in the whole suite.

    They are found and cannot be loaded: libraries that ask whether they are there, by looking
    for a spec or in sys.modules, must neither fail nor believe so.
    """

    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('tensorflow', 'torch'):
            return importlib.machinery.ModuleSpec(name, self)
        return None

    def create_module(self, spec):
        raise ModuleNotFoundError(f'mmjax must not import {spec.name}', name=spec.name)

    def exec_module(self, module):
        raise AssertionError('never reached')


sys.meta_path.insert(0, _Forbidden())

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

import tests.typechecker  # noqa: E402, F401

# The shapes in their signatures hold wherever a test calls these packages.
jaxtyping.install_import_hook(
    ['mmjax.cpu', 'mmjax.losses', 'mmjax.models', 'mmjax.decode'], 'tests.typechecker.check'
)

flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope='session')
def root() -> pathlib.Path:
    """The top of the repository."""
    return ROOT


@pytest.fixture
def unchecked_shapes(monkeypatch):
    """Calls without the import hook, as users make them: wrong shapes meet the checks inside."""
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
