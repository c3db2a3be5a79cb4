"""Installs mmjax: `pip install .`, with the extras `test`, `gpu` and `tpu`."""

import pathlib
import re

import setuptools

here = pathlib.Path(__file__).parent
version = re.search(r"__version__ = '(.*)'", (here / 'mmjax/__init__.py').read_text()).group(1)
code = ['tree-sitter>=0.25', 'tree-sitter-c>=0.24']  # to make rows from C files

setuptools.setup(
    name='mmjax',
    version=version,
    description='Trains multimodal models in stages, on JAX',
    long_description=(here / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=[*setuptools.find_packages(include=['mmjax', 'mmjax.*']), 'mmjax.configs'],
    package_dir={'mmjax.configs': 'configs'},
    package_data={'mmjax': ['py.typed']},
    install_requires=[
        'absl-py>=2.1',
        'array_record>=0.8.1',
        'etils[epath]>=1.12',
        'flax>=0.12',
        'grain>=0.2.15',
        'jax>=0.10',
        'jaxtyping>=0.3',
        'matplotlib>=3.9',
        'ml_collections>=1.1',
        'numpy>=2.0',
        'optax>=0.2.6',
        'orbax-checkpoint>=0.11.30',
        'pillow>=11',
        'rich>=13',
        'rouge-score>=0.1.2',
        'sacrebleu>=2.4',
        'safetensors>=0.5',
        'tensorboardX>=2.6',
        'tensorflow-datasets>=4.9.8',
        'tokenizers>=0.21',
    ],
    extras_require={
        'code': code,
        'test': [
            'chex>=0.1.90',
            'beartype>=0.20',
            'mypy>=1.18',
            'pytest>=8',
            'pytest-xdist>=3.6',
            'ruff>=0.12',
            'scipy>=1.14',
            'jiwer>=4',
            *code,
        ],
        'gpu': ['jax[cuda12]>=0.10'],
        'tpu': ['jax[tpu]>=0.10'],
    },
)
