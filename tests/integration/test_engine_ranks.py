"""The harness itself: ranks that fail are seen, and the next call gets new ones."""

from __future__ import annotations

import os

import pytest

from tests.ranks import RankFailure, RankPool

pytestmark = pytest.mark.slow


def rank_and_size() -> tuple[int, int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.getpid()


def fail_on(rank: int) -> None:
    if rank_and_size()[0] == rank:
        raise ValueError("deliberately")


def die_on(rank: int) -> None:
    if rank_and_size()[0] == rank:
        os._exit(7)


def test_every_rank_answers_and_a_failed_pool_starts_anew() -> None:
    with RankPool(2) as ranks:
        (first, second) = ranks.run(rank_and_size)
        assert first[:2] == (0, 2) and second[:2] == (1, 2)
        assert ranks.run(rank_and_size) == [first, second]
        with pytest.raises(RankFailure, match=r"(?s)rank 1: .*ValueError: deliberately"):
            ranks.run(fail_on, 1)
        with pytest.raises(RankFailure, match="rank 0: exit code 7"):
            ranks.run(die_on, 0)
        assert ranks.run(rank_and_size)[0][2] != first[2]


def test_the_answer_to_an_interrupted_call_is_not_taken_for_that_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with RankPool(1) as ranks:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("tests.ranks.wait", interrupted)
            ranks.run(os.getpid)
        assert ranks.run(rank_and_size)[0][:2] == (0, 1)
