"""Making data sets: archives and other layouts to a folder or to shards, inspection, and the drawn demo set.

Here is what they share: running many independent jobs on all cores.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import resource_tracker
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def run_jobs(work: Callable[[Job], Result], jobs: Iterable[Job], workers: int | None = None) -> Iterator[Result]:
    """work(job) of each job, in order, by `workers` processes (default: one a core; 1: in this process).

    Two jobs a worker at most are under way or wait to be taken, so results of any size and number fit in memory. Close
    the iterator before touching what the jobs touch: after that nothing of them runs. An exception in a job is raised
    here; a worker that dies raises BrokenProcessPool.
    """
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        yield from map(work, jobs)
        return
    pool = worker_pool(workers)
    try:
        yield from in_order(pool, work, jobs, 2 * workers)
    finally:
        # Python 3.11.2's pool once waited for ever here, its last jobs being cancelled: so it is told to drop them.
        pool.shutdown(cancel_futures=True)


def worker_pool(
    workers: int, preload: str | None = None, initializer: Callable[[], None] | None = None
) -> ProcessPoolExecutor:
    """Processes for `in_order`, which ignore the signals that stop the parent and end with it, however it ends.

    Args:
        preload: a module that takes seconds to import: once for all workers, in a process that they are forked from.
        initializer: called in each worker before its first job.
    """
    # Never forked from this process: it may have threads, and a GPU.
    context = multiprocessing.get_context("forkserver" if preload else "spawn")
    if preload:
        context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(workers, context, _follow, (initializer,))


def in_order(
    pool: ProcessPoolExecutor, work: Callable[[Job], Result], jobs: Iterable[Job], ahead: int
) -> Iterator[Result]:
    """work(job) of each job, in order; `ahead` of them at most are under way or wait to be taken."""
    pending: deque[Future] = deque()
    try:
        for job in jobs:
            pending.append(_submit(pool, work, job))
            if len(pending) == ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        wait([future for future in pending if not future.cancel()])


def _submit(pool: ProcessPoolExecutor, work: Callable[[Job], Result], job: Job) -> Future:
    """pool.submit, which may start a process: with the signals held back, so that it never hears them.

    A worker that a signal to the whole job ended would take the parent with it, before its save.
    """
    resource_tracker.ensure_running()  # or starting it would let them in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return pool.submit(work, job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(initializer: Callable[[], None] | None) -> None:
    """In a worker: leave the stop signals to the parent, and end with it where that is killed."""
    # Again and here: a forkserver serves the whole process, and whoever started it may not have held them back.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if initializer is not None:
        initializer()
