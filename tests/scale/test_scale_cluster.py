"""A pass over the processes of a cluster: bundles are those of threads to the byte, whoever computes and whoever dies."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from scale_zoos import contents, planted, rewrite, saved

import eigenzoo as ez
from builders import edit_model, random_factors, write_adapter, write_stacks
from eigenzoo.cli.app import main
from eigenzoo.errors import DataError, FormatError, UsageError
from eigenzoo.formats.bundle.folder import open_basis
from eigenzoo.integrations import cluster as cluster_module
from eigenzoo.integrations.cluster import cluster_workers, run_on_own_gpu, run_task
from eigenzoo.passes.resources import LEAST_MEMORY
from eigenzoo.passes.workers import local_workers
from eigenzoo.subspace.bases.flat import FlatBasis
from eigenzoo.subspace.bases.stacked import StackedBasis
from eigenzoo.subspace.bases.tucker import TuckerBasis
from eigenzoo.subspace.fitting.fit_layers import StoredLayer
from eigenzoo.zoo.zoo import reopen
from guard import wait_until

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("dask")

NUM_MODELS = 8
LARGE = (300, 500)
"""More values, over all models, than are read in float64."""


def started(**options: Any) -> Any:
    """A cluster whose web server takes a free port."""
    return distributed.LocalCluster(
        **options, dashboard_address=None, scheduler_kwargs={"dashboard_address": "127.0.0.1:0"}
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three processes for all tests of this file."""
    # Whoever asks a worker that has died waits for this long.
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "5s"}),
        started(n_workers=3, threads_per_worker=1, processes=True) as opened,
    ):
        yield opened


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ez.Zoo]:
    """One zoo of each view."""
    root = tmp_path_factory.mktemp("zoos")
    shapes = {"large": LARGE, **{f"layer.{n}": (12, 10) for n in range(6)}}
    stacks = {name: planted(NUM_MODELS, shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    write_stacks(root / "dense", stacks)
    write_stacks(root / "base", {name: stack[:1] / 2 for name, stack in stacks.items()})
    for n in range(NUM_MODELS):
        write_adapter(root / "adapters" / f"m{n}", random_factors(dict.fromkeys(shapes, (12, 10)), 2, n), lora_alpha=3)
    return {
        "weight": ez.open_zoo(root / "dense"),
        "delta": ez.open_zoo(root / "dense", base=root / "base" / "m0"),
        "update": ez.open_zoo(root / "adapters"),
        "factors": ez.open_zoo(root / "adapters", view="factors"),
    }


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "weight": ("weight", {"rank": 3}),
    "weight-columns": ("weight", {"rank": 3, "center": "columns", "dtype": "bfloat16"}),
    "weight-axes": ("weight", {"rank": {"models": 3, "outputs": 4, "inputs": 4}, "exclude": ["large"]}),
    "weight-sketch": ("weight", {"rank": {"outputs": 2}, "solver": "sketch"}),
    "weight-budget": ("weight", {"max_error": 0.1}),
    "delta": ("delta", {"rank": 3}),
    "update": ("update", {"rank": 3}),
    "factors": ("factors", {"rank": 3, "precision": "fast"}),
}


@pytest.mark.parametrize("case", CASES)
def test_bundles_are_those_of_threads_to_the_byte(
    tmp_path: Path, cluster: Any, zoos: dict[str, ez.Zoo], case: str
) -> None:
    view, options = CASES[case]
    here = saved(ez.fit(zoos[view], **options, cache=False), tmp_path / "here")
    with cluster_workers(cluster) as workers:
        assert workers.num == 3
        there = saved(ez.fit(zoos[view], **options, cache=False, workers=workers), tmp_path / "there")
    assert there == here


def test_layers_in_blocks_are_those_of_threads_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any, zoos: dict[str, ez.Zoo]
) -> None:
    """Memory decides on the blocks of a worker; this much is less than the large layer."""
    monkeypatch.setattr("eigenzoo.passes.resources.LEAST_MEMORY", 0)
    memory = 4 * NUM_MODELS * LARGE[0] * LARGE[1]
    with local_workers(memory, num=1) as workers:
        here = saved(ez.fit(zoos["weight"], 3, cache=False, workers=workers), tmp_path / "here")
    with cluster_workers(cluster, max_memory=memory) as workers:
        assert workers.resources.layer_bytes < zoos["weight"].stack("large").num_bytes
        there = saved(ez.fit(zoos["weight"], 3, cache=False, workers=workers), tmp_path / "there")
    assert there == here


@pytest.mark.slow
def test_evidence_and_plan_say_the_same(cluster: Any, zoos: dict[str, ez.Zoo]) -> None:
    with cluster_workers(cluster) as workers:
        for view in ("weight", "update"):
            options: dict[str, Any] = {"axes": ["inputs"], "cache": False} if view == "weight" else {"cache": False}
            here, there = (ez.evidence(zoos[view], workers=each, **options).to_dict() for each in (None, workers))
            assert {**there, "seconds": 0} == {**here, "seconds": 0}
            assert ez.plan(zoos[view], workers=workers) == ez.plan(zoos[view])


def _process_ids(client: Any) -> list[int]:
    """Of the workers that answer: one that has just died is asked too."""
    return [found for found in client.run(os.getpid, on_error="return").values() if isinstance(found, int)]


@pytest.mark.parametrize("case", ["weight", "update"])
@pytest.mark.slow
def test_a_worker_that_dies_changes_nothing(tmp_path: Path, cluster: Any, zoos: dict[str, ez.Zoo], case: str) -> None:
    here = saved(ez.fit(zoos[case], 3, cache=False), tmp_path / "here")
    killed = []

    def kill(stage: str, done: int, total: int) -> None:
        if not killed:
            killed.append(min(client.run(os.getpid).values()))
            os.kill(killed[0], signal.SIGKILL)

    with distributed.Client(cluster, set_as_default=False) as client:
        with cluster_workers(client) as workers:
            there = saved(ez.fit(zoos[case], 3, cache=False, workers=workers, progress=kill), tmp_path / "there")

        # What was there before is left open: the dead worker is replaced, once the scheduler has noticed.
        def replaced() -> bool:
            alive = _process_ids(client)
            return len(alive) == 3 and killed[0] not in alive

        wait_until(replaced)
    assert there == here


def test_errors_of_workers_arrive_as_they_are(tmp_path: Path, cluster: Any, zoos: dict[str, ez.Zoo]) -> None:
    shutil.copytree(zoos["weight"].models[0].path.parent, tmp_path / "zoo")
    edit_model(tmp_path / "zoo" / "m5", layer__4=torch.full((12, 10), float("nan")))
    zoo = ez.open_zoo(tmp_path / "zoo")
    with cluster_workers(cluster) as workers:
        with pytest.raises(DataError, match=r"^layer 'layer\.4' of m5: 120 values are NaN or Inf.*Leave the model out"):
            ez.fit(zoo, 3, workers=workers)
        # What was waiting is cancelled, and the cluster goes on.
        ez.fit(zoos["update"], 3, workers=workers)


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    paths = write_stacks(tmp_path, {"w": planted(4, (6, 5))})
    zoo = ez.open_zoo(paths)
    (paths[2] / "model.safetensors").unlink()
    for call in (ez.fit, ez.evidence, ez.plan):
        with pytest.raises(FormatError, match=r"m2/model\.safetensors: cannot be read any more \(No such file"):
            call(zoo)


def test_workers_open_files_anew_that_have_changed(tmp_path: Path, cluster: Any, zoos: dict[str, ez.Zoo]) -> None:
    """A process opens a zoo once for all its tasks; the same paths may be another zoo an hour later."""
    shutil.copytree(zoos["weight"].models[0].path.parent, tmp_path / "zoo")
    with cluster_workers(cluster) as workers:
        for _ in range(2):
            there = ez.fit(tmp_path / "zoo", 3, workers=workers, cache=False).moments("layer.0").gram_NN
            assert torch.equal(there, ez.fit(tmp_path / "zoo", 3, cache=False).moments("layer.0").gram_NN)
            edit_model(tmp_path / "zoo" / "m1", layer__0=torch.zeros(12, 10))
            rewrite(tmp_path / "zoo" / "m2" / "model.safetensors")


@pytest.mark.slow
def test_a_cluster_of_one_starts_and_stops(tmp_path: Path, zoos: dict[str, ez.Zoo]) -> None:
    with cluster_workers("local", num_workers=1) as workers:
        assert workers.num == 1
        there = saved(ez.fit(zoos["weight"], 3, cache=False, workers=workers), tmp_path / "there")
        process = workers._executor.submit(os.getpid).result()
    assert process != os.getpid()
    with pytest.raises(ProcessLookupError, match="No such process"):
        os.kill(process, 0)
    assert there == saved(ez.fit(zoos["weight"], 3, cache=False), tmp_path / "here")


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["eigenzoo", *map(str, words)])
    with pytest.raises(SystemExit, match=r"^\d$") as left:
        main()
    return int(left.value.code)  # type: ignore[arg-type]


@pytest.mark.slow
def test_commands_run_on_a_cluster(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cluster: Any,
    zoos: dict[str, ez.Zoo],
) -> None:
    root = zoos["weight"].models[0].path.parent
    address = cluster.scheduler_address
    said = []
    for words in (["--cluster", address], []):
        output = tmp_path / f"bundle-{len(said)}"
        assert run(monkeypatch, "fit", root, "-o", output, "--rank", 3, "--quiet", "--no-cache", *words) == 0
        capsys.readouterr()
        for command in ("plan", "evidence"):
            options = [] if command == "plan" else ["--no-cache"]
            assert run(monkeypatch, command, root, "--json", *options, *words) == 0
        said.append(capsys.readouterr().out.replace('"seconds"', "\n").splitlines())
    assert contents(tmp_path / "bundle-0") == contents(tmp_path / "bundle-1")
    assert said[0][0] == said[1][0]


@pytest.mark.slow
def test_the_command_starts_a_cluster_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zoos: dict[str, ez.Zoo]
) -> None:
    monkeypatch.setattr("distributed.deploy.local.CPU_COUNT", 1)
    root = zoos["update"].models[0].path.parent
    words = [
        "fit",
        root,
        "-o",
        tmp_path / "bundle",
        "--rank",
        2,
        "--quiet",
        "--cluster",
        "local",
        "--max-memory",
        "1GB",
    ]
    assert run(monkeypatch, *words) == 0
    assert list(ez.load(tmp_path / "bundle").verify()) == []


def closed_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def test_a_scheduler_that_does_not_answer_is_named_with_the_next_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], zoos: dict[str, ez.Zoo], tmp_path: Path
) -> None:
    monkeypatch.setattr("eigenzoo.integrations.cluster.SECONDS_TO_CONNECT", 0.5)
    address = f"tcp://127.0.0.1:{closed_port()}"
    with (
        pytest.raises(UsageError, match=f"no cluster answers at '{address}'.*Start `dask scheduler`.*--cluster local"),
        cluster_workers(address),
    ):
        pass
    root = zoos["update"].models[0].path.parent
    assert run(monkeypatch, "fit", root, "-o", tmp_path / "bundle", "--cluster", address, "--quiet") == 2
    assert f"UsageError: no cluster answers at '{address}'" in " ".join(capsys.readouterr().err.split())


def test_a_scheduler_without_workers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eigenzoo.integrations.cluster.SECONDS_TO_CONNECT", 0.5)
    with (
        started(n_workers=0, processes=False) as empty,
        pytest.raises(UsageError, match=r"no cluster answers.*at least one worker must be running"),
        cluster_workers(empty),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": "here"}, "cluster 'here'. A cluster is 'local' or an address"),
        ({"device": "mps"}, "device 'mps'. Devices are cpu, cuda"),
        ({"max_memory": LEAST_MEMORY - 1}, "16,777,215 bytes of memory are too few. Blocks need at least"),
    ],
)
def test_clusters_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message), cluster_workers(**options):
        pass


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(UsageError, match=r"dask\.distributed is not installed.*'\.\[cluster\]'"), cluster_workers():
        pass


def same(first: ez.Zoo, other: ez.Zoo) -> None:
    assert (first.names, first.view, first.selection) == (other.names, other.view, other.selection)
    assert (first.layers, first.left_out, first.skipped) == (other.layers, other.left_out, other.skipped)
    assert first.warnings == other.warnings
    for name in first.layers:
        assert first.keys(name) == other.keys(name)
        one, two = first.stack(name), other.stack(name)
        for place in range(len(first)):
            read = "factors" if first.view == "update" else "matrix"
            for values, again in zip(getattr(one, read)(place), getattr(two, read)(place), strict=True):
                assert torch.equal(values, again)


@pytest.mark.parametrize("view", ["weight", "delta", "update", "factors"])
def test_a_zoo_travels_as_paths_and_is_the_same_zoo_elsewhere(zoos: dict[str, ez.Zoo], view: str) -> None:
    zoo = zoos[view]
    for chosen in (zoo, zoo.select(exclude=["layer.2*"], names=["m4", "m1"]), zoo.renamed([f"n{n}" for n in range(8)])):
        data = pickle.dumps(chosen)
        assert len(data) < 4000
        reopen.cache_clear()
        same(pickle.loads(data), chosen)
        assert pickle.loads(data) is pickle.loads(data), "opened once"


def test_a_zoo_with_gaps_and_pickles_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_stacks(tmp_path / "zoo", {"a": planted(3, (4, 3)), "b": planted(3, (4, 3), 1)})
    edit_model(paths[2], b=None)
    (tmp_path / "zoo" / "m9").mkdir()
    (tmp_path / "zoo" / "m9" / "model.safetensors").write_bytes(b"nothing")
    (tmp_path / "zoo" / "p").mkdir()
    torch.save({"a": torch.ones(4, 3), "b": torch.ones(4, 3)}, tmp_path / "zoo" / "p" / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    zoo = ez.open_zoo("zoo", allow_missing=True, allow_pickle=True)
    assert (list(zoo.layers), len(zoo.skipped), len(zoo)) == (["a"], 1, 4)
    data = pickle.dumps(zoo)
    monkeypatch.chdir("/")
    reopen.cache_clear()
    same(pickle.loads(data), zoo)


def test_a_zoo_in_a_store_travels_by_its_urls(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in write_stacks(tmp_path / "zoo", {"w": planted(3, (6, 5))}):
        store.pipe_file(f"/travels/{path.name}/model.safetensors", (path / "model.safetensors").read_bytes())
    zoo = ez.open_zoo("memory://travels")
    data = pickle.dumps(zoo)
    assert b"memory://travels/m1" in data
    reopen.cache_clear()
    same(pickle.loads(data), zoo)
    store.rm("/travels", recursive=True)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)


@pytest.mark.parametrize(
    ("device", "asked", "expected"), [("cuda", None, 2), ("cuda", 1, 1), ("cuda:1", None, 1), ("cpu", 3, 3)]
)
def test_a_local_cluster_has_a_process_for_each_gpu(
    monkeypatch: pytest.MonkeyPatch, two_gpus: None, device: str, asked: int | None, expected: int
) -> None:
    started: list[int | None] = []

    def connect(cluster: object, num_workers: int | None) -> tuple[Any, list[Any]]:
        started.append(num_workers)
        client = SimpleNamespace(nthreads=lambda: {"one": 1}, get_executor=lambda pure: None)
        return client, []

    monkeypatch.setattr(cluster_module, "_connect", connect)
    with cluster_workers(num_workers=asked, device=device) as workers:
        assert workers._run is (run_on_own_gpu if device == "cuda" else run_task)
    assert started == [expected]


def test_more_local_processes_than_gpus_are_refused(two_gpus: None) -> None:
    with (
        pytest.raises(UsageError, match=r"3 local workers are too many for 2 GPUs.*threads of one process share a GPU"),
        cluster_workers(num_workers=3, device="cuda"),
    ):
        pass


def test_a_local_cluster_on_a_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match=r"torch sees no GPU.*--device cpu"), cluster_workers(device="cuda"):
        pass


def test_each_process_of_a_local_cluster_runs_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr("distributed.get_worker", lambda: SimpleNamespace(name=1))
    assert run_on_own_gpu(lambda: [*chosen]) == [1]


@pytest.mark.parametrize(
    "options", [{"device": "mps"}, {"device": "cudanonsense"}, {"device": "cuda:-1"}, {"device": ""}], ids=str
)
def test_nonsense_is_refused_before_a_cluster_is_asked(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="Devices are cpu, cuda"), cluster_workers("tcp://nobody:1", **options):
        pass


def test_the_number_of_a_local_process_is_that_of_its_gpu(cluster: Any) -> None:
    """What `run_on_own_gpu` counts on: dask names the processes of a local cluster 0, 1, …"""
    with cluster_workers(cluster) as workers:
        tasks = [(n, [lambda: distributed.get_worker().name]) for n in range(20)]
        names = {results[0] for _, results in workers.in_order(tasks)}
    assert names <= set(range(len(cluster.workers)))


@pytest.mark.parametrize("axes", [("models",), ("models", "outputs", "inputs")], ids=",".join)
@pytest.mark.parametrize("view", ["weight", "update"])
@pytest.mark.slow
def test_half_precision_is_projected_by_processes_that_do_not_see_the_basis(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cluster: Any,
    zoos: dict[str, ez.Zoo],
    view: str,
    axes: tuple[str, ...],
) -> None:
    """Layer after layer as tasks, in order, and shown; the basis travels with its task."""
    options: dict[str, Any] = {"rank": dict.fromkeys(axes, 3), "dtype": "bfloat16", "cache": False}
    here = saved(ez.fit(zoos[view], **options), tmp_path / "here")
    told = []

    def here_only(self: Any, stack: Any) -> Any:
        raise AssertionError("projected in the process that collects results")

    with cluster_workers(cluster) as workers, monkeypatch.context() as patch:
        for form in (FlatBasis, TuckerBasis, StackedBasis):
            patch.setattr(form, "project_all", here_only)
        space = ez.fit(zoos[view], **options, workers=workers, progress=lambda *step: told.append(step))
    there = saved(space, tmp_path / "there")
    assert there == here
    steps = [step for step in told if step[0] == "projecting on stored bases"]
    # Stacked factors keep the dtype of their files.
    number = 0 if (view, axes) == ("update", ("models",)) else len(zoos[view].layers)
    assert steps == [("projecting on stored bases", done + 1, number) for done in range(number)]


def test_a_stored_layer_takes_its_own_tensors_with_it(tmp_path: Path, zoos: dict[str, ez.Zoo]) -> None:
    space = ez.fit(zoos["weight"], {"models": 2, "outputs": 3}, cache=False)
    files = open_basis(space.path)
    reader = pickle.loads(pickle.dumps(StoredLayer(files, "layer.1")))
    assert set(reader.tensors) == {f"layer.1/{part}" for part in ("mean", "outputs", "models")}
    for name in reader.tensors:
        assert torch.equal(reader.read(name), files.read(name))
        assert torch.equal(reader.read_flat(name, 3, 11), files.read_flat(name, 3, 11))
        room = torch.empty(8, dtype=torch.float64)
        assert reader.read_flat(name, 3, 11, out=room) is room
        assert torch.equal(room, files.read_flat(name, 3, 11).double())
