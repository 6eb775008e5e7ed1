"""Segments: exact sizes, pages given back, and nothing but the right memory ever opened."""

import contextlib
import dataclasses
import gc
import os
import socket
import struct

import pytest
import torch

from phi_cluster.cluster.messages import SegmentRef
from phi_cluster.cluster.session import memfd
from phi_cluster.cluster.session.segment import (
    FIELDS_OFFSET,
    VERSION,
    Segment,
    SegmentGone,
    SegmentLayout,
    SegmentMismatch,
    peek,
)
from phi_cluster.model.kv_layout import KVCacheLayout

FP = "model-1"
PAGE = 4096


@pytest.fixture
def segment(layout):
    segment = Segment.create(layout, FP)
    yield segment
    segment.close()


def filled(segment, kit, num_tokens, value=1):
    segment.append_tokens(range(num_tokens))
    kit.compute(segment, value)


# Size.


def test_a_new_segment_is_one_page(segment):
    assert segment.nbytes_resident == PAGE
    assert (segment.num_tokens, segment.num_computed_tokens, segment.epoch) == (0, 0, 0)
    assert not segment.long_rope
    assert segment.seed is None


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 1024, 1025, 2048])
def test_memory_is_exactly_the_pages_that_the_tokens_fill(segment, layout, kit, num_tokens):
    filled(segment, kit, num_tokens)
    # Independently of the layout's own arithmetic: 4 ids-bytes a token, 4 regions with 128 bytes a token.
    pages = 1 + -(-num_tokens * 4 // PAGE) + 4 * -(-num_tokens * 128 // PAGE)
    assert segment.nbytes_resident == pages * PAGE == layout.nbytes_used(num_tokens)


def test_reading_ids_allocates_nothing(segment):
    assert segment.token_ids() == []
    assert segment.token_bytes() == b""
    assert segment.nbytes_resident == PAGE


@pytest.mark.parametrize(
    ("num_tokens", "num_computed", "num_copied"), [(100, 100, 100), (100, 60, 100), (100, 100, 33)]
)
def test_a_copy_has_exactly_what_it_was_told(segment, layout, kit, num_tokens, num_computed, num_copied):
    filled(segment, kit, num_tokens, value=7)
    segment.set_num_computed_tokens(num_computed)
    copy = Segment.create(layout, FP)
    copy.copy_from(segment, num_copied)
    computed = min(num_computed, num_copied)
    assert (copy.token_ids(), copy.num_computed_tokens) == (list(range(num_copied)), computed)
    assert copy.nbytes_resident == layout.nbytes_used(num_copied, computed)
    row = layout.kv.row_nbytes
    for region in range(layout.kv.num_regions):
        rows = bytes(copy.kv_buffer[region * layout.kv.region_nbytes :][: 32 * 4 * row])
        # Not a byte behind the last row, although the pages are there.
        assert rows == bytes([7]) * (computed * row) + bytes(32 * 4 * row - computed * row)
    assert copy.nonce != segment.nonce
    copy.close()


def test_a_copy_is_of_the_same_regime(segment, layout, kit):
    segment.long_rope = True
    filled(segment, kit, 40)
    copy = Segment.create(layout, FP)
    copy.copy_from(segment, 20)
    assert copy.long_rope
    assert copy.num_computed_tokens == 20
    copy.close()


def test_only_what_is_there_is_copied_and_only_to_new_memory(segment, layout, kit):
    filled(segment, kit, 10)
    copy = Segment.create(layout, FP)
    for num_tokens in (11, -1):
        with pytest.raises(ValueError, match="cannot copy"):
            copy.copy_from(segment, num_tokens)
    copy.append_tokens([1])
    with pytest.raises(ValueError, match="cannot copy"):
        copy.copy_from(segment, 5)
    copy.close()


@pytest.mark.parametrize(("before", "after"), [(2048, 0), (2048, 1), (2048, 33), (100, 96), (33, 32), (64, 64)])
def test_trimming_gives_whole_pages_back(segment, layout, kit, before, after):
    filled(segment, kit, before)
    segment.trim(after)
    assert segment.nbytes_resident == layout.nbytes_used(after)
    assert segment.token_ids() == list(range(after))
    assert segment.num_computed_tokens == after


def test_trimming_gives_back_what_a_dead_writer_left_beyond_the_counters(segment, layout, kit):
    filled(segment, kit, 40)
    kit.write_kv(segment, 40, 400, 9)
    assert segment.nbytes_resident > layout.nbytes_used(40)
    segment.trim(40)
    assert segment.nbytes_resident == layout.nbytes_used(40)


def test_a_huge_segment_costs_one_page():
    layout = SegmentLayout(KVCacheLayout(32, 32, 96, 131_072, 2))
    segment = Segment.create(layout, FP)
    assert layout.nbytes > 50e9
    assert segment.nbytes_resident == PAGE
    segment.kv_buffer[-1] = 1
    assert segment.nbytes_resident == 2 * PAGE
    segment.close()


# Contents.


def test_trimmed_and_extended_equals_never_extended(layout, kit):
    one, other = Segment.create(layout, FP), Segment.create(layout, FP)
    filled(one, kit, 50, value=3)
    filled(other, kit, 50, value=3)
    other.append_tokens([7] * 900)
    kit.compute(other, 200)
    other.trim(50)
    for segment in (one, other):
        segment.append_tokens([8, 9])
        kit.compute(segment, 4)
    kv = layout.kv
    for region in range(kv.num_regions):
        start = region * kv.region_nbytes
        assert one.kv_buffer[start : start + 52 * kv.row_nbytes] == other.kv_buffer[start : start + 52 * kv.row_nbytes]
    assert one.token_bytes() == other.token_bytes()
    assert one.nbytes_resident == other.nbytes_resident
    one.close()
    other.close()


def test_cleared_equals_new(segment, kit):
    filled(segment, kit, 2048, value=255)
    segment.epoch, segment.long_rope, segment.seed = 4, True, -5
    nonce = segment.nonce
    segment.clear()
    assert segment.nbytes_resident == PAGE
    assert (segment.num_tokens, segment.num_computed_tokens, segment.epoch) == (0, 0, 0)
    assert (segment.long_rope, segment.seed) == (False, None)
    assert segment.nonce == nonce
    assert not any(segment.kv_buffer)
    assert not any(os.pread(segment.ref.fd, segment.layout.ids_nbytes, segment.layout.ids_offset))


def test_dropping_keys_and_values_keeps_the_ids(segment, layout, kit):
    filled(segment, kit, 2000)
    segment.drop_kv()
    assert segment.nbytes_resident == PAGE + 2 * PAGE
    assert (segment.num_tokens, segment.num_computed_tokens) == (2000, 0)
    assert segment.token_ids(1990) == list(range(1990, 2000))


def test_header_fields_are_kept(segment):
    segment.epoch = 2**40
    segment.seed = -(2**63)
    assert (segment.epoch, segment.seed) == (2**40, -(2**63))
    segment.seed = 0
    assert segment.seed == 0


def test_changing_the_rope_regime_uncomputes_everything(segment, kit):
    filled(segment, kit, 10)
    segment.long_rope = False
    assert segment.num_computed_tokens == 10
    segment.long_rope = True
    assert (segment.num_computed_tokens, segment.long_rope) == (0, True)


def test_impossible_numbers_are_refused(segment):
    segment.append_tokens([1, 2, 3])
    with pytest.raises(ValueError, match="computed"):
        segment.set_num_computed_tokens(4)
    with pytest.raises(ValueError, match="trim"):
        segment.trim(4)
    with pytest.raises(ValueError, match="trim"):
        segment.trim(-1)
    with pytest.raises(ValueError, match="fit"):
        segment.append_tokens([0] * 2046)
    with pytest.raises(ValueError, match="no tokens"):
        segment.token_ids(0, 4)
    with pytest.raises(OverflowError):
        segment.append_tokens([2**31])
    assert segment.token_ids() == [1, 2, 3]


@pytest.mark.parametrize("position", [0, 1, 63, 64, 98, 99])
def test_matching_finds_the_first_difference(segment, kit, position):
    from array import array

    segment.append_tokens(range(100))
    other = array("i", range(120))
    assert segment.count_matching(other) == 100
    assert segment.count_matching(other[:30]) == 30
    other[position] = -1
    assert segment.count_matching(other) == position
    assert segment.count_matching(array("i")) == 0


# Sharing.


def test_another_mapping_sees_the_same_bytes(segment, layout, kit):
    filled(segment, kit, 5, value=6)
    segment.long_rope = segment.long_rope
    other = Segment.open(segment.ref, layout, FP)
    assert other.token_ids() == [0, 1, 2, 3, 4]
    assert other.num_computed_tokens == 5
    assert other.kv_buffer[0] == 6
    other.append_tokens([77])
    assert segment.token_ids(5) == [77]
    other.close()


def test_memory_lives_on_with_a_second_holder_whose_reference_is_good(segment, layout, kit):
    filled(segment, kit, 5)
    second = Segment.open(segment.ref, layout, FP)
    first_ref = segment.ref
    segment.close()
    with pytest.raises((SegmentGone, SegmentMismatch)):
        Segment.open(first_ref, layout, FP)
    third = Segment.open(second.ref, layout, FP)
    assert third.token_ids() == [0, 1, 2, 3, 4]
    assert third.nonce == first_ref.nonce
    second.close()
    third.close()


CREATOR = """
import sys
from phi_cluster.cluster.session.segment import Segment, SegmentLayout
from phi_cluster.model.kv_layout import KVCacheLayout
segment = Segment.create(SegmentLayout(KVCacheLayout(2, 2, 16, 2048, 4)), "model-1")
segment.append_tokens([11, 12, 13]); segment.kv_buffer[5] = 99; segment.set_num_computed_tokens(2)
print(segment.ref.pid, segment.ref.fd, segment.nonce.hex(), flush=True)
sys.stdin.read()
"""


def test_kill_9_of_the_creator_leaves_a_mapper_everything(layout, kit):
    with kit.python_child(CREATOR) as (process, (pid, fd, nonce)):
        ref = SegmentRef(int(pid), int(fd), bytes.fromhex(nonce))
        segment = Segment.open(ref, layout, FP)
        process.kill()
        process.wait()
        assert segment.token_ids() == [11, 12, 13]
        assert (segment.kv_buffer[5], segment.num_computed_tokens) == (99, 2)
        segment.append_tokens([14])
        again = Segment.open(segment.ref, layout, FP)
        assert again.token_ids() == [11, 12, 13, 14]
        again.close()
        segment.close()
        with pytest.raises(SegmentGone):
            Segment.open(ref, layout, FP)


def test_peek_tells_the_counters_without_mapping(segment, kit):
    filled(segment, kit, 40)
    segment.append_tokens([1])
    segment.epoch = 3
    stat = peek(segment.ref)
    assert (stat.epoch, stat.long_rope, stat.num_computed_tokens, stat.num_tokens) == (3, False, 40, 41)
    assert stat.nbytes_resident == segment.nbytes_resident
    with pytest.raises(SegmentMismatch):
        peek(dataclasses.replace(segment.ref, nonce=bytes(16)))


# What must never be opened.


def test_another_nonce_is_refused(segment, layout):
    with pytest.raises(SegmentMismatch, match="another KV segment"):
        Segment.open(dataclasses.replace(segment.ref, nonce=os.urandom(16)), layout, FP)


def test_a_reused_descriptor_is_refused(layout):
    first = Segment.create(layout, FP)
    ref = first.ref
    first.close()
    second = Segment.create(layout, FP)
    try:
        # The kernel gives the lowest free number again: the very descriptor, another session's memory.
        assert second.ref.fd == ref.fd
        with pytest.raises(SegmentMismatch):
            Segment.open(ref, layout, FP)
    finally:
        second.close()


def test_other_models_and_layouts_are_refused(segment, layout):
    with pytest.raises(SegmentMismatch, match="another model"):
        Segment.open(segment.ref, layout, "model-2")
    # The same size, cut differently.
    turned = SegmentLayout(dataclasses.replace(layout.kv, num_kv_heads=16, head_dim=2))
    assert turned.nbytes == layout.nbytes
    with pytest.raises(SegmentMismatch, match="another model"):
        Segment.open(segment.ref, turned, FP)


def test_a_plain_file_with_a_perfect_header_is_refused(segment, layout, tmp_path):
    path = tmp_path / "forged"
    path.write_bytes(os.pread(segment.ref.fd, PAGE, 0))
    os.truncate(path, layout.nbytes)
    with path.open("r+b") as file, pytest.raises(SegmentMismatch):
        Segment.open(SegmentRef(os.getpid(), file.fileno(), segment.nonce), layout, FP)


@pytest.mark.parametrize("seals", [0, memfd.SEALS & ~0x2, memfd.SEALS | 0x8])
def test_a_memory_file_with_other_seals_is_refused(segment, layout, seals):
    import fcntl

    fd = os.memfd_create("forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, layout.nbytes)
        os.pwrite(fd, os.pread(segment.ref.fd, PAGE, 0), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(SegmentMismatch):
            Segment.open(SegmentRef(os.getpid(), fd, segment.nonce), layout, FP)
    finally:
        os.close(fd)


@pytest.mark.parametrize("damage", ["magic", "version", "size", "empty"])
def test_a_torn_segment_is_refused(layout, damage):
    nbytes = {"size": layout.nbytes + PAGE, "empty": 0}.get(damage, layout.nbytes)
    whole = Segment.create(layout, FP)
    header = bytearray(os.pread(whole.ref.fd, PAGE, 0))
    if damage == "magic":
        header[0] ^= 1
    elif damage == "version":
        struct.pack_into("=q", header, 8, VERSION + 1)
    fd = memfd.create("torn", nbytes)
    try:
        if nbytes:
            os.pwrite(fd, header, 0)
        with pytest.raises(SegmentMismatch):
            Segment.open(SegmentRef(os.getpid(), fd, whole.nonce), layout, FP)
    finally:
        os.close(fd)
        whole.close()


def test_things_that_are_no_files_are_refused_without_blocking(layout):
    read, write = os.pipe()
    near, far = socket.socketpair()
    null = os.open("/dev/null", os.O_RDWR)
    folder = os.open("/", os.O_RDONLY)
    try:
        for fd in (read, write, near.fileno(), null, folder):
            with pytest.raises((SegmentMismatch, SegmentGone)):
                Segment.open(SegmentRef(os.getpid(), fd, bytes(16)), layout, FP)
    finally:
        for fd in (read, write, null, folder):
            os.close(fd)
        near.close()
        far.close()


def test_nobody_is_gone(layout):
    for ref in (SegmentRef(os.getpid(), 10**6, bytes(16)), SegmentRef(2**22 + 1, 0, bytes(16))):
        with pytest.raises(SegmentGone):
            Segment.open(ref, layout, FP)


def test_refused_references_leak_no_descriptor(segment, layout, kit):
    before = kit.descriptors()
    for ref in (segment.ref, dataclasses.replace(segment.ref, nonce=bytes(16)), SegmentRef(os.getpid(), 0, b"")):
        with contextlib.suppress(SegmentMismatch, SegmentGone):
            Segment.open(ref, layout, "another")
    assert kit.descriptors() == before


def test_the_file_cannot_be_resized(segment, layout):
    fd = segment.ref.fd
    for nbytes in (0, layout.nbytes + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, nbytes)


# Letting go.


def test_close_gives_memory_and_descriptors_back(layout, kit):
    before = kit.descriptors()
    segment = Segment.create(layout, FP)
    filled(segment, kit, 100)
    segment.close()
    segment.close()
    assert kit.descriptors() == before
    with pytest.raises(ValueError, match="closed"):
        _ = segment.ref


def test_a_dropped_segment_is_closed(layout, kit):
    before = kit.descriptors()
    segment = Segment.create(layout, FP)
    assert len(kit.descriptors()) == len(before) + 2
    del segment
    assert kit.descriptors() == before


def test_a_tensor_outlives_close(layout):
    segment = Segment.create(layout, FP)
    tensor = torch.frombuffer(segment.kv_buffer, dtype=torch.float32)
    segment.close()
    del segment
    gc.collect()
    tensor[-1] = 2.5
    assert tensor[-1].item() == 2.5


# Isolation.


def test_a_canary_never_shows_in_another_segment(layout, kit):
    canary = os.urandom(24)
    one, other = Segment.create(layout, FP), Segment.create(layout, FP)
    for _ in range(3):
        for segment in (one, other):
            filled(segment, kit, 64)
        one.kv_buffer[1000:1024] = canary
        one.append_tokens(list(struct.unpack("6i", canary)))
        assert canary not in os.pread(other.ref.fd, layout.nbytes, 0)
        one.clear()
        assert canary not in os.pread(one.ref.fd, layout.nbytes, 0)
        other.clear()
    one.close()
    other.close()


def test_the_fields_start_where_native_code_looks(segment):
    segment.append_tokens([5])
    segment.epoch = 9
    fields = struct.unpack_from("=5q", os.pread(segment.ref.fd, PAGE, 0), FIELDS_OFFSET)
    assert FIELDS_OFFSET % 8 == 0
    assert fields == (9, 0, 0, 0, 1)
