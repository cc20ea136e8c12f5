from __future__ import annotations

import numpy as np

from swirl_fast.models.upload import upload


def test_arrays_of_any_type_and_shape_come_back() -> None:
    arrays = [
        np.arange(3, dtype=np.int32),
        np.zeros(0, np.float32),
        np.arange(12, dtype=np.int16).reshape(3, 2, 2),
        np.asarray(np.linspace(0, 1, 10, dtype=np.float32)[::2]),
        np.array([2**40, -1]),
    ]
    for array, found in zip(arrays, upload(arrays, "cpu"), strict=True):
        assert found.numpy().dtype == array.dtype
        np.testing.assert_array_equal(found.numpy(), array)
    assert upload([], "cpu") == []
