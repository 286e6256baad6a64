"""Feedback becomes rows that a fit reads: what is taken, what is refused, and what trouble leaves behind."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from support.chat_server import ChatServer, running
from support.proxy import fitted, post

import pfm
from pfm._internal.files import FileInUseError
from pfm.serve import ServeConfig, create_app
from pfm.serve.errors import Refused
from pfm.serve.feedback import FeedbackFile, read_feedback

ENCODER = pfm.encoders.SurfaceEncoder()
CONFIG = ServeConfig(text_characters=1000)
MESSAGES = [{"role": "user", "content": "Tea?", "name": "ann"}]
LIKED = {"messages": MESSAGES, "completion": "Green tea.", "label": True}
PAIR = {"prompt": "Tea?", "chosen": "Green tea.", "rejected": "no"}


@pytest.fixture(scope="module")
def refiner() -> pfm.Refiner:
    return pfm.wrap(None, fitted(), encoder=ENCODER, n=4)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(body: Any) -> dict[str, Any]:
    return read_feedback(body if isinstance(body, bytes) else json.dumps(body).encode(), CONFIG)


# ---------------------------------------------------------------------------------------------------- what is taken


def test_rows_have_the_columns_of_a_fit():
    messages = [{"role": "user", "content": "Tea?"}]  # what a message holds beyond role and content is not kept
    assert read(LIKED) == {"prompt": messages, "completion": "Green tea.", "label": True}
    assert read(PAIR | {"group": "ann"}) == {**PAIR, "group": "ann"}
    assert read({**LIKED, "chosen": None, "group": None})["label"] is True


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"\xff", "must be a JSON object"),
        ([PAIR], "must be a JSON object"),
        ({}, "prompt or messages must be given"),
        (PAIR | {"messages": MESSAGES}, "and not both"),
        ({"prompt": "Tea?"}, "completion or chosen and rejected must be given"),
        (PAIR | LIKED, "and not both"),
        ({"prompt": "Tea?", **{k: LIKED[k] for k in ("completion", "label")}, "chosen": "x"}, "must be given"),
        ({**LIKED, "label": "up"}, "label must be true (liked) or false, got 'up'"),
        ({**LIKED, "label": 1}, "label must be true"),
        ({**LIKED, "completion": " "}, "completion must be a text that is not empty"),
        ({**LIKED, "completion": "\ud800"}, "completion must be a text"),
        ({**LIKED, "messages": []}, "messages must be a list of messages"),
        ({**LIKED, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages must be"),
        ({**LIKED, "messages": [{"role": "user", "content": "\udfff"}]}, "messages must hold texts"),
        ({**PAIR, "rejected": None}, "rejected must be a text"),
        ({**PAIR, "rejected": "Green tea. "}, "rejected must be another text than chosen"),
        ({**PAIR, "label": True}, "label belongs to completion"),
        ({**PAIR, "api_key": "sk-1"}, "'api_key' is unknown; known are prompt"),
        ({**PAIR, "group": 5}, "group must be a text"),
        ({**PAIR, "group": "x" * 257}, "at most 256"),
    ],
)  # fmt: skip
def test_a_wrong_body_is_refused_with_the_field(body, told):
    with pytest.raises(Refused) as found:
        read(body)
    assert found.value.status == 400
    assert told in found.value.message
    assert "sk-1" not in found.value.message


@pytest.mark.parametrize("name", ["chosen", "rejected", "prompt"])
def test_long_texts_are_refused(name):
    with pytest.raises(Refused) as found:
        read(PAIR | {name: "é" * 1001})
    assert (found.value.status, found.value.param) == (413, name)


# --------------------------------------------------------------------------------------------------------- the file


def test_every_line_is_whole_whoever_writes(tmp_path):
    path = tmp_path / "new" / "feedback.jsonl"
    file = FeedbackFile(path, 10**6)
    rows = [{"prompt": f"Question {number}?", "chosen": "é\u2028" * 200, "rejected": "no"} for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(file.add, rows))
    found = lines(path)
    assert sorted(row["prompt"] for row in found) == sorted(row["prompt"] for row in rows)
    assert all(set(row) == {"feedback", "prompt", "chosen", "rejected"} for row in found)
    assert path.stat().st_mode & 0o077 == 0  # texts of people: for the owner alone
    with pytest.raises(FileInUseError, match="is being written by"):
        FeedbackFile(path, 10**6)
    file.close()
    FeedbackFile(path, 10**6).close()
    assert lines(path) == found


def test_a_moved_file_begins_anew_and_a_full_one_loses_nothing(tmp_path):
    path = tmp_path / "feedback.jsonl"
    file = FeedbackFile(path, 300)
    file.add(PAIR)
    file.add(PAIR)
    before = path.read_bytes()
    with pytest.raises(Refused, match="is full") as found:
        file.add(PAIR | {"chosen": "x" * 200})
    assert found.value.status == 507
    assert path.read_bytes() == before
    path.rename(tmp_path / "old.jsonl")
    file.add(PAIR)
    assert len(lines(path)) == 1
    assert (tmp_path / "old.jsonl").read_bytes() == before


def test_a_write_that_fails_half_way_is_taken_back(tmp_path, monkeypatch):
    file = FeedbackFile(tmp_path / "feedback.jsonl", 10**6)
    file.add(PAIR)
    before = file.path.read_bytes()
    whole = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: whole(descriptor, line[:10]))
    with pytest.raises(Refused, match="could not be kept"):
        file.add(PAIR)
    monkeypatch.undo()
    assert file.path.read_bytes() == before
    file.path.unlink()
    file.path.mkdir()
    with pytest.raises(Refused, match="could not be kept"):
        file.add(PAIR)


@pytest.mark.parametrize("cut", [0, 1, 12, 60, -1])
def test_half_a_line_of_a_crash_is_cut_off(cut, tmp_path):
    path = tmp_path / "feedback.jsonl"
    file = FeedbackFile(path, 10**6)
    file.add(PAIR)
    one = path.read_bytes()
    file.close()
    path.write_bytes(one + one[:cut])
    file = FeedbackFile(path, 10**6)
    assert path.read_bytes() == one
    file.add(PAIR)
    assert len(lines(path)) == 2


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes")
    for place, told in ((path, "holds other text"), (tmp_path, "regular file")):
        with pytest.raises(ValueError, match=told):
            FeedbackFile(place, 10**6)
    assert path.read_text() == "my notes"
    path.unlink()
    FeedbackFile(path, 10**6).close()  # a refusal holds no lock


def test_the_proxys_keys_are_written_nowhere(tmp_path):
    file = FeedbackFile(tmp_path / "feedback.jsonl", 10**6, ["sk-proxy-0123456789abcdef", None])
    file.add(PAIR | {"chosen": "It is sk-proxy-0123456789abcdef."})
    assert "sk-proxy" not in file.path.read_text()
    assert lines(file.path)[0]["rejected"] == "no"


# ------------------------------------------------------------------------------------------------------- the server


def test_what_is_posted_can_be_fitted(refiner, tmp_path, monkeypatch):
    monkeypatch.setenv("PROXY_TOKEN", "token-of-the-proxy")
    path = tmp_path / "feedback.jsonl"
    config = ServeConfig(feedback=path, token_env="PROXY_TOKEN", feedback_bytes=100_000)
    with running(create_app(refiner, config)) as url:
        key = {"authorization": "Bearer token-of-the-proxy"}
        assert post(url, PAIR, "/feedback").status_code == 401
        assert not path.read_text()
        for number in range(8):
            prompt = {"prompt": f"Question {number}?"}
            answer = post(url, PAIR | prompt, "/feedback", **key)
            assert (answer.status_code, answer.json()) == (201, {"object": "feedback", "kind": "pair"})
            for label, kind in ((True, "liked"), (False, "disliked")):
                body = {**prompt, "completion": f"Answer {label} {number}", "label": label}
                assert post(url, body, "/feedback", **key).json()["kind"] == kind
        refused = post(url, {**PAIR, "label": 3}, "/feedback", **key)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "label")
        with httpx2.Client(headers=key) as asking:
            assert 'pfm_feedback_total{kind="pair"} 8.0' in asking.get(url.replace("/v1", "/metrics")).text
            assert asking.get(url.replace("/v1", "/chat")).status_code == 404  # there is nobody to chat with
        with pytest.raises(FileInUseError):
            create_app(refiner, config)
    assert len(lines(path)) == 24
    assert "token" not in path.read_text()
    pairs = pfm.PreferencePairs.from_jsonl(path)
    assert len(pairs) == 16  # of each prompt one given, and one of a liked and a disliked answer
    assert sum(chosen.startswith("Answer True") for chosen in pairs.chosen) == 8


def test_without_the_setting_the_path_is_the_upstreams(refiner):
    with running(create_app(refiner, ServeConfig())) as url:
        assert post(url, PAIR, "/feedback").status_code == 404


def test_the_chat_page_allows_no_script_but_its_own(refiner, tmp_path):
    chat = ChatServer()
    with running(chat.app) as upstream:
        config = ServeConfig(upstream=upstream, feedback=tmp_path / "feedback.jsonl")
        with running(create_app(refiner, config)) as url, httpx2.Client() as asking:
            page = asking.get(url.replace("/v1", "/chat"))
            assert page.status_code == 200
            policy = page.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "innerHTML" not in page.text
            foreign = post(url, PAIR, "/feedback", origin="https://evil.example")
            assert foreign.status_code == 403
    assert not (tmp_path / "feedback.jsonl").read_text()


@pytest.mark.parametrize("wrong", [5, "", True])
def test_the_setting_must_be_a_path(wrong):
    with pytest.raises(TypeError, match="feedback must be the path of a file"):
        ServeConfig(feedback=wrong)
