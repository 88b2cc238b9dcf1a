"""Endless sequences: every position is randomly accessible, and an epoch covers all
items.
"""

import numpy as np
import pytest

from jaxreason import data


def take(sequence, start, stop):
    return [sequence[i] for i in range(start, stop)]


def test_each_epoch_is_a_new_order_of_all_items():
    sequence = data.shuffled(list(range(20)), seed=0)
    epochs = [take(sequence, 20 * e, 20 * e + 20) for e in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(range(20)) not in epochs


def test_unshuffled_repeats_in_order():
    assert take(data.shuffled("abc", seed=0, shuffle=False), 0, 7) == list("abcabca")


def test_random_access_equals_iteration():
    first, second = (data.batches(data.shuffled(np.arange(10), seed=3), 4) for _ in range(2))
    iterated = take(first, 0, 12)
    for i in (11, 3, 0, 7):  # crosses epochs: a batch of 4 does not divide 10
        np.testing.assert_array_equal(second[i], iterated[i])


def test_seeds_are_independent():
    # grain alone gives seed 0 in epoch 1 the order of seed 1 in epoch 0
    a, b = (data.shuffled(list(range(9)), seed=seed) for seed in (0, 1))
    assert take(a, 9, 18) != take(b, 0, 9)
    assert take(a, 0, 9) != take(b, 0, 9)
    assert take(a, 0, 9) == take(data.shuffled(list(range(9)), seed=0), 0, 9)


def test_batches_stack_arrays_and_list_the_rest():
    rows = np.arange(12, dtype=np.int32).reshape(6, 2)
    batch = data.batches(data.shuffled(rows, seed=0, shuffle=False), 3)[1]
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, rows[3:])
    assert data.batches(data.shuffled([{"a": 1}, {"b": 2}], seed=0, shuffle=False), 3)[0] == [{"a": 1}, {"b": 2}, {"a": 1}]


def test_mix_keeps_proportions_and_order_within_each():
    a, b = data.shuffled(list(range(100)), seed=0, shuffle=False), data.shuffled(list(range(1000, 1003)), seed=0, shuffle=False)
    mixed = take(data.mix([a, b], (3, 1)), 0, 40)
    assert [item for item in mixed if item < 1000] == list(range(30))
    assert [item for item in mixed if item >= 1000] == [1000, 1001, 1002] * 3 + [1000]
    assert all(sum(item >= 1000 for item in mixed[i : i + 4]) == 1 for i in range(0, 40, 4))
    with pytest.raises(ValueError, match="one weight above 0"):
        data.mix([a, b], (1, 0))


def test_token_windows():
    windows = data.token_windows([[1, 2, 3], [], np.array([4, 5, 6, 7])], 4, eos_id=0)
    assert windows.dtype == np.int32
    assert windows.tolist() == [[1, 2, 3, 0], [0, 4, 5, 6]]  # 7 and the last 0 do not fill a window
    assert data.token_windows([[1, 2], [3, 4]], 2).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="the corpus has 3 tokens, a window 4"):
        data.token_windows([[1, 2], [3]], 4)
    with pytest.raises(ValueError, match="has 0 tokens"):
        data.token_windows([], 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.shuffled([], seed=0), "no items"),
        (lambda: data.batches(data.shuffled([1], seed=0), 0), "batch size 0"),
    ],
)
def test_errors_name_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
