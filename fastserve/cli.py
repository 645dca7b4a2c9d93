"""The `fastserve` command: finds the verb, resolves its settings, hands over.

Rules: settings come from config classes, only what a verb is about (a prompt, a directory, the
experiments to reproduce) is declared here; a verb imports what it needs only when it runs, so that
`--help` and `bench scheduler` load no torch; what cannot be honoured is one line on stderr and exit
code 2. Must not know: how anything is done.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve import __version__
from fastserve.bench.config import OfflineBenchConfig, SchedulerBenchConfig
from fastserve.bench.serve_config import ServeBenchConfig
from fastserve.host.streams import (
    EXIT_INTERRUPTED,
    abandon_output,
    as_text,
    give_up,
    interrupts_end_at_once,
    prepare_streams,
    require_working_directory,
    write_stderr,
)
from fastserve.settings.command_line import Settings, add_arguments
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.settings.server import ServerConfig
from fastserve.sim.config import SimulateConfig
from fastserve.verbs.config import TextConfig, TopConfig
from fastserve.verbs.parser import EXIT_USAGE, Parser

if TYPE_CHECKING:
    from fastserve.llm import LLM
    from fastserve.offline.sampling_params import SamplingParams


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    prepare_streams()
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return fail(error)
    except KeyboardInterrupt:
        give_up()
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # there is no reader left to tell
        abandon_output()
        return 1
    except MemoryError as error:
        return fail(f"out of memory: {error}", 1)
    except OSError as error:  # of this machine: a full disk, a directory that may not be written
        reason = error.strerror or str(error) or type(error).__name__
        return fail(f"{error.filename}: {reason}" if error.filename else reason, 1)


def run(words: list[str]) -> int:
    """Find the verb and run it."""
    match words:
        case ["help", *names]:
            words = [*names, "--help"]
        case ["version"]:
            words = ["--version"]
    parser = build_parser()
    args = parser.parse_args(words)
    if "run" not in args:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    require_working_directory()
    verb: Callable[[Settings], int] = args.run
    return verb(Settings(args))


def fail(error: Exception | str, code: int = EXIT_USAGE) -> int:
    """Print an error as one line and return its exit code."""
    write_stderr(f"fastserve: error: {' '.join(str(error).split())}")
    return code


def build_parser() -> Parser:
    """Declare the verbs."""
    parser = Parser(
        prog="fastserve",
        description="LLM serving with token-level preemption: short requests never wait "
        "behind long ones.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastserve {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    add_verb(verbs, "serve", serve, "serve a model over HTTP (OpenAI's API)", ServerConfig)

    verb = add_verb(
        verbs, "generate", generate, "print a model's answer", TextConfig, operand="PROMPT"
    )
    verb.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="+",
        help="text to continue, of one word or several; -: read it from standard input",
    )
    verb.takes_words = "prompt"

    verb = add_verb(verbs, "chat", chat, "talk to a model in the terminal", TextConfig)
    verb.add_argument("--system", metavar="TEXT", help="system message of the conversation")

    verb = add_verb(verbs, "profile", profile, "measure the step times of a model")
    verb.add_argument("--output", metavar="FILE", help="file to write the profile to")

    verb = new_verb(verbs, "top", top, "watch a server: queues, KV blocks, tokens per second")
    add_arguments(verb, TopConfig)

    verb = new_verb(verbs, "simulate", simulate, "run a trace through a policy in virtual time")
    verb.usage = "%(prog)s [FLAGS]"
    add_arguments(verb, SimulateConfig, has_positional=False, only=SimulateConfig.flags())

    verb = new_verb(verbs, "replay", replay, "check that a server's journal gives the same plans")
    verb.add_argument("journal", metavar="JOURNAL", help="file written by `serve --journal FILE`")

    verb = new_verb(verbs, "convert", convert, "turn a checkpoint's .bin files into safetensors")
    verb.add_argument("directory", metavar="DIR", help="directory of the checkpoint")

    verb = new_verb(verbs, "reproduce", reproduce, "run the paper's experiments in virtual time")
    verb.add_argument("experiment", nargs="*", help="names; none: list them")
    verb.add_argument("--quick", action="store_true", help="few requests: check, do not measure")
    verb.add_argument("--traces", metavar="DIR", help="folder of length traces")
    verb.add_argument("--output", metavar="DIR", help="folder for results (results/)")
    verb.add_argument("--workers", metavar="N", type=int, default=2, help="processes (2)")

    add_bench_verbs(verbs)
    new_verb(verbs, "help", None, "say what a verb takes: fastserve help VERB")
    new_verb(verbs, "version", None, "say which version this is")
    return parser


def add_bench_verbs(verbs: Any) -> None:
    """Declare `bench` and its subjects."""
    verb = new_verb(verbs, "bench", None, "measure FastServe itself")
    subjects = verb.add_subparsers(title="subjects", metavar="SUBJECT", required=True)
    verb = new_verb(subjects, "scheduler", bench_scheduler, "cost of deciding one step")
    add_arguments(verb, SchedulerBenchConfig)
    verb = add_verb(
        subjects,
        "offline",
        bench_offline,
        "tokens a second without HTTP",
        OfflineBenchConfig,
        operand="--model DIR",
    )
    verb.description = (
        "Tokens a second of the engine in this process. Decode: tokens after the last request's "
        "first one over the time from then on, so without prefill (the column beside it and "
        "total_tokens_per_s: with it). Prefill: a prompt's length over its time to first token."
    )
    verb = new_verb(subjects, "serve", bench_serve, "latency and throughput of a live server")
    verb.usage = "%(prog)s [FLAGS]"
    add_arguments(verb, ServeBenchConfig)


def add_verb(
    verbs: Any,
    name: str,
    run: Callable[[Settings], int],
    text: str,
    *owners: type,
    operand: str = "[MODEL]",
) -> Parser:
    """Declare a verb that runs a model; `owners` are the settings it takes beside the engine's."""
    verb = new_verb(verbs, name, run, text)
    verb.usage = f"%(prog)s {operand} [FLAGS]"  # every flag in one line would be read by no user
    verb.add_argument("--config", metavar="FILE", help="YAML file of flags; given flags win")
    for owner in (*owners, EngineConfig):
        add_arguments(verb, owner, has_positional=operand == "[MODEL]")
    verb.set_defaults(owners=(EngineConfig, *owners))
    return verb


def new_verb(verbs: Any, name: str, run: Callable[[Settings], int] | None, text: str) -> Parser:
    """Declare a verb without flags."""
    verb: Parser = verbs.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    if run is not None:
        verb.set_defaults(run=run)
    return verb


def serve(settings: Settings) -> int:
    """Serve until stopped."""
    config, server_config = settings.build(EngineConfig), settings.build(ServerConfig)
    if server_config.log_level in ("debug", "info"):
        announce(config)
    with interrupts_end_at_once():
        from fastserve.launch import server

        return server.serve(config, server_config)


def announce(config: EngineConfig) -> None:
    """Say what is loaded, before what takes seconds begins."""
    print(f"FastServe {__version__}: loading {config.model} ...", file=sys.stderr, flush=True)


def load_llm(config: EngineConfig) -> LLM:
    """Load a model into this process."""
    announce(config)
    from fastserve.llm import LLM

    return LLM.from_config(config)


def sampling_params(llm: LLM, text: TextConfig) -> SamplingParams:
    """Return the model's own sampling with the given flags on top."""
    given = {name: value for name, value in dataclasses.asdict(text).items() if value is not None}
    own = llm.get_default_sampling_params()
    return dataclasses.replace(own, **{"max_tokens": None, **given})


def generate(settings: Settings) -> int:
    """Print one answer as it comes."""
    config, text = settings.build(EngineConfig), settings.build(TextConfig)
    words = settings.args.prompt
    prompt = as_text(sys.stdin.read() if words == ["-"] else " ".join(words), "PROMPT")
    if not prompt:
        raise ConfigError("PROMPT: it is empty, and there is nothing to continue")
    with load_llm(config) as llm:
        try:
            for delta in llm.stream(prompt, sampling_params(llm, text)):
                print(delta, end="", flush=True)
        except ValueError as error:
            return fail(error)
    print()
    return 0


def chat(settings: Settings) -> int:
    """Hold a conversation."""
    config, text = settings.build(EngineConfig), settings.build(TextConfig)
    from fastserve.verbs.chat import converse

    with load_llm(config) as llm:
        try:
            return converse(llm, sampling_params(llm, text), system=settings.args.system)
        except ValueError as error:
            return fail(error)


def profile(settings: Settings) -> int:
    """Measure step times."""
    config = settings.build(EngineConfig)
    announce(config)
    from fastserve.verbs.profile import profile_model

    return profile_model(config, settings.args.output)


def top(settings: Settings) -> int:
    """Watch a server."""
    config = settings.build(TopConfig)
    from fastserve.verbs.top import watch

    return watch(config)


def simulate(settings: Settings) -> int:
    """Run a trace in virtual time."""
    config = settings.build(SimulateConfig)
    from fastserve.verbs import simulate as verb

    return verb.simulate(config)


def replay(settings: Settings) -> int:
    """Replay a journal."""
    from fastserve.verbs import replay as verb

    return verb.replay(Path(settings.args.journal))


def convert(settings: Settings) -> int:
    """Convert pickled weights."""
    from fastserve.verbs import convert as verb

    return verb.convert(settings.args.directory)


def reproduce(settings: Settings) -> int:
    """Run experiments."""
    from fastserve.verbs import reproduce as verb

    args = settings.args
    return verb.reproduce(
        args.experiment,
        is_quick=args.quick,
        traces=args.traces,
        output=args.output,
        workers=args.workers,
    )


def bench_scheduler(settings: Settings) -> int:
    """Measure the scheduler."""
    config = settings.build(SchedulerBenchConfig)
    from fastserve.bench.scheduler import measure_scheduler

    return measure_scheduler(config)


def bench_offline(settings: Settings) -> int:
    """Measure the engine without HTTP."""
    bench, config = settings.build(OfflineBenchConfig), settings.build(EngineConfig)
    announce(config)
    from fastserve.bench.offline import measure_offline

    return measure_offline(bench, config)


def bench_serve(settings: Settings) -> int:
    """Measure a live server."""
    config = settings.build(ServeBenchConfig)
    from fastserve.bench.serve import measure_serving

    return measure_serving(config)
