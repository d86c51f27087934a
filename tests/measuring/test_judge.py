"""The judge: every answer that a server may give, none of them counted or paid twice."""

import email.utils
import json
import threading
import time

import numpy as np
import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.measuring import client
from dynaip_jax.measuring.client import KEY, Cache, Endpoint, Unanswered
from dynaip_jax.measuring.judge import Judge, in_threads, questions, score_in
from dynaip_jax.measuring.runs import judged
from dynaip_jax.measuring.sets import Case, Subject
from tests.measuring.fake_judge import serving

PICTURE = np.full((40, 30, 3), 7, np.uint8)
CASE = Case("a", 'a "cup" on {sand}', (Subject(("x.jpg",), "cup"),))


def asked(count=1, case=CASE):
    return [q for n in range(count) for q in questions(case, n, PICTURE + n, [PICTURE] * len(case.subjects))]


def judge(url, path, waits=None, **options):
    waits = [] if waits is None else waits
    return Judge(Endpoint(url, "eye", timeout=options.pop("timeout", 10.0), pause=waits.append), Cache(path), **options)


def test_scores_are_means_of_repeats_and_nothing_is_asked_twice(tmp_path):
    with serving(4, 3, 2, 1, 0) as (fake, url):
        verdicts = judge(url, tmp_path / "a", repeats=2, at_once=1).ask(asked())
        assert [v.score for v in verdicts] == [7 / 8, 3 / 8] and verdicts[0].reason == "so it is"
        made, lost = judged(judge(url, tmp_path / "a", repeats=2), asked(), lambda: None)
        assert made[0][0] == {"CP, eye": 7 / 8, "PF, eye": 3 / 8, "CP·PF, eye": 21 / 64} and lost == 0
        assert len(fake.seen) == 4, "answers come from the disk"
        (text, *pictures) = fake.seen[0]["messages"][0]["content"]
        assert len(pictures) == 2 and pictures[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
        assert '"cup"' in text["text"] and fake.seen[0]["model"] == "eye"
        assert '"a \\"cup\\" on {sand}"' in fake.seen[2]["messages"][0]["content"][0]["text"]
        judge(url, tmp_path / "a", repeats=3).ask(asked())
        assert len(fake.seen) == 6, "one more repeat of each"


def test_a_server_that_is_busy_is_waited_for(tmp_path):
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    busy = [
        (429, {"Retry-After": "7"}),
        (503, {"Retry-After": date}),
        (429, {"Retry-After": "soon"}),
        (500, {}),
        (429, {"Retry-After": "9999"}),
    ]
    waits = []
    with serving(*busy, 3) as (fake, url):
        (verdict, _) = judge(url, tmp_path / "a", waits, at_once=1).ask(asked())
    assert verdict.score == 0.75 and len(fake.seen) == 7
    assert waits[0] == 7 and 90 < waits[1] <= 100 and waits[2:] == [4, 8, 300]


def test_answers_that_never_come_or_break_off_are_asked_for_again(tmp_path):
    waits, begun = [], threading.Event()

    def silent(handler):
        begun.wait(1.5)

    with serving(silent, b"{", b"", b"[]", json.dumps(dict(choices=[])).encode(), 2) as (fake, url):
        (verdict, _) = judge(url, tmp_path / "a", waits, timeout=0.3, at_once=1).ask(asked())
        begun.set()
    assert verdict.score == 0.5 and waits == [1, 2, 4, 8, 16]


def test_answers_without_a_score_are_asked_anew_and_remembered(tmp_path):
    with serving("no", '{"score": 7}', "again no", 1) as (fake, url):
        first, second = judge(url, tmp_path / "a", at_once=1).ask(asked())
        assert first.score is None and first.lost == 1 and second.score == 0.25
        assert len(fake.seen) == 4
        made, lost = judged(judge(url, tmp_path / "a"), asked(), lambda: None)
        assert lost == 1 and made[0][0] == {"CP, eye": None, "PF, eye": 0.25, "CP·PF, eye": None}
        assert len(fake.seen) == 4, "what was paid for is not asked for again, whatever it says"


@pytest.mark.parametrize("cut", ["\n", '{"key": "half'])
def test_a_judge_that_was_killed_goes_on_where_it_was(tmp_path, cut):
    path = tmp_path / "answers"
    with serving(1, 2, 3, 4, 0) as (fake, url):
        keep, kept = Cache.put, []

        class Killed(BaseException):
            pass

        def killing(self, key, reply):
            if len(kept) == 3:
                raise Killed
            keep(self, key, reply)
            kept.append(key)

        Cache.put = killing
        try:
            with pytest.raises(Killed):
                judge(url, path, at_once=1).ask(asked(3))
        finally:
            Cache.put = keep
        with path.open("a") as file:
            file.write(cut)
        verdicts = judge(url, path, at_once=1).ask(asked(3))
        assert [v.score for v in verdicts] == [0.25, 0.5, 0.75, 0, 0, 0]
        again = judge(url, path).ask(asked(3))
        assert again == verdicts and len(fake.seen) == 4 + 3, "the fourth answer was never kept"


def test_costs_are_estimated_and_then_known(tmp_path):
    with serving(3) as (_, url):
        one = judge(url, tmp_path / "a", repeats=2)
        before = one.cost(asked(2))
        assert (before.asked, before.answered) == (8, 0) and 4 * 2400 < before.input_tokens < 20_000
        one.ask(asked(1))
        after = one.cost(asked(2))
        assert after == (8, 4, 4000, 200) and after.price((2.5, 10)) == pytest.approx(0.012)


def test_what_no_try_would_change_ends_it(tmp_path):
    for status, message in ((401, KEY), (404, "judge_model"), (302, "status 302")):
        headers = dict(Location="http://127.0.0.1:9/")
        with serving((status, headers)) as (fake, url), pytest.raises(UserError, match=message):
            judge(url, tmp_path / "a", at_once=1).ask(asked())
        assert len(fake.seen) == 1
    with serving(500) as (fake, url), pytest.raises(UserError, match="no answer to 5 questions in a row"):
        judge(url, tmp_path / "a", at_once=1).ask(asked(9))
    assert len(fake.seen) == 5 * client.TRIES
    with pytest.raises(Unanswered, match="6 times"):
        Endpoint("http://127.0.0.1:9/v1", "eye", timeout=1, pause=lambda _: None).ask([])


def test_the_key_goes_to_its_server_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "secret-key")
    with serving(3) as (fake, url):
        endpoint = Endpoint.of(url + "/", "eye", 10)
        Judge(endpoint, Cache(tmp_path / "a")).ask(asked())
        assert {h["Authorization"] for h in fake.headers} == {"Bearer secret-key"}
    assert "secret-key" not in (tmp_path / "a").read_text()
    for url, message in (
        ("http://example.org/v1", "unencrypted"),
        ("ftp://localhost/v1", "no address of a server"),
        ("https://user:word@localhost/v1", "no address of a server"),
        ("localhost:8000", "no address of a server"),
    ):
        with pytest.raises(UserError, match=message) as e:
            Endpoint.of(url, "eye", 10)
        assert "secret-key" not in str(e.value)


def test_scores_on_the_scale_alone_are_read():
    for text, score in (
        ('{"reason": "x", "score": 3}', 3), ('```json\n{"score": 0}\n```', 0), ('{"score": 4.0}', 4), ('{"score": 5}', None),
        ('{"score": true}', None), ('{"score": "3"}', None), ("score: 3", None), ("", None), ('{"score": 2.5}', None),
        ('{"score": 1} no: {"score": 2}', 2), ("{" * 1000, None),
    ):  # fmt: skip
        assert score_in(text) == score, text


def test_threads_keep_the_order_and_the_first_error():
    assert in_threads(lambda n: n * n, range(20), 4) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda n: 1 // n, [0, 1], 2)
