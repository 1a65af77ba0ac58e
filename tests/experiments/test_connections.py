"""The connections of processes: who is lost, who said good-bye, where the first is."""

import os
import queue
import socket
import time

import pytest

from experiments.distribution import processes
from experiments.distribution.connections import Connections
from experiments.distribution.processes import host_of


@pytest.fixture
def connect(monkeypatch):
    """Returns a function that makes the connections of a process of two, here."""
    told = {}

    def of_first(name, value):
        if processes.is_first():
            told[name] = value
        # A name that only the first machine knows.
        return f"nowhere.invalid {told[name].split(' ')[1]}"

    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "of_first", of_first)

    def make(index, lost, kind=Connections):
        monkeypatch.setattr(processes, "is_first", lambda: index == 0)
        monkeypatch.setattr(processes, "index", lambda: index)
        return kind(lost, "localhost")

    return make


def test_a_closed_connection_is_told_with_its_number(connect):
    lost = queue.Queue()
    connect(0, lost.put)
    second = connect(1, lost.put)
    (connection,) = second._sockets
    # As the system does it for a process that dies.
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert {lost.get(timeout=10), lost.get(timeout=10)} == {0, 1}


def test_a_good_bye_is_not_the_end_of_a_process(connect):
    """The first waits for it: JAX aborts a process that outlives the first."""
    lost = queue.Queue()
    first = connect(0, lost.put)
    second = connect(1, lost.put)
    descriptor = second._sockets[0].fileno()
    while not first._listening:
        time.sleep(0.01)
    for each in (first, second):
        each.close()
    del each, second
    assert not first.await_ends(0.2)
    # As the system does it at the end of a process.
    os.close(descriptor)
    assert first.await_ends(10)
    assert lost.empty()


def test_a_good_bye_before_the_other_is_listened_to_is_no_loss(connect):
    """A thread may begin late: it then finds what was said, not a closed descriptor."""
    lost = queue.Queue()
    late = []

    class Late(Connections):
        def _start(self, function, *arguments):
            late.append((function, *arguments))

    first = connect(0, lost.put)
    second = connect(1, lost.put, Late)
    while not first._listening:
        time.sleep(0.01)
    for each in (first, second):
        each.close()
    ((listen, *arguments),) = late
    listen(*arguments)
    assert lost.empty()


def test_the_first_process_is_where_the_others_have_reached_it():
    assert host_of("node-1.cluster:1234") == "node-1.cluster"
    assert host_of("[::1]:1234") == "::1"
    assert host_of("auto") is None
