"""What every test runs under: CPU, parsed flags, a compilation cache, and no TensorFlow."""

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


for _name in ('tensorflow', 'torch'):
    sys.modules[_name] = None  # `import tensorflow` raises in the whole suite

import pytest  # noqa: E402
from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope='session')
def root() -> pathlib.Path:
    """The top of the repository."""
    return ROOT
