"""Writes the record of a run: metrics.jsonl, results.json, figures, TensorBoard, progress."""

from mmjax.engine.logs.files import read, replace, truncate, write_json, write_results
from mmjax.engine.logs.record import Logs

__all__ = ['Logs', 'read', 'replace', 'truncate', 'write_json', 'write_results']
