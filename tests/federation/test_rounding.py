"""An update in bfloat16: the rounding is torch's, and the lead adds it to what it sent."""

import numpy as np
import torch

from fedtune.federation.rounding import MOST_ROUNDING, add_difference, rounded_difference


def rounded(values: np.ndarray) -> np.ndarray:
    """The values that arrive where the adapter that was sent is 0."""
    sent = {"w": np.zeros_like(values)}
    return add_difference(sent, rounded_difference({"w": values}, sent))["w"]


def test_every_float_is_rounded_as_torch_rounds_it() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    # Beside each of 256 exponents and signs: ends of a binade, ties and their neighbours.
    near = (np.arange(512, dtype=np.uint32)[:, None] << 23) + np.array([0, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7FFFFF])
    values = np.concatenate([bits, near.ravel().astype(np.uint32)]).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert (rounded(values) + 0.0).tobytes() == (expected + 0.0).tobytes()  # adding makes 0 of -0
    assert np.isnan(rounded(np.array([0x7FC00001, 0x7FFFFFFF, 0xFFC00000], np.uint32).view(np.float32))).all()


def test_what_arrives_is_the_adapter_that_was_sent_and_a_rounded_move() -> None:
    draws = np.random.default_rng(1)
    sent = {name: draws.normal(size=shape).astype(np.float32) for name, shape in (("a", (3, 5)), ("b", (4,)))}
    trained = {name: value + np.float32(1e-3) * draws.normal(size=value.shape) for name, value in sent.items()}
    trained = {name: value.astype(np.float32) for name, value in trained.items()}
    arrived = add_difference(sent, rounded_difference(trained, sent))
    for name, value in arrived.items():
        assert (value.dtype, value.shape) == (np.float32, sent[name].shape)
        moved = np.abs(value.astype(np.float64) - sent[name])
        assert (np.abs(value - trained[name]) <= MOST_ROUNDING * moved + 2.0**-23 * np.abs(value)).all()
    still = add_difference(sent, rounded_difference(sent, sent))
    assert all((still[name] == sent[name]).all() for name in sent), "a tensor that rests stays as it is"
