"""`fastserve convert`: pickled weights become safetensors, which is what FastServe loads.

Rules: pickles are opened in a process of its own, whose memory goes with it and which alone a
broken one crashes. It is this user's like any other and no wall against a hostile one: that is
`weights_only` (model/pickled.py). What the process says is JSON, read against a schema.
Must not know: torch, how the files are written.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import msgspec
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

from fastserve.checkpoint.kinds import describe_file, did_you_mean
from fastserve.host.terminal import make_bar, say
from fastserve.settings.option import ConfigError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
MAX_MESSAGE_BYTES = 2**20

FileName = Annotated[str, msgspec.Meta(pattern=r"^\w[\w.-]*$")]


class Advanced(msgspec.Struct, tag="advanced", frozen=True, forbid_unknown_fields=True):
    """So many bytes are written."""

    written: int
    total: int


class Refused(msgspec.Struct, tag="refused", frozen=True, forbid_unknown_fields=True):
    """The weights cannot be converted."""

    reason: str


class Finished(msgspec.Struct, tag="finished", frozen=True, forbid_unknown_fields=True):
    """The names of the files that were written."""

    names: list[FileName]


Message = Advanced | Refused | Finished


def convert(directory: str, *, shard_bytes: int | None = None) -> int:
    """Convert the weights in a directory; returns the exit code."""
    model_dir = Path(os.path.expanduser(directory)).resolve()
    if model_dir.is_file():
        raise ConfigError(f"{directory}: {describe_file(model_dir)}")
    if not model_dir.is_dir():
        raise ConfigError(f"{directory}: no such directory{did_you_mean(Path(directory))}")
    for name in WEIGHTS:
        if (model_dir / name).is_file():
            raise ConfigError(f"{directory}: {name} is there already; nothing to convert")
    names = run_apart(model_dir, shard_bytes)
    size = sum((model_dir / name).stat().st_size for name in names)
    say(f"wrote {size / 1e6:.1f} MB to {model_dir}: {', '.join(names)}")
    return 0


def run_apart(model_dir: Path, shard_bytes: int | None) -> list[str]:
    """Convert in another process, showing how far it is; returns the names of the files."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(model_dir, shard_bytes, sender), daemon=True)
    process.start()
    sender.close()  # the child's is the last one, so that its end is the end of the messages
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with make_bar(*columns) as progress:
            task = progress.add_task("", total=None)

            def on_progress(written: int, total: int) -> None:
                progress.update(task, completed=written, total=total)

            return follow(receiver, on_progress)
    except EOFError:
        pass
    finally:
        receiver.close()
        process.join()
    raise ConfigError(f"{model_dir}: the conversion died (exit code {process.exitcode})")


def follow(receiver: Connection, on_progress: Callable[[int, int], None]) -> list[str]:
    """Read messages up to the last one; returns the names of the files.

    Raises ConfigError when the weights were refused or something else than a message comes, and
    EOFError when nothing more does.
    """
    decoder = msgspec.json.Decoder(Message)
    while True:
        try:
            message: Message = decoder.decode(receiver.recv_bytes(MAX_MESSAGE_BYTES))
        except (msgspec.DecodeError, OSError) as error:
            raise ConfigError(f"the conversion said what cannot be read: {error}") from error
        if isinstance(message, Refused):
            raise ConfigError(message.reason)
        if isinstance(message, Finished):
            return message.names
        on_progress(message.written, message.total)


def work(model_dir: Path, shard_bytes: int | None, sender: Connection) -> None:
    """Convert, and report in messages; runs in the other process."""
    from fastserve.model.pickled import SHARD_BYTES, convert_pickles  # torch stays in there

    def send(message: Message) -> None:
        sender.send_bytes(msgspec.json.encode(message))

    try:
        names = convert_pickles(
            model_dir, lambda *done: send(Advanced(*done)), shard_bytes or SHARD_BYTES
        )
    except (ConfigError, OSError) as error:
        send(Refused(str(error)))
    except KeyboardInterrupt:  # the process that waits was interrupted too, and will tell
        sys.exit(1)
    else:
        send(Finished(names))
