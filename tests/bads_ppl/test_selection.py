"""What a `Selection` says about draws, and what users do with it."""

import os

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bads_ppl import selection as module
from bads_ppl.errors import InputError
from bads_ppl.selection import Selection, ranks

IDS = np.array([10, 20, 30, 40, 50])


def make_draws(chains=3, draws=(7, 5, 9), size=5, seed=0):
    random = np.random.default_rng(seed)
    return [random.random((draws[c], size), dtype=np.float32) for c in range(chains)]


def make_selection(**settings):
    columns = {"group": np.array(["rare", "rare", "often", "often", "often"], dtype=object)}
    return Selection.from_draws(IDS, make_draws(), columns=columns, **settings)


class TestFromDraws:
    def test_summaries_are_those_of_the_pooled_draws(self):
        pooled = np.concatenate(make_draws()).astype(float)
        selection = make_selection()
        np.testing.assert_allclose(selection.mean, pooled.mean(axis=0))
        np.testing.assert_allclose(selection.sd, pooled.std(axis=0, ddof=1))
        shares = (pooled > 0.5).mean(axis=0)
        np.testing.assert_array_equal(selection.probability, shares.astype(np.float32))
        assert (selection.chains, selection.draws) == (3, 21)
        assert selection.evidence == "calibrated"

    def test_rank_interval_holds_the_ranks_of_its_share_of_draws(self):
        pooled = np.concatenate(make_draws(1, (200,)))
        rank = (-pooled).argsort(axis=1).argsort(axis=1) + 1
        for interval in (0.5, 0.9):
            selection = Selection.from_draws(IDS, [pooled], interval=interval)
            inside = (selection.rank_low <= rank) & (rank <= selection.rank_high)
            assert (inside.mean(axis=0) >= interval).all()
            tail = (1 - interval) / 2
            low = np.quantile(rank, tail, axis=0, method="lower")
            high = np.quantile(rank, 1 - tail, axis=0, method="higher")
            np.testing.assert_array_equal(selection.rank_low, low)
            np.testing.assert_array_equal(selection.rank_high, high)

    def test_rank_one_is_the_highest_weight(self):
        draws = [np.array([[0.1, 0.9, 0.5]] * 4, dtype=np.float32)]
        selection = Selection.from_draws([0, 1, 2], draws)
        assert selection.rank_low.tolist() == selection.rank_high.tolist() == [3, 1, 2]

    def test_fixed_weights_have_sd_zero_and_ties_share_their_ranks(self):
        fixed = np.array([0.0, 1.0, 1.0, 0.3, 0.0], dtype=np.float32)
        selection = Selection.from_draws(IDS, [fixed[None]], evidence="fixed")
        np.testing.assert_array_equal(selection.mean, fixed)
        assert (selection.sd == 0).all()
        assert selection.probability.tolist() == [0, 1, 1, 0, 0]
        assert selection.rank_low.tolist() == [4, 1, 1, 3, 4]
        assert selection.rank_high.tolist() == [5, 2, 2, 3, 5]

    def test_pieces_and_the_temporary_file_give_what_memory_gives(self, tmp_path, monkeypatch):
        random = np.random.default_rng(1)
        whole = random.random((60, 37), dtype=np.float32).round(1)  # rounded: with ties
        whole.tofile(tmp_path / "w.f32")
        mapped = np.memmap(tmp_path / "w.f32", dtype="<f4", mode="r", shape=whole.shape)
        expected = Selection.from_draws(np.arange(37), [whole[:20], whole[20:]])
        monkeypatch.setattr(module, "_IN_MEMORY", 1000)
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        got = Selection.from_draws(np.arange(37), [mapped[:20], mapped[20:]], scratch=scratch)
        pd.testing.assert_frame_equal(got.to_frame(), expected.to_frame())
        assert os.listdir(scratch) == []

    def test_scratch_folder_that_is_missing_names_the_space_needed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "_IN_MEMORY", 1)
        with pytest.raises(OSError, match=r"temporary space.*scratch="):
            make_selection(scratch=tmp_path / "absent")

    @pytest.mark.parametrize(
        ("draws", "message"),
        [
            ([], "at least one draw, got \\[\\]"),
            ([np.ones((3, 5)), np.ones((0, 5))], "at least one draw, got \\[3, 0\\]"),
            ([np.ones((3, 5)), np.ones((3, 4))], "got \\[5, 4\\] weights per draw for 5 ids"),
            ([np.ones(5)], "must be \\(draws, points\\)"),
        ],
    )
    def test_draws_of_the_wrong_form_are_refused(self, draws, message):
        with pytest.raises(InputError, match=message):
            Selection.from_draws(IDS, draws)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_non_finite_draw_is_refused_with_its_place(self, value, monkeypatch):
        monkeypatch.setattr(module, "_IN_MEMORY", 80)  # two rows in a piece
        draws = make_draws()
        draws[1][3, 2] = value
        with pytest.raises(InputError, match=r"for id 30 in draw 3 of chain 1.*smaller steps"):
            Selection.from_draws(IDS, draws)

    def test_repeated_ids_and_taken_column_names_are_refused(self):
        with pytest.raises(InputError, match=r"unique, got repeated ids \[10\]"):
            Selection.from_draws([10, 10, 1, 2, 3], make_draws())
        with pytest.raises(InputError, match="got 'mean'"):
            Selection.from_draws(IDS, make_draws(), columns={"mean": np.ones(5)})
        with pytest.raises(InputError, match=r"shape \(4,\) for ids of shape \(5,\)"):
            Selection.from_draws(IDS, make_draws(), columns={"label": np.ones(4)})

    def test_interval_outside_of_zero_to_one_is_refused(self):
        with pytest.raises(InputError, match=r"in \(0, 1\), got 90"):
            make_selection(interval=90)


def test_ranks_of_ties_are_the_range_they_share():
    low, high = ranks(np.array([0.5, 0.9, 0.5, 0.1]))
    assert low.tolist() == [2, 1, 2, 4]
    assert high.tolist() == [3, 1, 3, 4]


class TestLooking:
    def test_integer_gives_a_named_row(self):
        selection = make_selection()
        point = selection[-1]
        assert point.id == 50 and point.columns == {"group": "often"}
        assert point.mean == selection.mean[4] and point.rank_high == selection.rank_high[4]
        assert [p.id for p in selection] == IDS.tolist()
        with pytest.raises(IndexError, match=r"below 5.*got 5"):
            selection[5]

    @pytest.mark.parametrize(
        "key", [slice(1, 4), np.array([0, 1, 1, 1, 0], bool), [1, 2, 3], np.array([1, 2, 3])]
    )
    def test_slice_mask_and_integers_give_selections(self, key):
        selection = make_selection()[key]
        assert selection.ids.tolist() == [20, 30, 40]
        assert selection.columns["group"].tolist() == ["rare", "often", "often"]
        assert selection.positions.tolist() == [1, 2, 3]
        assert (len(selection), selection.size, selection.draws) == (3, 5, 21)

    def test_empty_selection_is_a_selection(self):
        empty = make_selection()[[]]
        assert len(empty) == 0 and len(empty.to_frame()) == 0
        assert repr(empty).startswith("Selection of 0 points of 5")

    def test_mask_of_another_length_names_both(self):
        with pytest.raises(InputError, match="got 3 for 5 points"):
            make_selection()[np.array([True, False, True])]
        with pytest.raises(InputError, match="float64"):
            make_selection()[np.array([0.5])]

    def test_top_bottom_and_sorted_go_by_the_mean(self):
        selection = make_selection()
        order = np.argsort(-selection.mean)
        assert selection.sorted().ids.tolist() == IDS[order].tolist()
        assert selection.top(2).ids.tolist() == IDS[order[:2]].tolist()
        assert selection.bottom(2).ids.tolist() == IDS[order[::-1][:2]].tolist()

    @pytest.mark.parametrize("method", ["top", "bottom"])
    @pytest.mark.parametrize("k", [0, 6])
    def test_k_outside_of_the_selection_names_both(self, method, k):
        with pytest.raises(InputError, match=f"(from 1 to 5|at least 1).*got {k}"):
            getattr(make_selection(), method)(k)

    def test_arrays_cannot_be_changed_and_do_not_follow_the_source(self):
        ids = IDS.copy()
        selection = Selection.from_draws(ids, make_draws())
        ids[0] = 99
        assert selection.ids[0] == 10
        with pytest.raises(ValueError, match="read-only"):
            selection.mean[0] = 1
        with pytest.raises(AttributeError):
            selection.mean = np.ones(5)

    def test_repr_sums_up_and_shows_the_highest(self):
        text = repr(make_selection())
        assert text.startswith("Selection of 5 points; total weight")
        assert "3 chains, 21 draws, calibrated" in text
        assert "rank (90 %)" in text and "rare" in text
        assert "1 to 5" in text


class TestTaking:
    def test_frame_is_keyed_by_id(self):
        frame = make_selection().to_frame()
        assert frame.index.name == "id" and frame.index.tolist() == IDS.tolist()
        assert frame.columns.tolist() == [
            "mean",
            "sd",
            "probability",
            "rank_low",
            "rank_high",
            "group",
        ]

    def test_parquet_gives_back_the_same_selection(self, tmp_path):
        path = tmp_path / "weights.parquet"
        selection = make_selection(evidence="approximate", interval=0.8).top(3)
        selection.to_parquet(path)
        back = Selection.from_parquet(path)
        pd.testing.assert_frame_equal(back.to_frame(), selection.to_frame())
        for name in ("chains", "draws", "interval", "evidence", "size"):
            assert getattr(back, name) == getattr(selection, name)
        np.testing.assert_array_equal(back.positions, selection.positions)
        assert pd.read_parquet(path).loc[selection.ids[0], "group"] == selection[0].columns["group"]
        assert os.listdir(tmp_path) == ["weights.parquet"]

    def test_csv_reads_back_in_pandas(self, tmp_path):
        make_selection().to_csv(tmp_path / "w.csv")
        frame = pd.read_csv(tmp_path / "w.csv", index_col="id")
        np.testing.assert_allclose(frame["mean"], make_selection().mean)

    def test_missing_damaged_and_foreign_files_are_refused(self, tmp_path):
        with pytest.raises(InputError, match="absent"):
            Selection.from_parquet(tmp_path / "absent.parquet")
        good = tmp_path / "good.parquet"
        make_selection().to_parquet(good)
        damaged = tmp_path / "damaged.parquet"
        damaged.write_bytes(good.read_bytes()[:-20])
        with pytest.raises(InputError, match=r"damaged\.parquet cannot be read"):
            Selection.from_parquet(damaged)
        pd.DataFrame({"id": [1]}).to_parquet(tmp_path / "foreign.parquet")
        with pytest.raises(InputError, match="holds no selection"):
            Selection.from_parquet(tmp_path / "foreign.parquet")

    def test_sampler_feeds_a_data_loader_in_proportion_to_the_weights(self):
        data = TensorDataset(torch.arange(4.0).unsqueeze(1))
        weights = np.array([[0.0, 0.6, 0.0, 0.2]])
        selection = Selection.from_draws([7, 8, 9, 6], [weights])
        sampler = selection.sampler(4000, torch.Generator().manual_seed(0))
        loader = DataLoader(data, batch_size=100, sampler=sampler)
        seen = torch.cat([x for (x,) in loader]).flatten()
        assert len(seen) == 4000 and set(seen.tolist()) == {1.0, 3.0}
        assert float((seen == 1).float().mean()) == pytest.approx(0.75, abs=0.03)

    def test_sampler_of_sorted_or_top_points_yields_positions_in_the_train_set(self):
        weights = np.array([[0.1, 0.9, 0.0, 0.8]])
        selection = Selection.from_draws([7, 8, 9, 6], [weights])
        torch.testing.assert_close(
            selection.sorted().sampler().weights, torch.tensor([0.1, 0.9, 0.0, 0.8]).double()
        )
        sampler = selection.top(2).sampler(generator=torch.Generator().manual_seed(0))
        assert len(sampler) == 2 and set(sampler) <= {1, 3}

    def test_sampler_without_positive_weights_is_refused(self):
        selection = Selection.from_draws(IDS, [np.zeros((1, 5))])
        with pytest.raises(InputError, match="0 positive ones"):
            selection.sampler()
        with pytest.raises(InputError, match="at least 1, got 0"):
            make_selection().sampler(0)


class HuggingFaceLike:
    """The part of `datasets.Dataset` that is used."""

    def __init__(self, columns):
        self.columns = columns
        self.column_names = list(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def add_column(self, name, column):
        return HuggingFaceLike({**self.columns, name: column})


class TestAddTo:
    def test_dataset_gets_means_and_sds_in_the_order_of_the_train_set(self):
        selection = make_selection()
        before = HuggingFaceLike({"text": list("abcde")})
        after = selection.sorted().add_to(before)
        assert before.column_names == ["text"]
        np.testing.assert_array_equal(after.columns["weight"], selection.mean)
        np.testing.assert_array_equal(after.columns["weight_sd"], selection.sd)

    def test_real_dataset_takes_the_columns(self):
        datasets = pytest.importorskip("datasets")
        selection = make_selection()
        after = selection.add_to(datasets.Dataset.from_dict({"text": list("abcde")}), "w")
        assert after["w_sd"][:] == pytest.approx(selection.sd.tolist())

    def test_sizes_that_differ_are_named(self):
        with pytest.raises(InputError, match=r"train set of 5 points.*got 4 rows"):
            make_selection().add_to(HuggingFaceLike({"text": list("abcd")}))
        with pytest.raises(InputError, match="got 5 rows and a selection of 2"):
            make_selection().top(2).add_to(HuggingFaceLike({"text": list("abcde")}))

    def test_column_that_is_there_already_is_kept(self):
        with pytest.raises(InputError, match="already has a column 'weight'"):
            make_selection().add_to(HuggingFaceLike({"weight": list("abcde")}))
