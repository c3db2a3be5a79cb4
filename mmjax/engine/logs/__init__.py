"""A run's record: metrics.jsonl, results.json, pictures, TensorBoard, and the progress line."""

from mmjax.engine.logs.files import plain, read, replace, truncate, write_json, write_results
from mmjax.engine.logs.record import Logs

__all__ = ['Logs', 'plain', 'read', 'replace', 'truncate', 'write_json', 'write_results']
