"""Killed runs of the retrieval and the sign-language recipe end as unbroken ones."""

import pytest

from tests.kills import survives


@pytest.mark.slow
def test_kill_9_changes_nothing_in_the_retrieval_recipe(tmp_path, monkeypatch):
    """Two stages, PK batches, batch statistics."""
    assert survives('clip_retrieval', 7, tmp_path, monkeypatch) > 0


@pytest.mark.slow
def test_kill_9_changes_nothing_in_the_sign_recipe(tmp_path, monkeypatch):
    """Two stages, buckets, random augmentation."""
    assert survives('sign_ctc', 11, tmp_path, monkeypatch) > 0
