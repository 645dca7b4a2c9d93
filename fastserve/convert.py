"""`fastserve convert`: pickled weights become safetensors, which is what FastServe loads.

Rules: pickles are opened in a process of its own, which is all that a broken or hostile one can
take down. Must not know: torch, how the files are written.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from fastserve.config import ConfigError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def convert(directory: str, *, shard_bytes: int | None = None) -> int:
    """Convert the weights in a directory; returns the exit code."""
    model_dir = Path(directory).expanduser().resolve()
    if not model_dir.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    for name in WEIGHTS:
        if (model_dir / name).is_file():
            raise ConfigError(f"{directory}: {name} is there already; nothing to convert")
    console = Console(file=sys.stderr)
    names = run_apart(model_dir, shard_bytes, console)
    size = sum((model_dir / name).stat().st_size for name in names)
    console.print(f"wrote {size / 1e6:.1f} MB to {model_dir}: {', '.join(names)}", soft_wrap=True)
    return 0


def run_apart(model_dir: Path, shard_bytes: int | None, console: Console) -> list[str]:
    """Convert in another process, showing how far it is; returns the names of the files."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(model_dir, shard_bytes, sender), daemon=True)
    process.start()
    sender.close()  # the child's is the last one, so that its end is the end of the messages
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=None)
            while True:
                try:
                    kind, content = receiver.recv()
                except EOFError:
                    break
                if kind == "failed":
                    raise ConfigError(content)
                if kind == "written":
                    names: list[str] = content
                    return names
                progress.update(task, completed=content[0], total=content[1])
    finally:
        receiver.close()
        process.join()
    raise ConfigError(f"{model_dir}: the conversion died (exit code {process.exitcode})")


def work(model_dir: Path, shard_bytes: int | None, sender: Connection) -> None:
    """Convert, and report in messages; runs in the other process."""
    from fastserve.model.pickled import SHARD_BYTES, convert_pickles  # torch stays in there

    def on_progress(written: int, total: int) -> None:
        sender.send(("progress", (written, total)))

    try:
        names = convert_pickles(model_dir, on_progress, shard_bytes or SHARD_BYTES)
    except (ConfigError, OSError) as error:
        sender.send(("failed", str(error)))
    except KeyboardInterrupt:  # the process that waits was interrupted too, and will tell
        sys.exit(1)
    else:
        sender.send(("written", names))
