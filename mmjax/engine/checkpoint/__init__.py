"""Checkpoints by Orbax: asynchronous, checksummed saves; walking back; strict and partial loads.

<workdir>/checkpoints/<step>/   state/  meta/meta.json  checksums.json     the last `keep`
<workdir>/best/<step>/          the same, of the weights that scored best   exactly one
<workdir>/corrupt/              what was damaged or cut, put aside
"""

from mmjax.engine.checkpoint.store import Checkpoints
from mmjax.engine.checkpoint.weights import Report, load_weights, merge, run_of

__all__ = ['Checkpoints', 'Report', 'load_weights', 'merge', 'run_of']
