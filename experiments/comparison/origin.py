"""Where results come from."""

from collections.abc import Mapping, Sequence
from typing import Any


def origin(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns model, task, length, data, device and commits of some runs, in words.

    Args:
        records: Lines of results.jsonl, at least one.
    """
    commits = ", ".join(sorted({record["commit"] for record in records}))
    finished = [record for record in records if record["status"] == "finished"]
    if not finished:
        # The summary would say more.
        return f"every run diverged; of commit {commits}"
    first = finished[0]
    task = f" on {first['task']}" if "task" in first else ""
    data = " ".join(first["data"].split())
    return (
        f"{first['model']}{task}, {first['steps']} steps; {data}; {first['device']}; "
        f"of commit {commits}"
    )
