"""The command line: verbs, flags, files of flags, and what it says when something is wrong."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from fastserve import __version__, cli
from fastserve.bench.config import SchedulerBenchConfig
from fastserve.settings.command_line import Settings
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.settings.server import ServerConfig
from fastserve.verbs.config import TopConfig

VERBS = (
    "serve", "generate", "chat", "profile", "top", "convert", "bench", "help", "version"
)  # fmt: skip


def settings(*argv):
    """Parse a command line."""
    return Settings(cli.build_parser().parse_args(argv))


def complaint(capsys, *argv):
    """Run a command line that must be refused and return what it says."""
    code: object
    try:
        code = cli.main(argv)
    except SystemExit as error:  # argparse leaves this way
        code = error.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    *announced, text = said.err.splitlines()
    assert all(": loading " in line for line in announced)
    assert text.startswith("fastserve: error: ")
    assert len(text) < 300
    return text


def test_help_names_every_verb(capsys):
    """`--help` is where a newcomer starts."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"\n    {verb} " in text for verb in VERBS)


@pytest.mark.parametrize("verb", [*VERBS, "bench scheduler", "bench offline", "bench serve"])
def test_every_verb_has_help(capsys, verb):
    """Help of a verb renders, percent signs and all."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb.split(), "--help"])
    assert ended.value.code == 0
    assert "usage: fastserve" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["", "serve", "bench serve"])
def test_help_is_a_verb_too(capsys, verb):
    """`help VERB` is `VERB --help`."""
    said = []
    for argv in (["help", *verb.split()], [*verb.split(), "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        assert ended.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("serv", "invalid choice 'serv'; did you mean serve? (see fastserve --help)"),
        ("help genrate", "did you mean generate?"),
        ("bench ofline", "did you mean offline? (see fastserve bench --help)"),
        ("serve --prot 1", "--prot; did you mean --port? (see fastserve serve --help)"),
        ("serve --max-num=4", "--max-num; did you mean --max-num-seqs?"),
        ("top --intreval 1", "did you mean --interval?"),
        ("serve --scheduling-policy fcsf", "did you mean fcfs?"),
        ("--verison", "did you mean --version?"),
        ("--port 8000 serve", "--port; flags go after the verb"),
        ("serve a b", "unrecognized arguments: b"),
        ("serve a --model b", "--model: not allowed with argument MODEL"),
        ("zzz", "(one of: serve, generate,"),
    ],
)
def test_a_misspelt_word_gets_the_near_one(capsys, argv, words):
    """Verbs, flags and choices."""
    assert words in complaint(capsys, *argv.split())


def test_what_follows_an_unknown_flag_is_not_repeated(capsys):
    """It may be a key."""
    assert "s3cret" not in complaint(capsys, "serve", "--api-kye", "s3cret")
    assert "s3cret" not in complaint(capsys, "serve", "--api-kye=s3cret")


def test_no_verb_prints_help(capsys):
    """The bare command helps, and is an error to a script."""
    assert cli.main([]) == 2
    assert "serve a model" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--version", "version"])
def test_version(capsys, word):
    """`--version` names the program and its version; so does the verb."""
    with pytest.raises(SystemExit) as ended:
        cli.main([word])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fastserve {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["serve", "--max-num-seqs", "0"], "--max-num-seqs"),
        (["serve", "--max-num-seqs", "many"], "--max-num-seqs"),
        (["serve", "--max-num-seqs", "8", "--max-num-batched-tokens", "4"], "below --max-num-seqs"),
        (["serve", "--scheduling-policy", "lifo"], "skip-join-mlfq"),
        (["serve", "--swap-space", "-1"], "--swap-space: -1.0 is below"),
        (["serve", "--max-num", "4"], "unrecognized"),  # no guessing at abbreviations
        (["serve", "--port", "70000"], "--port"),
        (["serve", "--api-key", ""], "--api-key"),  # an unset variable in somebody's script
        (["serve", "--config", "/nonexistent.yaml"], "/nonexistent.yaml"),
        (["serve", "/no/such/model"], "/no/such/model"),
        (["generate"], "PROMPT"),
        (["generate", ""], "PROMPT: it is empty"),
        (["generate", "hello", "--model="], "--model: an empty value"),
        (["serve", ""], "--model: an empty value"),
        (["serve", "--served-model-name", ""], "--served-model-name: an empty value"),
        (["serve", "--api-key", "clé"], "printable ASCII"),
        (["serve", "--max-num-seqs", "1e3"], "--max-num-seqs: invalid int value"),
        (["serve", "--port", "-1"], "--port: -1 is below"),
        (["serve", "--seed", "9" * 20], "--seed: 99999999999999999999 does not fit 64 bits"),
        (["serve", "--num-threads", "9" * 10], "above the maximum"),
        (["serve", "--timeout-keep-alive", "0"], "--timeout-keep-alive: 0 is below"),
        (["serve", "~nobody/at/all"], "no such directory"),
        (["generate", "hello", "--temperature", "-1"], "--temperature"),
        (["bench"], "SUBJECT"),
        (["bench", "scheduler", "--running", "0"], "--running"),
        (["fly"], "fly"),
        (["top", "http://127.0.0.1:1", "--once"], "no server answers"),
    ],
)
def test_complaints_are_one_line_and_exit_2(capsys, argv, words):
    """Whatever is wrong with a command line, one line names it."""
    assert words in complaint(capsys, *argv)


def test_flags_reach_the_configs():
    """Each class gets its own fields, aliases and negations included."""
    given = settings(
        *("serve", "my/model", "--num-gpu-blocks-override", "99", "--no-enable-chunked-prefill"),
        *("--port", "0", "-tp", "1"),
    )
    config = given.build(EngineConfig)
    assert (config.model, config.num_device_blocks) == ("my/model", 99)
    assert config.enable_chunked_prefill is False
    assert given.build(ServerConfig).port == 0


def test_defaults_without_flags():
    """Absent flags leave the defaults of the classes."""
    given = settings("serve")
    assert given.build(EngineConfig) == EngineConfig()
    assert given.build(ServerConfig) == ServerConfig()


@pytest.mark.parametrize(
    "words",
    ["'once upon' --model dir", "once upon --model dir", "--model dir once upon",
     "once --model dir upon", "--model dir -- once upon"],
)  # fmt: skip
def test_generate_takes_words(words):
    """The prompt is all that is no flag; the model is one."""
    given = settings("generate", *shlex.split(words))
    assert " ".join(given.args.prompt) == "once upon"
    assert given.build(EngineConfig).model == "dir"


def test_a_model_may_be_a_flag():
    """Of the verbs that take it as a word too, and from both none is chosen."""
    assert settings("serve", "--model", "dir").build(EngineConfig).model == "dir"
    assert settings("top", "--url", "http://x").build(TopConfig).url == "http://x"


@pytest.mark.parametrize(
    "argv",
    [
        ("dir", "--api-key", "k1", "k2"),
        ("dir", "--api-key", "k1", "--api-key", "k2"),
        ("--api-key", "k1", "k2", "--", "dir"),
        ("--api-key", "k1", "k2", "--port", "1", "dir"),
        ("dir", '--api-key=["k1", "k2"]'),
    ],
)
def test_several_keys_are_keys(argv):
    """Each word after --api-key is a key, and none of them the model."""
    given = settings("serve", *argv)
    assert given.build(ServerConfig).api_key == ("k1", "k2")
    assert given.build(EngineConfig).model == "dir"


def test_a_second_key_is_no_model():
    """Without a MODEL the keys are keys all the same; so are names."""
    given = settings("serve", "--api-key", "k1", "k2", "--served-model-name", "a", "b")
    assert given.build(EngineConfig) == EngineConfig()
    assert given.build(ServerConfig).api_key == ("k1", "k2")
    assert given.build(ServerConfig).served_model_name == ("a", "b")


@pytest.mark.parametrize("word", ["org/model", "./dir", "demo", "/"])
@pytest.mark.parametrize("flag", ["--api-key", "--served-model-name"])
def test_a_model_is_no_key(capsys, flag, word):
    """A MODEL behind the keys would be one of them: refused, and no key is repeated."""
    said = complaint(capsys, "serve", flag, "s3cret", word)
    assert f"MODEL goes before it: MODEL {flag}" in said
    assert "s3cret" not in said


def test_config_file_and_flags(tmp_path):
    """Keys are flags or field names; a given flag wins over the file."""
    path = tmp_path / "serve.yaml"
    path.write_text(
        "model: my/model\nmax-num-seqs: 8\nstarvation_limit: 1\nport: 9000\n"
        "mlfq-quantum: 1e-3\nnum-gpu-blocks-override: 50\nenable_prefix_caching: false\n"
        "api-key: [k1, k2]\n"
        "served-model-name: mine\n"
    )
    given = settings("serve", "--config", str(path), "--max-num-seqs", "16")
    config = given.build(EngineConfig)
    assert config == EngineConfig(
        model="my/model",
        max_num_seqs=16,
        starvation_limit=1,
        mlfq_quantum=1e-3,
        num_device_blocks=50,
        enable_prefix_caching=False,
    )
    server_config = given.build(ServerConfig)
    assert (server_config.port, server_config.api_key) == (9000, ("k1", "k2"))
    assert server_config.served_model_name == ("mine",)


def test_an_empty_config_file_changes_nothing(tmp_path):
    """A file of comments is a file of defaults."""
    path = tmp_path / "serve.yaml"
    path.write_text("# nothing yet\n")
    assert settings("serve", "--config", str(path)).build(EngineConfig) == EngineConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "# one\nmax-seqs: 8",
            "serve.yaml:2: unknown option 'max-seqs'; did you mean max-num-seqs?",
        ),
        ("model: x\nmodel: y", "serve.yaml:2: 'model' is given twice"),
        ("model: x\n\tport: 1", "serve.yaml:2: found character"),
        ("port: 1\nmodel: 'x", "serve.yaml:2: found unexpected end of stream"),
        ("a: b: c", "serve.yaml:1: mapping values are not allowed here"),
        ("model: !!python/name:os.system", "serve.yaml:1: could not determine a constructor"),
        ("[" * 5000, "serve.yaml"),
        ("model: \x01", "serve.yaml"),
        ("max-num-seqs: 8\nmax_num_seqs: 9", "given twice"),
        ("max-num-seqs: many", "max_num_seqs must be int"),
        ("enable-prefix-caching: 1", "enable_prefix_caching must be bool"),
        ("max-num-seqs: true", "max_num_seqs must be int"),
        ("max-num-seqs: 0", "below the minimum"),
        ("- model", "a mapping of options"),
        ("model: [", "serve.yaml"),
    ],
)
def test_config_file_complaints(tmp_path, capsys, text, words):
    """A file that cannot be honoured is refused in one line that names it or its flag."""
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    assert words in complaint(capsys, "serve", "--config", str(path))


def test_config_file_that_is_not_text(tmp_path):
    """Bytes that are no UTF-8 are a complaint, not a traceback."""
    path = tmp_path / "serve.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"serve\.yaml"):
        settings("serve", "--config", str(path))


def test_bench_scheduler_writes_what_it_measures(tmp_path):
    """A small run in a fresh process: a table for people, JSON with provenance for machines."""
    output = tmp_path / "results" / "scheduler.json"
    argv = ["--waiting", "20", "--running", "4", "--steps", "20", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "fastserve", "bench", "scheduler", *argv],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "median" in done.stdout
    result = json.loads(output.read_text())
    assert result["command"].startswith("fastserve bench scheduler --waiting 20")
    assert result["machine"]["cores"] >= 1
    assert {(row["waiting"], row["running"]) for row in result["rows"]} == {
        (waiting, running) for waiting in (0, 2, 20) for running in (1, 4)
    }
    assert all(0 < row["median_ms"] <= row["p95_ms"] <= row["max_ms"] for row in result["rows"])


def test_bench_scheduler_runs_every_policy():
    """The policy asked for is the policy measured, and settings are checked first."""
    assert settings("bench", "scheduler").build(SchedulerBenchConfig) == SchedulerBenchConfig()
    chosen = settings("bench", "scheduler", "--scheduling-policy", "fcfs")
    assert chosen.build(SchedulerBenchConfig).scheduling_policy == "fcfs"


def test_a_closed_pipe_is_no_traceback():
    """`fastserve bench scheduler | true` and the like end quietly."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastserve", "bench", "scheduler", "--waiting", "0",
         "--running", "1", "--steps", "10"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(60)
