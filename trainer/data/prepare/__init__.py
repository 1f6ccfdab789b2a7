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
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


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
    context = multiprocessing.get_context("spawn")  # not forked: the caller may have threads
    pending = deque()
    with ProcessPoolExecutor(workers, context, _follow) as pool:
        try:
            for job in jobs:
                pending.append(pool.submit(work, job))
                if len(pending) == 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _follow() -> None:
    """In a worker: leave Ctrl-C to the parent, which then ends the pool; end with the parent where that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
