"""``n="auto"`` in the proxy and on the command line: draws in waves, over real sockets."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import openai
import pytest
from support.chat_server import ChatServer, reply, running
from support.command_line import FAST, read_rows, run, write_pairs, write_rows
from support.proxy import ask, fitted, plain, post, proxy

import pfm
from pfm.refiner import Stopping

GRID = (np.arange(100) + 0.5) / 100
RULE = Stopping(8, 12, (2,), 0.03, 0.0, 3.0, tuple((2 * np.log(GRID / (1 - GRID))).tolist()))


@pytest.fixture(scope="module")
def flow() -> pfm.PreferenceFlow:
    return fitted()


@pytest.fixture(scope="module")
def chat() -> ChatServer:
    return ChatServer()


@pytest.fixture
def server(chat) -> ChatServer:
    chat.received.clear()
    return chat


@pytest.fixture(scope="module")
def upstream(chat):
    with running(chat.app) as url:
        yield url


def refiner(flow: pfm.PreferenceFlow, **options: Any) -> pfm.Refiner:
    return pfm.wrap(None, flow, encoder=pfm.encoders.SurfaceEncoder(), stopping=RULE, **options)


@pytest.fixture(scope="module")
def url(flow, upstream):
    with proxy(refiner(flow, n="auto"), upstream) as url:
        yield url


def asked(server: ChatServer) -> list[int]:
    return [body.get("n", 1) for body in server.bodies]


def test_a_request_is_drawn_in_waves_and_answered_by_the_best_of_them(server, url):
    counts = []
    for number in range(12):
        server.received.clear()
        answer = ask(url, messages=[{"role": "user", "content": f"Question {number}?"}])
        spent, b = answer.pfm["spent"], answer.pfm["probabilities"]
        assert answer.pfm["n"] == "auto"
        assert asked(server) == [2] * spent["waves"]
        assert spent["draws"] == len(b) == sum(asked(server))
        assert spent["ended"] in ("good enough", "cap")
        assert (spent["ended"] == "good enough") == (spent["expected_gain"] is not None and spent["draws"] < 12)
        assert answer.pfm["win_probability"]["chosen"] == max(b)
        assert answer.choices[0].message.content == answer.pfm["candidates"][int(np.argmax(b))]
        assert answer.usage.completion_tokens == 5 * spent["draws"]
        counts.append(spent["draws"])
    assert min(counts) < max(counts)


def test_a_request_sets_its_cap_and_its_price_in_body_or_headers(server, url):
    dear = ask(url, extra_body={"pfm": {"n": "auto", "max": 6, "spend": 1.0}})
    assert dear.pfm["spent"] == pytest.approx(dear.pfm["spent"] | {"draws": 2, "waves": 1, "max_n": 6, "price": 2.0})
    free = ask(url, extra_headers={"x-pfm-n": "AUTO", "x-pfm-max": "5", "x-pfm-spend": "0"})
    assert (free.pfm["spent"]["draws"], free.pfm["spent"]["ended"]) == (5, "cap")
    token = ask(url, extra_body={"pfm": {"spend": {"token": 0.2}}})  # five tokens a draw
    assert (token.pfm["spent"]["draws"], token.pfm["spent"]["price"]) == (2, pytest.approx(2.0))
    assert ask(url, extra_body={"pfm": {"n": 3}}).pfm["n"] == 3


def test_later_waves_of_a_request_with_a_seed_are_other_draws(server, url):
    ask(url, seed=7, extra_body={"pfm": {"n": "auto", "spend": 0, "max": 6}})
    assert [body["seed"] for body in server.bodies] == [7, 9, 11]
    server.received.clear()
    ask(url, "one", seed=7, extra_body={"pfm": {"n": "auto", "spend": 0, "max": 6}})
    assert sorted(body["seed"] for body in server.bodies) == [7, 8, 9, 10, 11, 12] or sorted(
        {body["seed"] for body in server.bodies}
    ) == [7, 8, 9, 10, 11]


def test_where_one_comes_at_a_time_waves_are_topped_up(server, url):
    answer = ask(url, "one", extra_body={"pfm": {"n": "auto", "spend": 0, "max": 8}})
    assert len(answer.pfm["candidates"]) == answer.pfm["spent"]["draws"] == 8
    assert len(server.received) == answer.pfm["calls"] == 8


def test_an_upstream_that_fails_during_a_wave_leaves_the_best_so_far(server, flow, upstream):
    for model in ("flaky", "hangs-later"):
        server.received.clear()
        with proxy(refiner(flow, n="auto"), upstream, timeout=0.5) as url:
            answer = ask(url, model, extra_body={"pfm": {"n": "auto", "spend": 0, "max": 12}})
        assert answer.pfm["refined"]
        assert answer.pfm["spent"]["ended"] == "failed"
        assert 1 <= len(answer.pfm["candidates"]) < 12
        assert answer.pfm["errors"]
        assert answer.pfm["win_probability"]["chosen"] == max(answer.pfm["probabilities"])


def test_an_upstream_that_gives_nothing_is_passed_on_as_ever(server, url):
    with pytest.raises(openai.InternalServerError):
        ask(url, "status-500")
    assert "refined" in post(url, plain(model="blank")).text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"n": "auto", "max": 33}, "pfm.max must be an integer from 1 to 32, got 33"),
        ({"n": "auto", "max": True}, "pfm.max must be an integer"),
        ({"n": "auto", "spend": -1}, "pfm.spend must be"),
        ({"n": "auto", "spend": {"word": 1}}, "pfm.spend must be"),
        ({"n": "auto", "spend": "ümlaut \ud800"}, "pfm.spend must be"),
        ({"n": "auto", "spend": 10**400}, "pfm.spend must be"),
        ({"n": "auto", "by": "sample"}, "pfm.n auto stops by the best win probability"),
        ({"n": 4, "max": 8}, "pfm.max belongs to n=auto"),
        ({"n": "Auto"}, "pfm.n must be an integer"),
    ],
)
def test_what_does_not_go_with_auto_is_told_so(server, url, extra, message):
    answer = post(url, plain(pfm=extra))
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert not server.received


def test_without_a_rule_auto_is_refused_and_with_one_it_may_be_asked_for(server, flow, upstream):
    with proxy(pfm.wrap(None, flow, encoder=pfm.encoders.SurfaceEncoder(), n=3), upstream) as url:
        assert "no calibrated stopping rule" in post(url, plain(pfm={"n": "auto"})).text
    with proxy(refiner(flow, n=3), upstream) as url:
        assert ask(url).pfm["n"] == 3
        assert ask(url, extra_body={"pfm": {"n": "auto"}}).pfm["n"] == "auto"


# -- the command line -------------------------------------------------------------------------------------------------


def write_scored(path, prompts: int = 30, shuffled: bool = False):
    source = random.Random(2)
    rows = []
    for number in range(prompts):
        good = [source.random() < 0.4 for _ in range(18)]
        texts = [reply(kind, source) for kind in good]
        scores = [float(kind) + source.random() / 10 for kind in good]
        if shuffled:
            source.shuffle(scores)
        rows.append({"prompt": f"Held-out question {number}?", "candidates": texts, "scores": scores})
    return write_rows(path, rows)


def test_calibrate_refine_and_serve_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the generator's module is looked for
    folder = tmp_path / "flow"
    run("fit", write_pairs(tmp_path / "pairs.jsonl"), "--out", folder, *FAST, "--held-out", 0.25)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"New question {n}?"} for n in range(12)])
    (tmp_path / "replies.py").write_text(
        "import random\n"
        "source = random.Random(3)\n"
        "def reply(prompt):\n"
        "    words = ' '.join(source.choices(['stone', 'river', 'lamp', 'wind'], k=source.randint(4, 12)))\n"
        "    good = source.random() < .4\n"
        "    return words.capitalize() + '.' if good else words + source.choice(['!!!', '??', ' lol'])\n"
    )
    draw = ["refine", prompts, "--flow", folder, "--generator", "replies:reply", "--no-progress"]
    missing = run(*draw, "--out", tmp_path / "a.jsonl", "-n", "auto", code=2)
    assert "pfm calibrate" in missing.stderr
    assert "-n must be a whole number" in run(*draw, "--out", tmp_path / "a.jsonl", "-n", "few", code=2).stderr
    shuffled = run("calibrate", write_scored(tmp_path / "shuffled.jsonl", shuffled=True), "--flow", folder, "-n", 4)
    assert "-n auto takes 4 draws" in " ".join(shuffled.stderr.split())
    made = run("calibrate", write_scored(tmp_path / "scored.jsonl"), "--flow", folder, "-n", 4, "--max-n", 8)
    assert "gain of 4 draws over one" in made.stdout
    assert Stopping.load(folder).refusal is None

    found = run(*draw, "--out", tmp_path / "refined.jsonl", "-n", "auto", "--spend", "0.02")
    again = run(*draw, "--out", tmp_path / "refined.jsonl", "-n", "auto", "--spend", "0.02")
    other = run(*draw, "--out", tmp_path / "refined.jsonl", "-n", "auto", "--spend", "0.2", code=2)
    rows = read_rows(tmp_path / "refined.jsonl")
    assert len(rows) == 12
    assert all(row["spent"]["draws"] == len(row["candidates"]) <= 8 for row in rows)
    assert "draws a prompt" in found.stdout
    assert "from an earlier run" in again.stdout
    assert "another flow, generator or decoder" in " ".join(other.stderr.split())
    assert not math.isnan(rows[0]["win_probability"])

    candidates = write_rows(tmp_path / "candidates.jsonl", read_rows(tmp_path / "scored.jsonl")[:3])
    label = ["label", candidates, "--judge", r"pattern:\.$", "--no-progress", "--max-pairs", 60]
    assert "--sure needs --flow" in run(*label, "--out", tmp_path / "l.jsonl", "--sure", 0.9, code=2).stderr
    every = run(*label, "--out", tmp_path / "every.jsonl", "--flow", folder)
    some = run(*label, "--out", tmp_path / "some.jsonl", "--flow", folder, "--sure", 0.9, "--audit", 0.2)
    assert "180 for 180 pairs" in every.stdout
    kept = read_rows(tmp_path / "some.jsonl", without=("pfm",))
    assert 20 < len(kept) < 120
    assert all(row in read_rows(tmp_path / "every.jsonl", without=("pfm",)) for row in kept)  # the judge's own verdicts
    assert f"{180 - len(kept)}" in some.stdout
    assert "where the flow is wrong" in some.stdout

    config = folder / "config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")  # another flow than was calibrated
    stale = run("serve", folder, "--upstream", "http://127.0.0.1:9/v1", "-n", "auto", code=2)
    assert "was calibrated with another flow" in " ".join(stale.stderr.split())
