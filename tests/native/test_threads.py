"""The pool of threads: forks, callers on several threads, one thread."""

import os
import signal
import sys
import threading
import traceback
from ctypes import c_void_p

import pytest
import torch

from igva_kernels import FusionPlan
from igva_kernels.impl import native
from igva_kernels.impl.native.build import library
from igva_kernels.impl.native.openmp import parallel_of_torch

pytestmark = pytest.mark.usefixtures("_built")

PLAN = FusionPlan.igva(8, 4)


def run(case):
    return native.fuse_forward(case.states, case.weights, case.plan.program, case.num_prefix_tokens, False)[0]


def exit_status_of_child(work) -> int:
    """Of a forked child that does some work; one that hangs is ended by a signal."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(params=["torch's threads", "the pool"])
def _threads(request):
    """Whose threads work: those of torch's OpenMP runtime, or, as where that is not known, those of mix.c itself."""
    built = library()
    built.igva_use_team(c_void_p(None if request.param == "the pool" else parallel_of_torch()))
    yield
    built.igva_use_team(c_void_p(parallel_of_torch()))


@pytest.mark.usefixtures("_threads")
def test_a_forked_child_has_a_pool_of_its_own(make_case, many_threads):
    many_threads(3)
    case = make_case(PLAN, tokens=60)
    expected = run(case)  # the parent's threads are running now

    def work():
        for _ in range(20):
            assert torch.equal(run(case), expected)
        assert exit_status_of_child(lambda: run(case)) == 0  # and a child of the child

    assert exit_status_of_child(work) == 0
    assert torch.equal(run(case), expected)


@pytest.mark.usefixtures("_threads")
def test_a_child_forked_while_another_thread_works(make_case, many_threads):
    many_threads(3)
    case = make_case(PLAN, tokens=200, width=256)
    expected = run(case)
    stop = threading.Event()

    def keep_working():
        while not stop.is_set():
            run(case)

    thread = threading.Thread(target=keep_working)
    thread.start()
    try:
        statuses = [exit_status_of_child(lambda: [run(case) for _ in range(3)]) for _ in range(10)]
    finally:
        stop.set()
        thread.join()
    assert statuses == [0] * 10
    assert torch.equal(run(case), expected)


@pytest.mark.usefixtures("_threads")
def test_callers_on_several_threads_share_nothing(make_case, many_threads):
    many_threads(3)
    cases = [make_case(PLAN, torch.bfloat16, tokens=100) for _ in range(4)]
    expected = [run(case) for case in cases]
    wrong = []

    def call(case, want):
        for _ in range(50):
            if not torch.equal(run(case), want):
                wrong.append(case)

    threads = [threading.Thread(target=call, args=pair) for pair in zip(cases, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_pool_gives_the_bits_of_torch_s_threads(make_case, many_threads):
    many_threads(3)
    case = make_case(PLAN, tokens=100)
    of_torch = run(case)
    library().igva_use_team(None)
    try:
        of_pool = run(case)
    finally:
        library().igva_use_team(c_void_p(parallel_of_torch()))
    assert torch.equal(of_pool, of_torch)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the libraries of the process from /proc")
def test_torch_s_threads_are_found_and_taken(make_case, many_threads):
    if not torch.__config__.parallel_info().count("OpenMP"):
        pytest.skip("this torch has no OpenMP")
    assert parallel_of_torch() is not None
    many_threads(3)
    case = make_case(PLAN, tokens=60)
    torch.randn(1 << 20).add_(1)  # torch's threads are there now, whatever ran before
    before = len(os.listdir("/proc/self/task"))
    run(case)
    assert len(os.listdir("/proc/self/task")) == before


def test_one_thread_starts_no_other(make_case, many_threads):
    many_threads(1)
    case = make_case(PLAN, tokens=60)

    def work():  # a child begins without threads of the pool
        before = len(os.listdir("/proc/self/task"))
        run(case)
        assert len(os.listdir("/proc/self/task")) == before
        torch.set_num_threads(3)
        before = len(os.listdir("/proc/self/task"))  # torch may have started threads of its own
        run(case)
        assert len(os.listdir("/proc/self/task")) == before + 2

    assert exit_status_of_child(work) == 0
