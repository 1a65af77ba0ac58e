"""What takes long is said while it lasts, and what does not is not."""

import time

from experiments.run.waits import Waits, teller


def test_a_long_wait_is_said_again_and_again_and_a_short_one_never():
    said = []
    with Waits(said.append, seconds=0.3) as waits:
        with waits("something quick"):
            pass
        with waits("the disk"):
            while len(said) < 2:
                time.sleep(0.01)
    assert all(line.startswith("waiting for the disk, for ") for line in said)


def test_what_is_done_after_a_wait_is_not_waited_for():
    said = []
    with Waits(said.append, seconds=0.1) as waits:
        with waits("nothing"):
            pass
        time.sleep(0.5)
    assert not said


def test_the_first_process_speaks_as_it_is_told_and_others_name_themselves(
    monkeypatch, capsys
):
    said = []
    assert teller(said.append) == said.append
    monkeypatch.setattr("experiments.run.waits.is_first", lambda: False)
    monkeypatch.setattr("experiments.run.waits.index", lambda: 3)
    teller(said.append)("waiting for the disk")
    assert capsys.readouterr().err == "process 3: waiting for the disk\n"
    assert not said
