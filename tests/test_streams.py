"""Safetensors files written from front to back: the same bytes as at once, also where vectors turn out shorter."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pipelines import streams
from pipelines.streams import map_safetensors, put, safetensors_file


@given(
    lengths=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    spare=st.lists(st.integers(0, 3000), min_size=3, max_size=3),
    at_once=st.integers(1, 50),
)
@settings(max_examples=60, deadline=None)
def test_room_that_was_not_needed_leaves_no_trace(lengths: list[int], spare: list[int], at_once: int) -> None:
    draw = np.random.default_rng(sum(lengths))
    arrays = {
        "wide": draw.integers(0, 99, lengths[0]),
        "square": draw.random((3, 4), np.float32),
        "narrow": draw.integers(0, 99, lengths[1]).astype(np.int32),
        "byte": draw.integers(0, 99, lengths[2]).astype(np.uint8),
    }
    room = dict(zip(("wide", "narrow", "byte"), spare, strict=True))
    before = streams._COPIED_AT_ONCE
    try:
        streams._COPIED_AT_ONCE = at_once
        with TemporaryDirectory() as name:
            files = []
            for more in ({}, room):
                files.append(Path(name) / f"{len(files)}.safetensors")
                layout = {
                    key: (value.dtype.type, value.shape if value.ndim > 1 else (len(value) + more.get(key, 0),))
                    for key, value in arrays.items()
                }
                with safetensors_file(files[-1], layout, {"names": "a\nb"}) as opened:
                    for key in reversed(arrays):
                        half = len(arrays[key]) // 2
                        put(opened[key], arrays[key][:half])
                        put(opened[key], arrays[key][half:])
            assert files[0].read_bytes() == files[1].read_bytes()
            for found in (load_file(files[1]), map_safetensors(files[1])):
                assert set(found) == set(arrays)
                for key, value in arrays.items():
                    assert found[key].dtype == value.dtype
                    assert found[key].tolist() == value.tolist()
    finally:
        streams._COPIED_AT_ONCE = before
