"""`diag align` and `diag connect` on real files, and the map of many checkpoints."""

import json

import networkx
import numpy
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

import diag
from diag.cli import main
from diag.connectivity.connection_map import connect, fork_stability
from diag.connectivity.symmetries import find_symmetries
from diag.errors import CheckpointError, InvalidInput

BUILD = """
import torch
from torch import nn

def build():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] * x[:, 1] > 0).long()
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), nn.CrossEntropyLoss(), (x, y)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three checkpoints of one network: itself, itself with other noise, and a permuted copy."""
    folder = tmp_path_factory.mktemp("connect")
    (folder / "task.py").write_text(BUILD)
    space = {}
    exec(BUILD, space)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, loss, (x, y) = space["build"]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    groups = find_symmetries(model, (x, y))
    near = {n: t + 1e-3 for n, t in state.items()}
    for name, s in {"a": state, "near": near, "moved": groups.apply(groups.random(1), state)}.items():
        torch.save(s, folder / f"{name}.pt")
    return folder


def run(*arguments):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    return result.exit_code, result.output


def test_from_python_as_on_the_command_line(folder, tmp_path):
    build, files = f"{folder / 'task.py'}:build", [folder / f"{n}.pt" for n in ("a", "near", "moved")]
    found = diag.align(files[0], str(files[2]), build=build, points=5)
    assert found.aligned.barrier < 1e-6 < found.line.barrier
    for name, tensor in torch.load(files[0]).items():
        torch.testing.assert_close(found.aligned_state[name], tensor)
    map_ = diag.connect(files, build=build, points=5, options={"max_examples": 50})
    code, text = run(
        "connect", *files, "--build", build, "--points", 5, "--max-examples", 50, "-o", tmp_path / "m.json"
    )
    assert code == 0, text
    assert json.loads((tmp_path / "m.json").read_text()) == map_.to_dict()
    space = {}
    exec(BUILD, space)
    assert diag.connect(files, build=space["build"], points=5).names == ("a.pt", "near.pt", "moved.pt")


def test_files_under_a_key_tell_how_they_were_read(folder, tmp_path):
    state = torch.load(folder / "a.pt")
    torch.save({"ema": {f"module.{n}": t for n, t in state.items()}, "state_dict": state}, tmp_path / "b.pt")
    found = diag.connect(
        [tmp_path / "b.pt", tmp_path / "b.pt"], build=f"{folder / 'task.py'}:build", key="ema", points=3
    )
    assert "prefix 'module.' was taken off" in found.notes[0]
    assert found.names[0] != found.names[1] and found.loss_barriers.max() < 1e-9


def test_files_without_a_build_function_and_what_is_no_file(folder):
    build = f"{folder / 'task.py'}:build"
    snapshot = diag.Snapshot(nn.Linear(4, 2), F.cross_entropy, (torch.ones(4, 4), torch.ones(4).long()))
    with pytest.raises(InvalidInput, match="align was called on the path of checkpoints; give build="):
        diag.align(folder / "a.pt", folder / "near.pt")
    with pytest.raises(InvalidInput, match="connect was called on paths of checkpoints; give build="):
        diag.connect([folder / "a.pt", folder / "near.pt"])
    with pytest.raises(InvalidInput, match="connect takes key for checkpoints only; give build="):
        diag.connect(snapshot, [snapshot, snapshot], key="ema")
    with pytest.raises(InvalidInput, match="called on a Snapshot and build=; expected the paths"):
        diag.align(snapshot, folder / "a.pt", build=build)
    with pytest.raises(InvalidInput, match="was given states and build="):
        diag.connect([folder / "a.pt"] * 2, [snapshot], build=build)
    with pytest.raises(InvalidInput, match="There are 1 networks"):
        diag.connect(folder / "a.pt", build=build)
    with pytest.raises(InvalidInput, match="There are 0 networks"):
        diag.connect([], build=build)
    for source in (5, [5, 6]):
        with pytest.raises(InvalidInput, match="connect was called on an int and build="):
            diag.connect(source, build=build)
    with pytest.raises(InvalidInput, match="connect was called without states"):
        diag.connect(snapshot)


def test_align_writes_the_second_checkpoint_in_the_first_ones_order(folder):
    build = f"{folder / 'task.py'}:build"
    code, text = run("align", folder / "a.pt", folder / "moved.pt", "--build", build, "-o", folder / "out.pt")
    assert code == 0, text
    assert "and 0 after" in text and "of the second one's units moved, which changed its outputs by a" in text
    first, out = (torch.load(folder / n, weights_only=True) for n in ("a.pt", "out.pt"))
    assert all(torch.equal(t, out[n]) for n, t in first.items())
    code, text = run(
        "align", folder / "a.pt", folder / "moved.pt", "--build", build, "-o", folder / "o.safetensors"
    )
    assert code == 0 and (folder / "o.safetensors").is_file()


def test_connect_finds_the_groups_the_tree_and_draws_the_map(folder):
    build, names = f"{folder / 'task.py'}:build", ("a.pt", "near.pt", "moved.pt")
    files = [folder / n for n in names]
    code, text = run("connect", *files, "--build", build, "-o", folder / "map.json")
    assert code == 0, text
    assert "The 3 networks form 2 groups of 2, 1" in text and "group 1: a.pt, near.pt" in text
    found = json.loads((folder / "map.json").read_text())
    assert found["components"] == [["a.pt", "near.pt"], ["moved.pt"]] and len(found["spanning_tree"]) == 2
    code, text = run("connect", *files, "--build", build, "--align", "weights", "-o", folder / "map.png")
    assert code == 0 and "form one group" in text and (folder / "map.png").stat().st_size > 1000


def test_mistakes_are_one_sentence(folder):
    build = f"{folder / 'task.py'}:build"
    torch.save({"0.weight": torch.zeros(3, 4)}, folder / "other.pt")
    code, text = run("align", folder / "a.pt", folder / "other.pt", "--build", build)
    assert code == 2 and "other.pt" in text and "Traceback" not in text
    code, text = run("connect", folder / "a.pt", "--build", build)
    assert code == 2 and "There is 1 checkpoint; give at least two." in text
    code, text = run("align", folder / "a.pt", folder / "near.pt", "--build", build, "-o", "x.zip")
    assert code == 2 and "expected .pt or .safetensors" in text
    code, text = run("connect", folder / "a.pt", folder / "near.pt", "--build", build, "-o", "x.txt")
    assert code == 2 and "expected .png, .svg, .pdf or .json" in text


def test_the_matrix_is_that_of_the_instrument_and_the_tree_is_minimal():
    models = []
    for seed in range(4):
        model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
        for i, p in enumerate(model.parameters()):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * seed + i), dtype=p.dtype)
        models.append(model)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    data = (x, (x[:, 0] > 0).long())
    snapshot = diag.Snapshot(models[0], F.cross_entropy, data)
    found = connect(snapshot, {f"m{i}": m.state_dict() for i, m in enumerate(models)}, points=5)
    for i in range(4):
        for j in range(4):
            pair = diag.Snapshot(models[i], F.cross_entropy, data, other=models[j])
            result = diag.mode_connectivity(pair, points=5, refine=0)
            assert found.loss_barriers[i, j] == pytest.approx(result.barrier, abs=1e-12)
            assert found.error_barriers[i, j] == pytest.approx(result.error_barrier, abs=1e-12)
    assert numpy.array_equal(found.barriers, found.barriers.T)
    full = networkx.from_numpy_array(found.barriers + 1e-9)  # zero weights are no edges in networkx
    least = sum(w - 1e-9 for *_, w in networkx.minimum_spanning_tree(full).edges(data="weight"))
    assert sum(b for *_, b in found.spanning_tree.edges(data="barrier")) == pytest.approx(least, abs=1e-9)
    with pytest.raises(InvalidInput, match="There are 1 networks; expected at least 2"):
        connect(snapshot, {"a": models[0].state_dict()})
    with pytest.raises(InvalidInput, match=r"^b: The two checkpoints do not fit: '0.weight'"):
        connect(snapshot, {"a": models[0].state_dict(), "b": nn.Linear(3, 2).state_dict()})


def test_forks_that_stay_connected_from_a_step_on(folder):
    """Forks that differ by a permutation are apart; forks that differ by a little noise are connected."""
    space = {}
    exec(BUILD, space)
    model, loss, data = space["build"]()
    a, near, moved = (torch.load(folder / f"{n}.pt", weights_only=True) for n in ("a", "near", "moved"))
    snapshot = diag.Snapshot(model, loss, data, held_out=data)
    found = fork_stability(snapshot, {200: (a, near), 0: (a, moved), 100: (near, a)}, points=11)
    assert found.steps == (0, 100, 200) and found.stable_from == 100
    assert found.instabilities[0] > 0.1 > 0.02 > max(found.instabilities[1:])
    assert found.ridges == (None, None, None) and max(found.loss_barriers[1:]) < found.loss_barriers[0]
    with pytest.raises(InvalidInput, match="the fork at step 3: The two checkpoints do not fit"):
        fork_stability(snapshot, {3: (a, {})})
    with pytest.raises(InvalidInput, match="The fork at step 3 has 1 states; expected two ends"):
        fork_stability(snapshot, {3: (a,)})
    with pytest.raises(InvalidInput, match="There are no forks; expected at least one step"):
        fork_stability(snapshot, {})
    model.load_state_dict(a)
    other = diag.Snapshot(model, loss, data, held_out=data, other=moved)
    assert diag.mode_connectivity(other, refine=0).held_out_error_instability == pytest.approx(
        found.instabilities[0]
    )


def test_align_connect_and_forks_take_what_the_command_line_takes(folder):
    """Paths of checkpoints give what their state dicts give, and one sentence where they do not fit."""
    space = {}
    exec(BUILD, space)
    model, loss, data = space["build"]()
    paths = [folder / f"{n}.pt" for n in ("a", "near", "moved")]
    states = [torch.load(path, weights_only=True) for path in paths]
    model.load_state_dict(states[0])
    snapshot = diag.Snapshot(model, loss, data)
    of_paths, of_states = diag.connect(snapshot, paths, points=5), diag.connect(snapshot, states, points=5)
    assert of_paths.names == tuple(map(str, paths)) and of_states.names == ("network 1", "network 2", "network 3")
    assert numpy.array_equal(of_paths.barriers, of_states.barriers)
    assert repr(of_paths) == f"<ConnectionMap: {of_paths.sentence()}>"
    found = diag.align(snapshot, paths[2])
    assert found.aligned.barrier == diag.align(snapshot, states[2]).aligned.barrier
    assert repr(found) == f"<Connection: {found.sentence()}>"
    assert diag.fork_stability(snapshot, {0: tuple(paths[:2])}, points=5).steps == (0,)
    torch.save(nn.Linear(3, 2).state_dict(), folder / "other.pt")
    with pytest.raises(CheckpointError, match=r"other.pt: "):
        diag.connect(snapshot, [paths[0], folder / "other.pt"])


def test_a_ridge_is_a_line_above_the_network_that_was_forked():
    """A loss of one weight, w^2 (w - 2)^2: forks on one side of the hill at w = 1, and on both sides of it."""
    model = nn.Linear(1, 1, bias=False).double()
    x = torch.ones(4, 1, dtype=torch.float64)
    snapshot = diag.Snapshot(model, lambda z, _: (z.square() * (z - 2).square()).mean(), (x, x))
    at = lambda w: {"weight": torch.tensor([[w]], dtype=torch.float64)}  # noqa: E731
    found = fork_stability(snapshot, {1: (at(0.0), at(2.0), at(0.9)), 5: (at(1.7), at(2.1), at(1.5))}, points=11)
    assert found.ridges == (True, False)
    assert found.peaks[0] == pytest.approx(1.0) and found.fork_losses[0] == pytest.approx((0.9 * 1.1) ** 2)
    assert found.loss_barriers[0] == pytest.approx(1.0) and found.angles == pytest.approx((180, 0), abs=1e-5)
    assert found.fork_losses[1] == pytest.approx((1.5 * 0.5) ** 2)
