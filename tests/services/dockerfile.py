"""A Dockerfile's instructions, read, and those that build carried out by the very commands of the file, without Docker.

What Docker would do in an image of its own happens in a folder: working directories are below it, and build arguments
tell the commands where to write. Only what the project's Dockerfile uses is read.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

_FLAG: Final = re.compile(r"--([a-z-]+)=(\S+)\s+")
_VARIABLE: Final = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


class Instruction(msgspec.Struct, frozen=True):
    """One instruction: its keyword, its flags, and the rest of it."""

    keyword: str
    flags: dict[str, str]
    value: str

    @property
    def words(self) -> list[str]:
        """Return the words of an exec form, or those that a shell would see."""
        return self.exec_form if self.value.startswith("[") else shlex.split(self.value)

    @property
    def exec_form(self) -> list[str]:
        """Return a command that no shell reads; raises where there is none."""
        return msgspec.json.decode(self.value, type=list[str])


class Stage(msgspec.Struct, frozen=True):
    """What stands from one FROM to the next."""

    image: str
    name: str | None
    instructions: list[Instruction]

    def all(self, keyword: str) -> list[Instruction]:
        """Return the instructions of a kind."""
        return [one for one in self.instructions if one.keyword == keyword]

    def last(self, keyword: str) -> Instruction:
        """Return the instruction that holds, of a kind of which the last one does."""
        return self.all(keyword)[-1]

    def environment(self, arguments: Mapping[str, str] | None = None, path: str = os.defpath) -> dict[str, str]:
        """Return the environment of what runs in the image; build arguments are written out, and no part of it."""
        arguments, environment = {**self.defaults, **(arguments or {})}, {"PATH": path}
        for one in self.all("ENV"):
            for word in one.words:
                name, value = assigned(word)
                environment[name] = expanded(value, {**arguments, **environment})
        return environment

    @property
    def defaults(self) -> dict[str, str]:
        """Return the build arguments as they are when nobody gives others."""
        return dict(assigned(one.value) for one in self.all("ARG"))


def stages(file: Path) -> list[Stage]:
    """Read a Dockerfile."""
    lines = [line for line in file.read_text("utf-8").splitlines() if line.strip() and not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", "")
    found: list[Stage] = []
    before: dict[str, str] = {}
    for line in text.splitlines():
        keyword, rest = line.split(maxsplit=1)
        flags = {}
        while flag := _FLAG.match(rest):
            flags[flag[1]], rest = flag[2], rest[flag.end() :]
        if keyword == "FROM":
            image, *name = re.split(r"\s+AS\s+", expanded(rest.strip(), before))
            found.append(Stage(image, name[0] if name else None, []))
        elif found:
            found[-1].instructions.append(Instruction(keyword, flags, rest.strip()))
        else:
            before.update([assigned(rest)])
    return found


def assigned(text: str) -> tuple[str, str]:
    """Return the two sides of an assignment."""
    name, _, value = text.partition("=")
    return name, value


def expanded(text: str, values: Mapping[str, str]) -> str:
    """Put values in place of their names, as Docker does; raises ``KeyError`` for one that is not there."""
    return _VARIABLE.sub(lambda found: values[found[1] or found[2]], text)


def build(stage: Stage, context: Path, folder: Path, arguments: Mapping[str, str], path: str) -> None:
    """Carry out a stage below a folder; raises ``CalledProcessError`` where a command fails."""
    directory = folder
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = {**inherited, "PATH": path}
    for one in stage.instructions:
        match one.keyword:
            case "ARG":
                name, default = assigned(one.value)
                environment[name] = arguments.get(name, default)
            case "ENV":
                environment.update(assigned(word) for word in one.words)
            case "WORKDIR":
                directory = folder / one.value.lstrip("/")
                directory.mkdir(parents=True, exist_ok=True)
            case "COPY":
                _copy(one.words, context, directory)
            case "RUN":
                command = one.exec_form if one.value.startswith("[") else ["/bin/sh", "-c", one.value]
                subprocess.run(command, cwd=directory, env=environment, check=True, stdout=subprocess.DEVNULL)
            case _:
                raise ValueError(one.keyword)


def _copy(words: list[str], context: Path, directory: Path) -> None:
    *sources, target = words
    for source in sources:
        if (context / source).is_dir():  # of a folder, what is in it
            shutil.copytree(
                context / source, directory / target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
            )
        else:
            shutil.copy(context / source, directory / target)
