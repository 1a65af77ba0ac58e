"""Several processes on one machine: what each is given, and how all of them end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import launch
from experiments.launch import Options, environments_of, gpus_of
from tests.experiments.small_runs import one_error_line, write_inputs

ROOT = Path(__file__).resolve().parents[2]
# A process of its own, which has no threads: each word is the program of a child.
LAUNCHER = """
import json, os, signal, sys
from experiments.distribution import children
# nohup, or a shell's background, around these tests, has them ignored.
for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)
settings = json.loads(sys.argv[1])
children._SECONDS_TO_TERMINATE = 1.0
commands = [[sys.executable, "-c", program] for program in sys.argv[2:]]
environments = [dict(os.environ)] * len(commands)
sys.exit(children.run_together(commands, environments, **settings))
"""
# A child that says who it is, and then notes the signals that it gets.
NOTES = """
import os, pathlib, signal, time
heard = pathlib.Path({path!r})
def note(number, frame):
    with heard.open("a") as file:
        file.write(f"{{number}} ")
for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
    signal.signal(number, note)
pathlib.Path({path!r} + ".pid").write_text(str(os.getpid()))
begun = time.monotonic()
while not heard.exists() and time.monotonic() < begun + 60:
    time.sleep(0.02)
# A second one would come by now.
time.sleep(0.3)
"""


def start(*programs, seconds=5.0, verbose=False):
    settings = json.dumps({"seconds": seconds, "verbose": verbose})
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, settings, *programs],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A group of its own, all of which hears Ctrl-C in a terminal.
        start_new_session=True,
    )


def together(*programs, **settings):
    """Returns status, stdout and stderr of the launcher of these programs."""
    launcher = start(*programs, **settings)
    said, complained = launcher.communicate(timeout=60)
    return launcher.returncode, said, complained


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Nobody may have asked for its status yet.
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def started(paths):
    """Waits for the children; returns the numbers of their processes."""
    files = [Path(f"{path}.pid") for path in paths]
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


def ends(pid):
    until = time.monotonic() + 10
    while is_alive(pid):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


LATER = "import time; time.sleep(1)"


@pytest.mark.parametrize(
    ("programs", "status"),
    [
        (["pass", "pass"], 0),
        (["pass", "raise SystemExit(4)", f"{LATER}; raise SystemExit(3)"], 4),
        (["pass", f"{LATER}; raise SystemExit(4)", "raise SystemExit(3)"], 3),
        ([f"{LATER}; raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)"], 137),
    ],
)
def test_the_status_is_that_of_the_first_process_that_fails(programs, status):
    assert together(*programs) == (status, "", "")


def test_the_first_process_speaks_for_itself_and_the_others_by_number():
    words = "import os; os.write(1, b'done\\n'); os.write(2, b'%s')"
    noise = (
        "[Gloo] Rank 1 is connected to 1 peer ranks.\\n"
        "E1127 12:24:01.5 7 client.cc:9] no answer\\n"
        "2026-11-27 12:24:01.123456: W external/xla/x.cc:9] slow\\n"
        "    @     0x7f3c  (unknown)\\n"
    )
    programs = (words % "E1127 12:24:01.5 first\\n", words % f"{noise}error: no\\nrest")

    status, said, complained = together(*programs)
    assert (status, said) == (0, "done\n")
    # Whoever comes first.
    assert sorted(complained.splitlines()) == [
        "E1127 12:24:01.5 first",
        "[process 1] error: no",
        "[process 1] rest",
    ]
    _, said, complained = together(*programs, verbose=True)
    assert said == "done\n"
    assert "[process 1] done\n" in complained
    assert "[process 1] [Gloo] Rank 1 is" in complained
    assert len(complained.splitlines()) == 8


def test_what_xla_logs_as_fatal_is_shown():
    program = "import os; os.write(2, b'F1127 12:24:01.5 7 x.cc:9] Check failed\\n')"
    assert "[process 1] F1127" in together("pass", program)[2]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")],
)
def test_a_signal_reaches_each_process_once(sent, expected, tmp_path):
    paths = [str(tmp_path / str(index)) for index in range(2)]
    launcher = start(*(NOTES.format(path=path) for path in paths))
    started(paths)
    os.killpg(launcher.pid, getattr(signal, sent))
    assert launcher.communicate(timeout=60) == ("", "")
    assert launcher.returncode == 0
    for path in paths:
        assert Path(path).read_text().split() == [str(int(getattr(signal, expected)))]


def test_a_process_that_goes_on_after_the_end_of_another_is_killed(tmp_path):
    path = str(tmp_path / "stubborn")
    stubborn = NOTES.format(path=path) + "time.sleep(60)"
    wait = (
        f"import os, time\nwhile not os.path.exists({path + '.pid'!r}): time.sleep(.02)"
    )
    status, _, complained = together(
        f"{wait}\nraise SystemExit(3)", stubborn, seconds=0.2
    )
    assert status == 3
    assert complained == (
        "error: 0.2 s after the end of another process, process 1 of 2 goes on; it is "
        "ended\n"
    )
    # It was asked first.
    assert Path(path).read_text().split() == [str(int(signal.SIGTERM))]
    assert not is_alive(int(Path(f"{path}.pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which ends children")
def test_no_process_outlives_a_launcher_that_is_killed(tmp_path):
    paths = [str(tmp_path / str(index)) for index in range(2)]
    launcher = start(*(NOTES.format(path=path) for path in paths))
    found = started(paths)
    launcher.kill()
    launcher.wait()
    assert all(map(ends, found))
    launcher.communicate(timeout=60)
    # Linux may send it again, at the end of each thread of the launcher.
    for path in paths:
        assert {*Path(path).read_text().split()} == {str(int(signal.SIGTERM))}


@pytest.fixture
def given(monkeypatch):
    """Notes what would be run, and does not run it."""
    found = []

    def note(*arguments):
        found.append(arguments)
        return 7

    monkeypatch.setattr(launch, "run_together", note)
    monkeypatch.setattr(launch, "gpus_of", lambda environment: [])
    return found


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain_llama"],
        ["experiments.pretrain_llama"],
        ["-m", "experiments.pretrain_llama"],
        [".venv/bin/python3.11", "-m", "experiments.pretrain_llama"],
    ],
)
def test_each_process_gets_the_command_and_its_number(words, given):
    own = ["--processes", "2", "--port", "5001"]
    assert launch.main([*own, "--", *words, "--steps", "3"]) == 7
    ((commands, environments, seconds, verbose),) = given
    same = [sys.executable, "-m", "experiments.pretrain_llama", "--steps", "3"]
    same += ["--coordinator", "127.0.0.1:5001", "--num-processes", "2"]
    assert commands == [[*same, "--process-id", "0"], [*same, "--process-id", "1"]]
    assert environments == [os.environ, os.environ]
    assert (seconds, verbose) == (20.0, False)


def test_a_free_port_is_taken(given):
    launch.main(["--processes", "1", "--", "finetune"])
    words = given[0][0][0]
    host, port = words[words.index("--coordinator") + 1].split(":")
    assert host == "127.0.0.1"
    assert 1024 <= int(port) < 65536


def shares(count, gpus, environment=None, **settings):
    options = Options(processes=count, **settings)
    return environments_of(options, environment or {}, [*map(str, range(gpus))])


def test_each_process_has_its_own_share_of_the_gpus():
    name = launch.LOCAL_DEVICES
    assert shares(2, 4) == [{name: "0,1"}, {name: "2,3"}]
    assert shares(2, 5, devices_per_process=2) == [{name: "0,1"}, {name: "2,3"}]
    assert environments_of(Options(processes=2), {name: "4,6"}, ["4", "6"]) == [
        {name: "4"},
        {name: "6"},
    ]


def test_a_machine_without_gpus_simulates_devices():
    flag = "--xla_force_host_platform_device_count"
    assert shares(2, 0, {"XLA_FLAGS": f"{flag}=8"}) == [{"XLA_FLAGS": f"{flag}=8"}] * 2
    assert shares(1, 0, devices_per_process=2) == [{"XLA_FLAGS": f"{flag}=2"}]
    (found,) = shares(1, 0, {"XLA_FLAGS": "--a=1"}, devices_per_process=2)
    assert found == {"XLA_FLAGS": f"--a=1 {flag}=2"}


def test_the_gpus_are_those_that_the_environment_shows():
    assert gpus_of({"CUDA_VISIBLE_DEVICES": "5,7"}) == ["0", "1"]
    assert gpus_of({"CUDA_VISIBLE_DEVICES": "5,7", "JAX_PLATFORMS": "cpu"}) == []
    assert gpus_of({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert gpus_of({launch.LOCAL_DEVICES: "1,3"}) == ["1", "3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", 2], "there is no command behind --; give it like python -m"),
        (["--processes", 2, "--"], "there is no command behind --"),
        (["--processes", 2, "finetune"], "there is no command behind --"),
        (["--processes", 2, "--", "finetun"], "did you mean finetune?"),
        (["--processes", 2, "--", "python", "-m"], "the command behind --"),
        (["--processes", 2, "--", "compare"], "choose one of pretrain_llama, finetune"),
        (["--processes", 0, "--", "finetune"], "--processes must be at least 1, not 0"),
        (["--", "finetune"], "--processes"),
        (
            ["--processes", 1, "--port", 0, "--", "finetune"],
            "--port must be from 1 to 65535, not 0",
        ),
        (
            ["--processes", 2, "--", "finetune", "--process_id=1"],
            "--process-id is what launch gives each process; leave it out",
        ),
        (["--processes", 2, "--", "finetune", "--coordinator", "a:1"], "--coordinator"),
    ],
)
def test_mistakes_are_one_line(words, message, given, capsys):
    assert launch.main([*map(str, words)]) == 2
    assert message in one_error_line(capsys)
    assert not given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--processes 2 does not divide the 3 GPUs of this machine"),
        (
            ["--devices-per-process", "2"],
            "--processes 2 with --devices-per-process 2 need 4 GPUs, but this machine "
            "has 3",
        ),
    ],
)
def test_gpus_that_cannot_be_shared_out_are_one_line(
    words, message, given, monkeypatch, capsys
):
    monkeypatch.setattr(launch, "gpus_of", lambda environment: ["0", "1", "2"])
    assert launch.main(["--processes", "2", *words, "--", "finetune"]) == 2
    assert message in one_error_line(capsys)
    assert not given


def test_the_launcher_starts_without_jax():
    program = "import experiments.launch, sys; sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60)
    assert done.returncode == 0


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path):
    flags = [*write_inputs(tmp_path), "--optimizer", "adamw", "--steps", "3"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.launch", "--processes", "2"),
            *("--devices-per-process", "2", "--", "pretrain_llama"),
            *(*flags, "--out", str(tmp_path / "out")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 3/3" in done.stdout
    assert "[process 1]" not in done.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["device"].startswith("4 x ")
