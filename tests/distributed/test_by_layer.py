"""Curvature of models under fully_shard where the weights of one layer at a time are gathered: the numbers of one
process, and no rank with all of the weights."""

import sys
from pathlib import Path

import pytest
import torch

import diag
from diag.curvature.by_layer import DRAWN_AT_ONCE
from tests.distributed.starting import start

sys.path.insert(0, str(Path(__file__).parent))
import by_layer


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    script = Path(__file__).with_name("by_layer.py")
    return [found["by_layer"] for found in start(2, tmp_path_factory.mktemp("layers"), ["by_layer"], script)]


@pytest.mark.parametrize("kind", by_layer.KINDS)
def test_the_numbers_are_those_of_one_process(ranks, kind):
    """float64 sums in another order; the trace's probes and the start vector are drawn alike. Rank 0 has five
    batches, rank 1 three."""
    first, last = ranks[0][kind], ranks[1][kind]
    assert first.pop("untouched") and last.pop("untouched") and first.keys() == last.keys()
    model = by_layer.trainings.networks()[kind]
    alone = by_layer.numbers(diag.Snapshot(model, by_layer.KINDS[kind], by_layer.whole_data(kind)))
    for found in (first, last):
        for name, value in found.items():
            assert value == pytest.approx(alone[name], rel=1e-8, abs=1e-12), name


def test_a_product_holds_the_weights_of_some_layers_at_a_time(ranks):
    """Of nine layers: at most two whole ones in each of the two messages and their copies, and the shards of
    leaves, vector and product. Nothing is left behind."""
    sizes = []
    for found in ranks:
        peak, largest, left, parameters, part = found["memory"]
        layer = 4 * (128 * 128 + 128)
        assert largest <= max(2 * layer, 4 * part)  # a message of two ranks' parts; a vector's part
        assert peak <= 8 * layer + 6 * 4 * part
        assert left == 0
        sizes.append(part)
        assert part * 4 <= 1.1 * parameters / 2
    assert sum(sizes) * 4 == parameters


def test_parts_of_random_vectors_are_drawn_in_blocks(ranks):
    for found in ranks:
        size, *right = found["drawn"]
        assert size > DRAWN_AT_ONCE and right == [True] * 4


@pytest.mark.parametrize("kind", by_layer.DIFFERENCED)
def test_finite_differences_of_shards_stand_in(ranks, kind):
    torch.manual_seed(2)
    method, values = by_layer.differenced(kind, by_layer.DIFFERENCED[kind]().double())
    for found in ranks:
        assert found[f"differenced {kind}"][0] == method == "finite difference"
        assert found[f"differenced {kind}"][1] == pytest.approx(values, rel=1e-4)


def test_each_rank_loads_its_own_parts(ranks):
    for found in ranks:
        for kind, (equal, whole) in found["loaded"].items():
            assert equal and not whole, kind


def test_no_rank_waits_for_one_that_cannot_read_its_part(ranks):
    (first, records), (last, others) = (found["unreadable"] for found in ranks)
    assert first == "Rank 1 could not compute its share; its own message says why."
    assert last == "0.weight cannot be read." and (records, others) == (1, 0)


def test_all_ranks_stop_together_and_can_go_on(ranks):
    first, last = (found["refused"] for found in ranks)
    assert first["branches"].startswith("The ranks take different paths through the network")
    assert first["branches"] == last["branches"]
    assert first["one rank"].startswith("Rank 1 could not compute its share")
    assert "loss_fn cannot be called" in last["one rank"]
    assert first["few"].startswith("A rank can cut its data into 1 batches and another has 3")
    assert first["few"] == last["few"]
    assert (
        first["columns"].startswith("2.weight has placement (Shard(dim=1),)") and "whole copy" in first["columns"]
    )
    assert "expected True, False or 'by_layer'" in first["word"]
    assert "params is not measured where the weights of one layer" in first["params"]
    assert "Row 1 of weight is held fixed, which lies whole on each rank" in first["whole row"] == last["whole row"]
    assert first["too large"].startswith("The parameters are sharded over ranks (0.weight has placement")
    assert "give more memory, or fewer ranks on a machine" in first["too large"] == last["too large"]
    for found in (first, last):
        assert found["copied"] == "a model whose layers are gathered from other processes is not copied"
        assert found["chosen by itself"] and found["after"]
