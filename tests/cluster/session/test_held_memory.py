"""A held descriptor keeps a segment alive when its owner is gone, and only the right one."""

import dataclasses
import os

import pytest

from phi_cluster.cluster.session.held_memory import HeldMemory
from phi_cluster.cluster.session.segment import Segment, SegmentGone, SegmentMismatch


def test_memory_outlives_its_owner(layout, kit):
    before = kit.descriptors()
    segment = Segment.create(layout, kit.fingerprint)
    segment.append_tokens([1, 2, 3])
    kit.compute(segment, 7)
    held = HeldMemory(segment.ref)
    segment.close()
    other = Segment.open(held.ref, layout, kit.fingerprint)
    assert other.token_ids() == [1, 2, 3]
    assert (other.num_computed_tokens, other.kv_buffer[0]) == (3, 7)
    other.close()
    held.close()
    held.close()
    assert kit.descriptors() == before


def test_what_is_not_there_or_is_something_else(layout, kit):
    before = kit.descriptors()
    segment = Segment.create(layout, kit.fingerprint)
    with pytest.raises(SegmentMismatch):
        HeldMemory(dataclasses.replace(segment.ref, nonce=os.urandom(16)))
    ref = segment.ref
    segment.close()
    with pytest.raises((SegmentGone, SegmentMismatch)):
        HeldMemory(ref)
    assert kit.descriptors() == before
