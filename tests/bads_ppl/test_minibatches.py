import pytest
import torch

from bads_ppl.errors import InputError
from bads_ppl.minibatches import ImportanceMinibatches, UniformMinibatches, check_batch_size


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


WEIGHTS = torch.cat([torch.full((18,), 0.02), torch.tensor([0.9, 0.5])])


def uniform(size=20, batch=6, seed=0):
    return UniformMinibatches(size, batch, generator(seed))


def importance(batch=6, seed=0, weights=WEIGHTS, block=7):
    return ImportanceMinibatches(
        len(weights), batch, generator(seed), lambda rows: weights[rows].clone(), block
    )


LENGTHS = torch.tensor([3, 40, 3, 7, 21, 8, 2, 30, 9, 9, 5, 14, 33, 3, 26, 6, 11, 2, 19, 4])


def bucketed(size=20, batch=6, seed=0, lengths=LENGTHS, bucket=2):
    return UniformMinibatches(size, batch, generator(seed), lengths, bucket)


def padding(rows, lengths, steps) -> float:
    """Mean number of places of a batch that are padding."""
    found = [lengths[rows.next().index] for _ in range(steps)]
    return sum(float((each.max() - each).sum()) for each in found) / steps


def chances(batch=6, weights=WEIGHTS) -> torch.Tensor:
    """Mean over a batch's places of the probability of a row: q_i."""
    share = (batch // 2) / batch
    return (1 - share) / len(weights) + share * weights / weights.sum()


# uniform


@pytest.mark.parametrize("batch", [1, 6, 7, 19, 20])
def test_uniform_batches_hold_distinct_rows_of_the_set(batch):
    rows = uniform(batch=batch)
    for _ in range(30):
        found = rows.next()
        assert found.index.shape == (batch,) and found.index.dtype == torch.int64
        assert len(found.index.unique()) == batch
        assert found.index.min() >= 0 and found.index.max() < 20
        assert found.importance is None


def test_uniform_batches_use_every_row_equally_often():
    rows = uniform(20, 6)  # two rows of each pass are left out, not always the same
    steps = 6000
    counts = torch.zeros(20)
    for _ in range(steps):
        counts[rows.next().index] += 1
    # a row is in 3 of 3.33 batches' worth: the sd of its count is below that of coin tosses
    assert (counts / steps - 0.3).abs().max() < 4 * (0.3 * 0.7 / steps) ** 0.5


def test_a_pass_uses_every_row_once_where_batches_fit():
    rows = uniform(20, 5)
    for _ in range(3):
        seen = torch.cat([rows.next().index for _ in range(4)])
        assert sorted(seen.tolist()) == list(range(20))


def test_passes_differ_and_follow_the_generator():
    def orders(seed):
        rows = uniform(20, 10, seed)
        return [rows.next().index.tolist() for _ in range(4)]

    assert orders(1) == orders(1) != orders(2)
    assert orders(1)[:2] != orders(1)[2:]


def test_a_batch_of_the_whole_set_is_in_order_and_uses_no_randomness():
    rows = uniform(20, 20)
    before = rows.generator.get_state()
    assert rows.next().index.tolist() == list(range(20))
    assert torch.equal(rows.generator.get_state(), before)


# rows of like length


@pytest.mark.parametrize("bucket", [1, 2, 3, 9])
@pytest.mark.parametrize("batch", [1, 5, 6])
def test_rows_of_like_length_come_at_most_once_a_pass(batch, bucket):
    rows, count = bucketed(batch=batch, bucket=bucket), 20 // batch
    for _ in range(5):
        found = [rows.next() for _ in range(count)]
        assert all(each.index.shape == (batch,) and each.importance is None for each in found)
        assert all(each.index.dtype == torch.int64 for each in found)
        assert len(torch.cat([each.index for each in found]).unique()) == count * batch


@pytest.mark.parametrize("bucket", [2, 3, 9])  # the last bucket of a pass is smaller, or not full
def test_a_row_is_as_likely_in_every_step_of_a_pass_whatever_its_length(bucket):
    rows, passes = bucketed(batch=4, bucket=bucket), 2000
    counts = torch.zeros(5, 20)
    for _ in range(passes):
        for step in range(5):
            counts[step, rows.next().index] += 1
    error = (0.2 * 0.8 / passes) ** 0.5
    assert (counts / passes - 0.2).abs().max() < 4.5 * error  # by chance in 1 of 1,400 seeds


def test_a_row_is_left_out_of_a_pass_as_often_whatever_its_length():
    rows, passes = bucketed(batch=6), 2000  # two rows of each pass are left out
    counts = torch.zeros(20)
    for _ in range(3 * passes):
        counts[rows.next().index] += 1
    assert (counts / passes - 0.9).abs().max() < 4.5 * (0.9 * 0.1 / passes) ** 0.5


@pytest.mark.parametrize("bucket", [4, 100])
def test_batches_that_are_all_cut_together_hold_rows_of_one_length(bucket):
    lengths = torch.tensor([5, 1, 7, 3, 1, 7, 3, 5])
    rows, firsts = bucketed(8, 2, lengths=lengths, bucket=bucket), set()
    for _ in range(8):
        found = [lengths[rows.next().index].tolist() for _ in range(4)]
        assert sorted(found) == [[1, 1], [3, 3], [5, 5], [7, 7]]
        firsts.add(found[0][0])
    assert len(firsts) > 1  # the shortest do not always come first


def test_the_more_batches_are_cut_together_the_less_is_padding():
    found = [padding(bucketed(batch=5, bucket=bucket), LENGTHS, 400) for bucket in (1, 2, 4)]
    whole = LENGTHS.sort().values.view(4, 5)
    assert found[2] == float((whole[:, -1:] - whole).sum()) / 4
    assert found[0] > 1.2 * found[1] > 1.2**2 * found[2]


def test_a_bucket_of_one_batch_is_as_without_lengths():
    plain, one, two = uniform(), bucketed(bucket=1), bucketed(bucket=2)
    found = [[rows.next().index.tolist() for _ in range(7)] for rows in (plain, one, two)]
    assert found[0] == found[1] != found[2]


# importance


@pytest.mark.parametrize("batch", [2, 5, 6])
def test_rows_come_as_often_as_q_says(batch):
    rows = importance(batch)
    steps = 7000
    counts = torch.zeros(20)
    for _ in range(steps):
        counts.index_add_(0, rows.next().index, torch.ones(batch))
    q = chances(batch)
    tolerance = 5 * (q / (steps * batch)).sqrt()
    assert ((counts / (steps * batch) - q).abs() < tolerance).all()


@pytest.mark.parametrize("batch", [2, 5, 6])
def test_corrections_are_the_inverse_chances_and_at_most_2(batch):
    rows = importance(batch)
    for _ in range(50):
        found = rows.next()
        assert torch.allclose(found.importance, 1 / (20 * chances(batch)[found.index]), rtol=1e-5)
        assert found.importance.max() <= 2
        assert found.index.shape == found.importance.shape == (batch,)


def test_corrected_sums_are_unbiased():
    rows, value = importance(6), torch.arange(20.0)
    found = []
    for _ in range(7000):
        batch = rows.next()
        found.append((value[batch.index] * batch.importance).mean() * 20)
    estimates = torch.stack(found)
    error = estimates.std() / len(found) ** 0.5
    assert abs(estimates.mean() - value.sum()) < 4 * error
    assert error < 1  # else the bound above says nothing


def test_chances_follow_the_weights_from_block_to_block():
    weights = torch.full((20,), 0.5)
    rows = ImportanceMinibatches(20, 10, generator(), lambda rows: weights[rows], block=2)
    assert torch.allclose(rows.next().importance, torch.ones(10))
    weights[:10] = 0.0
    assert torch.allclose(rows.next().importance, torch.ones(10))  # of the block's start
    found = rows.next()
    low = found.index < 10
    assert low.any() and torch.allclose(found.importance[low], torch.tensor(2.0))
    assert torch.allclose(found.importance[~low], torch.tensor(1 / 1.5))


def test_a_block_is_a_pass_but_50_steps_at_least():
    assert ImportanceMinibatches(20, 10, generator(), WEIGHTS.__getitem__).block == 50
    assert ImportanceMinibatches(1000, 10, generator(), WEIGHTS.__getitem__).block == 100


# resuming


@pytest.mark.parametrize("steps", [0, 1, 3, 6, 7, 8, 20])
@pytest.mark.parametrize("make", [uniform, bucketed, importance, lambda **k: uniform(20, 5, **k)])
def test_restored_rows_go_on_as_if_never_stopped(make, steps):
    def state_of(rows):
        saved = {name: value.clone() for name, value in rows.state_dict().items()}
        return saved, rows.generator.get_state()

    first = make()
    for _ in range(steps):
        first.next()
    saved, noise = state_of(first)
    wanted = [first.next() for _ in range(25)]  # to the end of the block or pass, and on
    other = make(seed=9)
    other.next()
    other.generator.set_state(noise)
    other.load_state_dict(saved)
    assert torch.equal(other.generator.get_state(), noise)
    for expected in wanted:
        found = other.next()
        assert torch.equal(found.index, expected.index)
        if expected.importance is not None:
            assert torch.equal(found.importance, expected.importance)
    assert torch.equal(other.generator.get_state(), first.generator.get_state())


@pytest.mark.parametrize("make", [uniform, bucketed])
def test_state_goes_on_between_other_uses_of_the_generator(make):
    """Data order and noise share one generator: a restored order must not disturb it."""
    first = make()
    for _ in range(2):
        first.next()
        torch.randn(3, generator=first.generator)
    saved, noise = first.state_dict(), first.generator.get_state()
    wanted = [(first.next().index, torch.randn(3, generator=first.generator)) for _ in range(9)]
    other = make(seed=4)
    other.generator.set_state(noise)
    other.load_state_dict(saved)
    for index, noise in wanted:
        assert torch.equal(other.next().index, index)
        assert torch.equal(torch.randn(3, generator=other.generator), noise)


# refused


@pytest.mark.parametrize("batch", [0, -1, 21])
def test_batches_that_do_not_fit_the_set_are_refused(batch):
    with pytest.raises(InputError, match=f"meta_batch must be from 1 .* 20, got {batch}:"):
        check_batch_size(batch, 20, "meta")


def test_importance_needs_two_rows():
    with pytest.raises(InputError, match="train_batch of 2 or more, got 1"):
        importance(1)
