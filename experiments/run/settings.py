"""What a training command's configuration is: its flags, its file, its checks."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from experiments.arguments import (
    field_names,
    given_flags,
    nearest,
    parse_arguments,
    words_of,
)
from experiments.errors import UserError
from experiments.optim.methods import OWN_OPTIONS
from experiments.run.files import CONFIG_FILE

Config = TypeVar("Config")
Flags = TypeVar("Flags")

# What a configuration file says of the run that wrote it, and of no other.
# The processes come and go: a run does not end with those that it was started by.
PROCESS_FIELDS = frozenset({"coordinator", "num_processes", "process_id"})
_OF_ONE_RUN = frozenset({"config", "out", "resume", "allow_changes"}) | PROCESS_FIELDS
_OF_ONE_METHOD = OWN_OPTIONS | {"block_scale"}


@dataclasses.dataclass(frozen=True)
class Settings(Generic[Config]):
    """The configuration of a training command.

    Attributes:
        options: Its dataclass, whose fields are the flags.
        program: Module of the command.
        check: Raises UserError if a value is out of its range, or a flag that is given
            has no effect; called with a configuration, before any default is filled in,
            and with the fields whose flags are on the command line.
        free: Fields that do not change what is computed.
        data: Fields that say where the data is: its digest says whether it is equal.
        fixed: Fields that the arrays of a checkpoint depend on, or its place in the
            data.
        implied: Configuration -> the values that its fields of None will have, where
            the other fields alone say them.
        either: Fields of which a configuration has one.
    """

    options: type[Config]
    program: str
    check: Callable[[Config, frozenset[str]], None]
    free: frozenset[str]
    data: frozenset[str]
    fixed: frozenset[str]
    implied: Callable[[Config], Mapping[str, Any]]
    either: frozenset[str] = frozenset()

    def parse(self, argv: Sequence[str]) -> Config:
        """Returns the configuration that the arguments spell, each value checked.

        Raises:
            UserError: If a flag or a value is not one of ours.
            SystemExit: With status 0, after ``--help``.
        """
        config = self.read(argv, self.options, self.program)
        self.check(config, given_flags(argv))
        return config

    def read(self, argv: Sequence[str], options: type[Flags], program: str) -> Flags:
        """Returns what arguments and files spell, nothing checked but the files.

        Args:
            argv: Arguments, without the name.
            options: The configuration, or a class with further flags.
            program: Module of the command.

        Raises:
            UserError: If a flag, or a setting in a file, is not one of ours.
            SystemExit: With status 0, after ``--help``.
        """
        program = f"python -m {program}"
        config: Any = parse_arguments(options, program, argv)
        words = []
        if config.resume and config.out and (config.out / CONFIG_FILE).is_file():
            fields, _ = self._fields_of_file(config.out / CONFIG_FILE, config, argv)
            words += words_of(fields)
        if config.config is not None:
            fields, of_file = self._fields_of_file(config.config, config, argv)
            implied = self._implied(of_file)
            words += words_of({k: v for k, v in fields.items() if k not in implied})
        if words:
            config = parse_arguments(options, program, [*words, *argv])
        return dataclasses.replace(config, config=None)

    def read_file(self, path: Path) -> dict[str, Any]:
        """Returns the fields that a configuration file sets, as JSON has them.

        Args:
            path: A file that :func:`to_json` has made, or a part of one.

        Raises:
            UserError: If it cannot be read or has a field that is not of ours.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; give the config.json of a run"
            ) from error
        except ValueError as error:
            raise UserError(
                f"{path} is not JSON ({error}); give the config.json of a run"
            ) from error
        if not isinstance(fields, dict):
            raise UserError(
                f"{path} holds no settings by name; give the config.json of a run"
            )
        # What a run that was resumed tells of its past.
        fields.pop("changes", None)
        names = field_names(self.options)
        for name in fields:
            if name not in names:
                hint = nearest(name, names)
                raise UserError(f"{path}: {name} is not a setting{hint}")
        return fields

    def from_json(self, fields: Mapping[str, Any]) -> Config:
        """Returns the configuration that :func:`to_json` has made into fields.

        Raises:
            UserError: If a field is unknown or its value not of its type.
        """
        return parse_arguments(self.options, self.program, words_of(fields))

    def _fields_of_file(
        self, path: Path, config: Any, argv: Sequence[str]
    ) -> tuple[dict[str, Any], Any]:
        """Returns a file's settings, but for those of its run, and all of them."""
        saved = self.read_file(path)
        # Once without flags: what is wrong then is wrong in the file.
        try:
            of_file: Any = self.from_json(saved)
            self.check(of_file, frozenset())
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        ignored, given = set(_OF_ONE_RUN), given_flags(argv)
        if "optimizer" in given and config.optimizer != of_file.optimizer:
            ignored |= _OF_ONE_METHOD
        if given & self.either:
            ignored |= self.either
        return {k: v for k, v in saved.items() if k not in ignored}, of_file

    def _implied(self, config: Any) -> set[str]:
        """Returns the fields that have the values which the others alone imply.

        The run that wrote the file was not given them, as far as one can tell. A new
        run, with flags of its own, is not given them either: a warm-up follows --steps.
        """

        def found(names: set[str]) -> set[str]:
            silent = dataclasses.replace(config, **dict.fromkeys(names))
            values = self.implied(silent)
            return {k for k in names & set(values) if values[k] == getattr(config, k)}

        names = {k for k, v in vars(self.options()).items() if v is None}
        names = {k for k in names if found({k})}
        # One of them may be what implies another.
        while (fewer := found(names)) != names:
            names = fewer
        return names


def to_json(config: Any) -> dict[str, Any]:
    """Returns the fields of a configuration as values that JSON knows."""
    fields = dataclasses.asdict(config)
    for name in ("config", *PROCESS_FIELDS):
        del fields[name]
    return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}
