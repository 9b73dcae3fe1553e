"""News reach a server that is slow; one that takes nothing is not waited for."""

import threading
import time

import pytest

from tracking.delivery import Delivery
from tracking.errors import TrackingAwayError


def test_a_server_that_gets_on_is_waited_for_longer_than_the_limit():
    delivery, done = Delivery(), []
    for key in "abcdef":
        delivery.put(key, lambda key=key: (time.sleep(0.4), done.append(key)))
    delivery.catch_up(1.0)
    assert done == list("abcdef")
    delivery.stop()


def test_an_action_of_several_requests_is_waited_for_while_they_are_answered():
    delivery = Delivery()

    def ask() -> None:
        for _ in range(6):
            time.sleep(0.4)
            delivery.moved()

    delivery.put("a", ask)
    delivery.catch_up(1.0)
    delivery.stop()


def test_news_that_come_faster_than_the_server_takes_them_keep_nothing_waiting():
    delivery, done = Delivery(), []

    def load() -> None:
        delivery.put("load", load)
        time.sleep(0.3)
        done.append("load")

    delivery.put("load", load)
    delivery.put("trial", lambda: done.append("trial"))
    delivery.catch_up(1.0)
    assert done.count("load") <= 2
    assert "trial" in done
    delivery.stop()


def test_a_server_that_takes_nothing_is_given_up():
    delivery, is_over = Delivery(), threading.Event()
    delivery.put("a", lambda: None)
    delivery.put("b", lambda: is_over.wait(30))
    with pytest.raises(TrackingAwayError, match=r"it answered nothing for 0\.5 s$"):
        delivery.catch_up(0.5)
    is_over.set()
    delivery.catch_up(10)
    delivery.stop()
