"""The jobs in docs/examples: their flags exist, and they go on until all is done."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.pages import DOCS, FLAG, flags_of

yaml = pytest.importorskip("yaml", reason="the site needs the extra docs")

SBATCH = DOCS / "examples/two_nodes.sbatch"
KUBERNETES = DOCS / "examples/kubernetes.yaml"


def in_pod():
    """Returns the words that the container of the Job runs."""
    service, job = yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    (container,) = pod["containers"]
    return [*container["command"], *container["args"]]


@pytest.mark.parametrize("text", [SBATCH.read_text("utf-8"), in_pod()[-1]])
def test_the_flags_exist(text):
    command = re.search(r"(?<=experiments\.pretrain_llama)(.*\\\n)+.*", text)
    assert command
    found = set(FLAG.findall(command[0]))
    assert {"--coordinator", "--resume", "--out", "--mesh"} <= found
    assert found <= flags_of("experiments.pretrain_llama")


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("run", "status", "queued"),
    [
        # Stopped by SIGTERM and saved; done; ended by a mistake, or a death.
        ("exit 0", 0, True),
        ("mkdir -p runs/mine; touch runs/mine/summary.json", 0, False),
        ("exit 1", 1, False),
    ],
)
def test_the_sbatch_file_queues_a_stopped_run_again(run, status, queued, tmp_path):
    program(tmp_path / "bin/srun", run)
    program(tmp_path / "bin/scontrol", 'echo "$@" > queued')
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "42",
        "SLURM_CPUS_PER_TASK": "8",
    }
    done = subprocess.run(
        ["bash", SBATCH], cwd=tmp_path, env=environment, timeout=60, check=False
    )
    assert done.returncode == status
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 42\n"


@pytest.mark.parametrize(
    ("run", "status"),
    [
        ("trap 'exit 0' TERM; touch started; while true; do sleep 0.05; done", 1),
        ("touch started; touch {out}/summary.json", 0),
        ("touch started; exit 3", 3),
    ],
)
def test_a_pod_is_done_only_when_the_run_is(run, status, tmp_path):
    # A run that is stopped says 0, which would complete the Job.
    *shell, script = in_pod()
    program(tmp_path / ".venv/bin/python", run.format(out=tmp_path))
    script = script.replace("/runs/mine", str(tmp_path))
    pod = subprocess.Popen(
        [*shell, script], cwd=tmp_path, env={**os.environ, "JOB_COMPLETION_INDEX": "1"}
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    if "trap" in run:
        pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=60) == status
