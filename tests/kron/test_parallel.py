"""Parallel work on layers gives the results of sequential work."""

import multiprocessing
import os
import signal

import pytest
import torch

from krona_hub.errors import KronaError, ResourceError
from krona_hub.kron.factorization_search import smallest_within, within_budget
from krona_hub.kron.parallel import in_parallel, in_processes

BOTH = pytest.mark.parametrize("side_by_side", [in_parallel, in_processes])


@pytest.fixture(autouse=True)
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@BOTH
def test_results_come_in_the_order_of_the_tasks(side_by_side):
    shift = 10  # a closure: forked processes inherit it
    assert list(side_by_side(lambda n: n * n + shift, range(20))) == [(n, n * n + 10) for n in range(20)]
    assert torch.get_num_threads() == 2


def test_processes_are_others_than_ours_and_gone_afterwards():
    ids = {pid for _, pid in in_processes(lambda _: os.getpid(), range(8))}
    assert os.getpid() not in ids and not multiprocessing.active_children()


@BOTH
def test_a_failure_comes_out_as_it_was_raised(side_by_side):
    def fail(n):
        raise KronaError(f"layer {n} is odd.", fix="None.")

    with pytest.raises(KronaError, match="layer 1 is odd"):
        list(side_by_side(fail, [1, 3, 5]))


def test_a_process_that_the_system_ends_is_told():
    with pytest.raises(ResourceError, match="ended by the system"):
        list(in_processes(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(4)))
    assert not multiprocessing.active_children()


def test_leaving_early_ends_the_processes():
    running = in_processes(lambda n: n, range(50))
    assert next(running) == (0, 0)
    running.close()
    assert not multiprocessing.active_children()


def test_a_search_finds_the_same_with_one_core_and_with_two():
    torch.manual_seed(0)
    sizes = [(24, 36), (36, 24), (24, 24)]
    loras = [(torch.randn(o, 3), torch.randn(3, i)) for o, i in sizes for _ in range(2)]

    def forms():
        found = [*smallest_within(loras, 0.3), *within_budget(loras, 500)]
        return [(c.form.shape, c.form.terms, c.form.right_rank, c.form.relative_error) for c in found]

    two = forms()
    torch.set_num_threads(1)
    assert forms() == two
