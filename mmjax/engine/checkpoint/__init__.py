"""Saves and restores runs with Orbax: asynchronous, with checksums, strict or in part.

<workdir>/checkpoints/<step>/   state/  meta/meta.json  checksums.json     the last `keep` steps
<workdir>/best/<step>/          the same, for the weights with the best score; exactly one
<workdir>/corrupt/              damaged or unfinished steps, moved out of the way
"""

from mmjax.engine.checkpoint.store import Checkpoints
from mmjax.engine.checkpoint.weights import load_weights, merge, run_of

__all__ = ['Checkpoints', 'load_weights', 'merge', 'run_of']
