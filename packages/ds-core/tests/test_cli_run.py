"""``ds run``: processes, their environment, their exit code and their errors."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import click
import pytest
from click.testing import CliRunner
from ds_core._env import inherited_omp_num_threads, omp_num_threads, read_launch
from ds_core.cli import main
from ds_core.cli.run import Nodes, Placement, launch_config, read_nodes

COMMAND = [sys.executable, "-c", "from ds_core.cli import main; main(prog_name='ds')", "run"]

TELL = """
    import json, os, sys
    from ds_core._env import read_launch
    told = {**read_launch()._asdict(), "threads": os.environ.get("OMP_NUM_THREADS"), "args": sys.argv[1:]}
    sys.stdout.write(json.dumps(told) + "\\n")
"""


@pytest.fixture
def ds_run(tmp_path):
    def call(source, *options, args=(), threads="1", module=False):
        (tmp_path / "script.py").write_text(textwrap.dedent(source))
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
        environment["TMPDIR"] = str(tmp_path)
        if threads:
            environment["OMP_NUM_THREADS"] = threads
        target = ["-m", "script"] if module else [str(tmp_path / "script.py")]
        return subprocess.run(
            [*COMMAND, *options, *target, *args], env=environment, capture_output=True, text=True, check=False
        )

    return call


def told(result):
    assert result.returncode == 0, result.stderr
    return sorted(map(json.loads, result.stdout.splitlines()), key=lambda each: each["rank"])


@pytest.mark.rung_c
def test_each_process_learns_its_place_and_its_arguments(ds_run, tmp_path):
    result = ds_run(TELL, "--nproc", "2", args=["--lr", "0.1", "--nproc", "7"], threads=None)
    rows = told(result)
    assert [row["rank"] for row in rows] == [row["local_rank"] for row in rows] == [0, 1]
    assert {row["world_size"] for row in rows} == {2}
    assert {(row["master_addr"], row["master_port"]) for row in rows} == {("127.0.0.1", rows[0]["master_port"])}
    assert all(row["args"] == ["--lr", "0.1", "--nproc", "7"] for row in rows)
    cores = len(os.sched_getaffinity(0))
    assert {row["threads"] for row in rows} == {str(max(1, cores // 2))}
    assert "OMP_NUM_THREADS is not set: using" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


@pytest.mark.rung_c
def test_a_module_runs_and_threads_that_are_set_are_kept(ds_run):
    result = ds_run(TELL, threads="3", module=True)
    assert told(result)[0]["threads"] == "3"
    assert "OMP_NUM_THREADS" not in result.stderr


@pytest.mark.rung_c
def test_a_workers_error_is_shown_and_its_exit_code_forwarded(ds_run):
    source = """
        import os, signal
        if os.environ["RANK"] == "1":
            raise LookupError("no such thing on rank one")
        signal.pause()
    """
    result = ds_run(source, "--nproc", "2")
    assert result.returncode == 1
    assert "LookupError: no such thing on rank one" in result.stderr
    assert "Traceback (most recent call last)" in result.stderr
    assert "exited with code 1; what it wrote stands above" in result.stderr
    assert "rank 1 (process" in result.stderr


@pytest.mark.rung_c
@pytest.mark.parametrize(
    ("source", "code", "how"),
    [
        ("import sys; sys.exit(7)", 7, "exited with code 7"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", 128 + signal.SIGKILL, "was killed by SIGKILL"),
    ],
)
def test_exit_codes_are_forwarded(ds_run, source, code, how):
    result = ds_run(source)
    assert result.returncode == code
    assert how in result.stderr


@pytest.mark.rung_c
def test_failed_workers_are_restarted(ds_run):
    source = """
        import os, sys
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            sys.exit(3)
        sys.stdout.write("second life\\n")
    """
    result = ds_run(source, "--max-restarts", "1")
    assert (result.returncode, result.stdout) == (0, "second life\n")


def test_a_missing_script_is_named():
    result = CliRunner().invoke(main, ["run", "no_such_script.py"])
    assert result.exit_code == 1
    assert "there is no file 'no_such_script.py'; to run a module, write: ds run -m" in result.stderr


@pytest.mark.parametrize(("text", "nodes"), [("1", Nodes(1, 1)), ("4", Nodes(4, 4)), ("2:8", Nodes(2, 8))])
def test_numbers_of_machines(text, nodes):
    option = click.Option(["--nnodes"])
    assert read_nodes(click.Context(main), option, text) == nodes


@pytest.mark.parametrize("text", ["0", "3:2", "x", "1:", ":2", "-1"])
def test_bad_numbers_of_machines(text):
    result = CliRunner().invoke(main, ["run", f"--nnodes={text}", "script.py"])
    if text == "1:":
        # The end may be left out: then it is the start.
        assert "there is no file" in result.stderr
    else:
        assert result.exit_code == 2
        assert f"'{text}' is neither a number of machines nor LEAST:MOST" in result.stderr


def placement(**changed):
    base = Placement(nproc=2, nnodes=Nodes(1, 1), node_rank=0, master_addr="host", master_port=None, max_restarts=0)
    return {**base, **changed}


def test_one_machine_meets_itself_at_a_free_port(tmp_path):
    first, second = (launch_config(placement(), str(tmp_path)) for _ in range(2))
    assert (first.rdzv_backend, first.rdzv_endpoint) == ("c10d", "127.0.0.1:0")
    assert first.run_id != second.run_id
    assert launch_config(placement(master_port=777), str(tmp_path)).rdzv_endpoint == "127.0.0.1:777"


def test_machines_are_ranked_by_the_user_where_their_number_is_fixed(tmp_path):
    config = launch_config(placement(nnodes=Nodes(2, 2), node_rank=1, max_restarts=3), str(tmp_path))
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("static", "host:29500")
    assert config.rdzv_configs["rank"] == 1
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (2, 2, 2, 3)


def test_machines_may_come_and_go_within_a_range(tmp_path):
    config = launch_config(placement(nnodes=Nodes(1, 4), node_rank=0), str(tmp_path))
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "host:29500")
    assert config.rdzv_configs["is_host"] is True


# What a launched process reads #

LAUNCH = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(values):
        for name in LAUNCH:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_a_launch_is_read(environment):
    environment(LAUNCH)
    assert read_launch() == (3, 1, 4, "host", 29500)


def test_without_a_launch_there_is_none(environment):
    environment({"MASTER_PORT": "1"})
    assert read_launch() is None


@pytest.mark.parametrize("missing", LAUNCH)
def test_a_part_of_a_launch_is_an_error(environment, missing):
    environment({name: value for name, value in LAUNCH.items() if name != missing})
    with pytest.raises(ValueError, match=rf"{missing} is not; start the script with 'ds run'"):
        read_launch()


def test_a_number_that_is_none_is_an_error(environment):
    environment({**LAUNCH, "WORLD_SIZE": "four"})
    with pytest.raises(ValueError, match=r"WORLD_SIZE must be a whole number >= 0, got 'four'"):
        read_launch()


@pytest.mark.parametrize("before", [None, "5"])
def test_threads_are_set_for_a_while_only(monkeypatch, before):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if before:
        monkeypatch.setenv("OMP_NUM_THREADS", before)
    with inherited_omp_num_threads(3):
        assert omp_num_threads() == "3"
    assert omp_num_threads() == before


def test_help_lists_the_commands():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("run", "report", "config"))
