"""How jaxtyping's import hook checks signatures: by beartype, without the fields of modules."""

import beartype

_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # int is a float


def check(function):
    """Checks a function's calls; fields of Linen modules have types that cannot be checked."""
    return function if function.__name__ == '__init__' else _check(function)
