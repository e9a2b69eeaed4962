"""Parts of an adapter that sites of smaller ranks train, and the average of products."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.federation.update_store import UpdateStore
from fedtune.model.adapter import Adapter
from fedtune.model.ranks import count_trained_values, cut_to_rank, pad_to_full_rank, project_average

A, B = "m.lora_A.weight", "m.lora_B.weight"
RANK, INPUTS, OUTPUTS = 4, 7, 6


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def make_sent() -> dict[str, np.ndarray]:
    return {"head.weight": draw(3, INPUTS), A: draw(RANK, INPUTS), B: draw(OUTPUTS, RANK)}


def test_cut_keeps_the_first_rows_of_a_and_columns_of_b() -> None:
    sent = make_sent()
    part = cut_to_rank(sent, 2)
    np.testing.assert_array_equal(part[A], sent[A][:2])
    np.testing.assert_array_equal(part[B], sent[B][:, :2])
    assert part["head.weight"] is sent["head.weight"]
    of_rows = {name: torch.from_numpy(np.stack([value, 2 * value])) for name, value in sent.items()}
    for name, value in cut_to_rank(of_rows, 2, axis=1).items():
        np.testing.assert_array_equal(value[1].numpy(), 2 * part[name])
    assert cut_to_rank(sent, None) == sent
    assert count_trained_values(sent, {"a": 2, "b": None}) == {"a": 21 + 2 * 13, "b": 21 + 4 * 13}


def test_padded_update_keeps_what_the_site_did_not_train() -> None:
    sent = make_sent()
    part = {name: value + 1 for name, value in cut_to_rank(sent, 2).items()}
    padded = pad_to_full_rank(part, sent, 2)
    for name, value in cut_to_rank(padded, 2).items():
        np.testing.assert_array_equal(value, part[name])
    np.testing.assert_array_equal(padded[A][2:], sent[A][2:])
    np.testing.assert_array_equal(padded[B][:, 2:], sent[B][:, 2:])
    assert pad_to_full_rank(sent, sent, None) is sent


@pytest.mark.parametrize("trained", [A, B])
def test_padded_average_is_the_average_product_if_one_factor_trains(trained: str) -> None:
    sent, weights = make_sent(), (0.25, 0.75)
    updates = []
    for number, rank in enumerate((2, RANK)):
        part = dict(cut_to_rank(sent, rank))
        part[trained] = part[trained] + draw(*part[trained].shape, seed=number)
        updates.append(pad_to_full_rank(part, sent, rank))
    average = {name: sum(w * update[name] for w, update in zip(weights, updates, strict=True)) for name in (A, B)}
    products = sum(w * update[B] @ update[A] for w, update in zip(weights, updates, strict=True))
    np.testing.assert_allclose(average[B] @ average[A], products, rtol=1e-4, atol=1e-5)


def test_projection_is_the_closest_matrix_of_the_rank() -> None:
    sent, products = draw(RANK, INPUTS), [(w, draw(OUTPUTS, RANK, seed=n), draw(RANK, INPUTS, seed=n))
                                          for n, w in enumerate((0.5, 0.3, 0.2))]  # fmt: skip
    b, a = project_average(products, sent)
    exact = sum(w * left.astype(np.float64) @ right.astype(np.float64) for w, left, right in products)
    u, values, v = np.linalg.svd(exact)
    best = u[:, :RANK] * values[:RANK] @ v[:RANK]
    assert values[RANK] > 0.1, "the average must have a greater rank"
    np.testing.assert_allclose(b @ a, best, atol=1e-5)
    size = np.square(sent).sum() / RANK
    np.testing.assert_allclose(a @ a.T, size * np.eye(RANK), atol=1e-5)
    strengths = np.linalg.norm(b, axis=0)
    assert list(strengths) == sorted(strengths, reverse=True), "the strongest directions must be first"


def test_projection_keeps_equal_products_and_idle_directions() -> None:
    sent = draw(RANK, INPUTS)
    b, a = project_average([(0.5, np.zeros((OUTPUTS, RANK), np.float32), sent)] * 2, sent)
    assert not b.any(), "B must be zero before training"
    np.testing.assert_allclose(a @ a.T, np.square(sent).sum() / RANK * np.eye(RANK), atol=1e-5)
    narrow = draw(2, RANK)  # a layer with two outputs: the other two rows of A must stay as sent
    b, a = project_average([(1.0, narrow, sent)], sent)
    np.testing.assert_allclose(b @ a, narrow @ sent, atol=1e-5)
    np.testing.assert_array_equal(a[2:], sent[2:])
    assert not b[:, 2:].any()


def test_average_of_products_replaces_lora_factors_only(tmp_path: Path) -> None:
    sent = Adapter(make_sent())
    with UpdateStore(tmp_path / "arrived", sent) as arrived:
        updates = {site: {name: draw(*value.shape, seed=n) for name, value in sent.tensors.items()}
                   for n, site in enumerate("ab", 1)}  # fmt: skip
        for site, tensors in updates.items():
            arrived.put(site, tensors)
        averaged = arrived.average_products(sent, {"a": 10, "b": 30})
    np.testing.assert_array_equal(averaged.tensors["head.weight"], sent.tensors["head.weight"])
    products = [(w, updates[site][B], updates[site][A]) for site, w in (("a", 0.25), ("b", 0.75))]
    for name, value in zip((B, A), project_average(products, sent.tensors[A]), strict=True):
        np.testing.assert_array_equal(averaged.tensors[name], value)
