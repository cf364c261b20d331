"""Rounding once, where another way would round twice."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from lorastack.merging.rounding import Rounding

BF16 = np.dtype(ml_dtypes.bfloat16)


def test_float64_reaches_bfloat16_in_one_step() -> None:
    # 1 + 2^-8 is half way between two bfloat16; float32 cannot tell what lies 2^-40 beside it from that.
    half, little = 1 + 2.0**-8, 2.0**-40
    values = np.array([half + little, half - little, half, -(half + little), 1 + 3 * 2.0**-8 - little, 0.0, -0.0])
    found = Rounding().to(values, BF16).astype(np.float64)
    step = 2.0**-7
    assert found.tolist() == [1 + step, 1.0, 1.0, -(1 + step), 1 + step, 0.0, -0.0]
    assert values.astype(np.float32).astype(BF16).astype(np.float64)[0] == 1.0  # in two steps
    rng = np.random.default_rng(0)
    wide = rng.standard_normal(100_000)
    near = Rounding().to(wide, BF16).astype(np.float64)
    up, down = (np.nextafter(near.astype(BF16), BF16.type(d)).astype(np.float64) for d in (np.inf, -np.inf))
    assert (np.abs(near - wide) <= np.minimum(np.abs(up - wide), np.abs(down - wide))).all()


def test_infinite_and_largest_values_stay_what_they_are() -> None:
    values = np.array([np.inf, -np.inf, np.nan, 3.3e38, -1e300])
    found = Rounding().to(values, BF16).astype(np.float64)
    np.testing.assert_array_equal(np.isfinite(found), [False, False, False, True, False])
    for kind in (np.dtype(np.float16), BF16):
        there = Rounding("stochastic").to(values[:3].astype(np.float32), kind).astype(np.float64)
        np.testing.assert_array_equal(there, values[:3])
