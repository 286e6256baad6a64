"""``pfm doctor`` says what the machine has, what it lacks, and the way out; it never shows a key."""

import json
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from pfm.cli import app
from pfm.cli.doctor import usable_cores

SECRET = "sk-neverShowThis"


def run(*options, **environment):
    return CliRunner().invoke(app, ["doctor", *options], env={"PFM_DEVICE": "cpu", **environment})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PFM_CACHE", str(tmp_path))
    return tmp_path


def by_name(result):
    findings = {}
    for finding in json.loads(result.stdout)["findings"]:
        findings.setdefault(finding["name"], []).append(finding)
    return findings


def test_every_line_has_a_state_and_keys_stay_hidden(cache):
    result = run("--json", OPENAI_API_KEY=SECRET)
    found = by_name(result)
    assert {"python", "packages", "extras", "device", "encoder", "cache", "api"} <= set(found)
    assert SECRET not in result.output
    assert found["api"][0] == {"name": "api", "state": "ok", "detail": "OPENAI_API_KEY is set", "remedy": ""}
    assert "torch " in found["packages"][0]["detail"]
    assert result.exit_code == (2 if any(f["state"] == "failed" for each in found.values() for f in each) else 0)


def test_what_fails_comes_with_a_way_out(cache):
    result = run(PFM_DEVICE="cuda:77")
    assert result.exit_code == 2
    assert "✗ device" in result.stdout
    assert "unset PFM_DEVICE" in result.stdout


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_found(tmp_path):
    tmp_path.chmod(0o500)
    result = run("--json", PFM_CACHE=str(tmp_path))
    assert by_name(result)["cache"][0]["state"] == "failed"


def test_a_cache_folder_that_is_a_file_is_a_finding(tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    result = run("--json", PFM_CACHE=str(place))
    assert by_name(result)["cache"][0]["state"] == "failed"


def test_a_folder_without_a_flow_is_a_finding(cache, tmp_path):
    result = run(str(tmp_path / "nothing"), "--json")
    assert result.exit_code == 2
    assert by_name(result)["flow"][0]["state"] == "failed"


def test_addresses_are_asked_and_passwords_not_shown(cache):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    here = f"http://127.0.0.1:{server.server_port}"
    result = run("--json", "--network", HF_ENDPOINT=here, OPENAI_BASE_URL=nobody.replace("//", "//user:secret@"))
    server.shutdown()
    found = by_name(result)
    assert found["hub"][-1]["detail"] == f"{here} answers"
    assert found["api"][-1]["state"] == "failed"
    assert nobody in found["api"][-1]["detail"]
    assert "secret" not in result.output


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "broken"}, None),
        ({}, None),
    ],
)
def test_a_containers_quota_limits_the_cores(tmp_path, monkeypatch, files, share):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == (share or 8.0)


def test_more_threads_than_cores_is_a_finding(cache, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    found = by_name(run("--json"))["device"]
    assert [own for own in found if own["remedy"] == "export OMP_NUM_THREADS=1 before Python starts"]
