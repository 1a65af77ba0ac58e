"""One run in several processes here: ``python -m experiments.launch --processes 2 --``.

The words behind ``--`` are those of a training command.
"""

import dataclasses
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.arguments import (
    check_choice,
    check_ranges,
    flag,
    given_flags,
    parse_arguments,
)
from experiments.distribution.children import run_together
from experiments.errors import UserError, print_error
from experiments.ranges import AtLeastOne, Port

# Commands that may be one of several processes.
_COMMANDS = ("pretrain_llama", "finetune")
_OURS = frozenset({"coordinator", "num_processes", "process_id"})
# Where JAX reads which of the GPUs that it sees are its own, counted from 0.
LOCAL_DEVICES = "JAX_LOCAL_DEVICE_IDS"
_EXAMPLE = (
    "python -m experiments.launch --processes 2 -- experiments.pretrain_llama --steps 9"
)
# The processes notice the end of one in less. One that never joined the others, because
# its first one had ended, would wait for --process-timeout.
_SECONDS = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Starts a training command in several processes on this machine, as one run.

    The command stands behind --: experiments.pretrain_llama or experiments.finetune,
    with its flags. Process 0 has the terminal. SIGINT and SIGTERM reach each process.
    If one of them ends, the others end too.
    """

    #: Processes to start; at least 1.
    processes: AtLeastOne
    #: Devices of each process; at least 1. On a machine with GPUs, so many of them;
    #: None: an equal share of all. Elsewhere, so many simulated devices; None: what
    #: XLA_FLAGS says.
    devices_per_process: AtLeastOne | None = None
    #: Port of process 0, on this machine. None: a free one.
    port: Port | None = None
    #: Show what the other processes write to stdout too, and what libraries log.
    verbose: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    That of the first process that has failed; 0: none has; 2: a mistake of the user's,
    told in one line on stderr.
    """
    try:
        options, words = _parse(list(sys.argv[1:] if argv is None else argv))
        environments = environments_of(options, os.environ, gpus_of(os.environ))
    except UserError as error:
        print_error(error)
        return 2
    address = f"127.0.0.1:{options.port or _free_port()}"
    commands = [
        [
            *(sys.executable, "-m", *words, "--coordinator", address),
            *("--num-processes", str(options.processes), "--process-id", str(index)),
        ]
        for index in range(options.processes)
    ]
    return run_together(commands, environments, _SECONDS, options.verbose)


def _parse(argv: list[str]) -> tuple[Options, list[str]]:
    """Returns the flags before ``--``, and module and flags behind it."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, words = argv[:end], argv[end + 1 :]
    if not words and not {"-h", "--help"} & {*own}:
        raise UserError(f"there is no command behind --; give it like {_EXAMPLE}")
    options = parse_arguments(Options, "python -m experiments.launch", own)
    check_ranges(options)
    if re.fullmatch(r"python[\d.]*", Path(words[0]).name):
        words = words[1:]
    if words[:1] == ["-m"]:
        words = words[1:]
    name = words[0].removeprefix("experiments.") if words else ""
    check_choice("the command behind --", name, _COMMANDS)
    for given in sorted(given_flags(words) & _OURS):
        raise UserError(
            f"{flag(given)} is what launch gives each process; leave it out of the "
            "command behind --"
        )
    return options, [f"experiments.{name}", *words[1:]]


def environments_of(
    options: Options, environment: Mapping[str, str], gpus: Sequence[str]
) -> list[dict[str, str]]:
    """Returns the environment of each process, with its share of the devices.

    Args:
        options: Checked.
        environment: Of this process.
        gpus: From :func:`gpus_of`.

    Raises:
        UserError: If the GPUs cannot be shared out.
    """
    count, share = options.processes, options.devices_per_process
    if gpus:
        if share is None and len(gpus) % count:
            raise UserError(
                f"--processes {count} does not divide the {len(gpus)} GPUs of this "
                "machine; choose a divisor, or give --devices-per-process"
            )
        share = share or len(gpus) // count
        if share * count > len(gpus):
            raise UserError(
                f"--processes {count} with --devices-per-process {share} need "
                f"{share * count} GPUs, but this machine has {len(gpus)}"
            )
        shares = (gpus[i * share : (i + 1) * share] for i in range(count))
        changes = [{LOCAL_DEVICES: ",".join(ids)} for ids in shares]
    elif share is not None:
        # The last one of a flag counts.
        given = environment.get("XLA_FLAGS", "")
        words = f"{given} --xla_force_host_platform_device_count={share}"
        changes = [{"XLA_FLAGS": words.strip()}] * count
    else:
        changes = [{}] * count
    return [{**environment, **change} for change in changes]


def gpus_of(environment: Mapping[str, str]) -> list[str]:
    """Returns JAX's numbers of the GPUs of NVIDIA that it will see, without asking it.

    Args:
        environment: Of this process. It may leave some of the machine's out.
    """
    if environment.get("JAX_PLATFORMS", "").lower() == "cpu":
        return []
    if environment.get(LOCAL_DEVICES):
        return environment[LOCAL_DEVICES].split(",")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        found = len(list(Path("/dev").glob("nvidia[0-9]*")))
    else:
        found = len([x for x in visible.split(",") if x.strip() not in ("", "-1")])
    return [str(number) for number in range(found)]


def _free_port() -> int:
    with socket.create_server(("", 0)) as found:
        return found.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
