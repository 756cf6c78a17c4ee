"""Run a pass on the processes of a dask cluster. Tasks are the same as on threads, and results have the same bits.

Every worker opens the zoo from the same paths or URLs, and returns sums and bases. If a worker is lost, the scheduler gives its
current tasks to another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from eigenzoo.errors import UsageError, install
from eigenzoo.formats.open_files import keep_files_open
from eigenzoo.passes.process import single_threaded
from eigenzoo.passes.resources import Resources, check_device, check_memory, check_name, resources_for
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers

LOCAL = "local"

SECONDS_TO_CONNECT = 60
"""Seconds to wait for the scheduler and its first worker."""


@contextmanager
def cluster_workers(
    cluster: Any = LOCAL, *, num_workers: int | None = None, max_memory: int | None = None, device: str = "cpu"
) -> Iterator[Workers]:
    """Connect to a cluster for as long as the context lasts.

    Args:
        cluster: "local" for processes of this machine, the address of a scheduler (`tcp://…`, `tls://…`), or an existing dask
            cluster or client, such as one of dask-jobqueue or dask-kubernetes. The last two stay open afterwards.
        num_workers: number of processes that "local" starts. Default: one per core, or with device `cuda` one per GPU.
        max_memory: bytes for blocks of weights on one worker.
        device: device of products on the workers. With `cuda` each process of "local" has its own GPU. Other workers use the first
            GPU that they see; if one has none, the first task raises.

    Raises:
        UsageError: dask.distributed is missing, no scheduler or worker answers, or there are more local processes than GPUs.

        >>> with cluster_workers("tcp://scheduler:8786") as workers:      # doctest: +SKIP
        ...     space = eigenzoo.fit("s3://bucket/adapters", rank=16, workers=workers)
    """
    resources = worker_resources(max_memory, device)
    run = run_task
    if cluster == LOCAL and device != "cpu":
        num_workers = local_gpus(num_workers, device)
        run = run_on_own_gpu if device == "cuda" else run_task
    client, ours = _connect(cluster, num_workers)
    try:
        num = sum(client.nthreads().values())
        # Computations here, between tasks, run on one thread like those of the workers, so that bits are the same.
        with single_threaded():
            # Not "pure", because a task's key would be the hash of its arguments, and two fits would share results.
            yield Workers(client.get_executor(pure=False), num, resources, run=run)
    finally:
        for opened in ours:
            opened.close()


def worker_resources(max_memory: int | None, device: str) -> Resources:
    """Return the resources of a task on a worker, whose memory and device differ from this machine's."""
    check_name(device)
    check_memory(max_memory)
    if max_memory is None:
        return Resources(device=device)
    bounds = resources_for(1, max_memory)
    return Resources(bounds.block_bytes, bounds.layer_bytes, device)


def local_gpus(num_workers: int | None, device: str) -> int:
    """Return the number of local processes, one per GPU. Every process on a GPU takes its own memory there."""
    check_device(device)
    count = torch.cuda.device_count() if device == "cuda" else 1
    if num_workers is not None and num_workers > count:
        raise UsageError(
            f"{num_workers} local workers are too many for {count} GPU{'s' if count > 1 else ''}",
            rule="each process has its own GPU",
            next_step="use fewer workers, or no cluster: threads of one process share a GPU",
        )
    return num_workers or count


def run_on_own_gpu(call: Callable[[], Any]) -> Any:
    """Run a task on this worker's GPU, whose number is the worker's number in the local cluster."""
    from distributed import get_worker

    # For this thread only, without a context on the other GPUs.
    torch.cuda.set_device(int(get_worker().name))
    return run_task(call)


def run_task(call: Callable[[], Any]) -> Any:
    """Run a task on one thread of a worker."""
    with single_threaded(), own_settings(), keep_files_open():
        return call()


def _connect(cluster: Any, num_workers: int | None) -> tuple[Any, list[Any]]:
    """Return a client, and the objects to close afterwards, in this order."""
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise UsageError(
            "dask.distributed is not installed",
            rule="a cluster needs it",
            next_step=install("cluster"),
        ) from error
    if isinstance(cluster, Client):
        return cluster, []
    if isinstance(cluster, str) and cluster != LOCAL and "://" not in cluster:
        raise UsageError(
            f"unknown cluster {cluster!r}", rule="a cluster is 'local' or an address such as tcp://scheduler:8786"
        )
    ours = []
    try:
        if cluster == LOCAL:
            # Without a dashboard there is still a web server. It uses a free port that only this machine can reach.
            cluster = LocalCluster(
                n_workers=num_workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
            )
            ours.append(cluster)
        client = Client(cluster, timeout=SECONDS_TO_CONNECT, set_as_default=False)
        ours.insert(0, client)
        client.wait_for_workers(1, timeout=SECONDS_TO_CONNECT)
    except (OSError, TimeoutError, ValueError) as error:
        for opened in ours:
            opened.close()
        raise UsageError(
            f"no cluster answers at {cluster!r} ({type(error).__name__})",
            rule="a scheduler and at least one worker must be running",
            next_step="start `dask scheduler` and `dask worker tcp://…`, or use --cluster local",
        ) from error
    return client, ours
