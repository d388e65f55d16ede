"""A signal waits for the end of a step, and a second one does not."""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Iterator

import pytest

from erase_concept.pipelines.signals import finish_first, terminable


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Where the tests run in the background, interrupts are ignored; and no handler is left behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    yield
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (
        signal.default_int_handler,
        before[1],
    )
    signal.signal(signal.SIGINT, before[0])


def test_a_signal_waits_for_the_end() -> None:
    done = []

    def step() -> None:
        with finish_first() as interrupted:
            assert not interrupted()
            signal.raise_signal(signal.SIGINT)
            assert interrupted()
            done.append("step")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == ["step"]


def test_a_second_one_acts_at_once() -> None:
    done = []

    def step() -> None:
        with finish_first():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("never")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert not done


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_the_end_of_the_terminal_waits_for_the_end_of_the_step() -> None:
    done = []

    def step() -> None:
        with terminable(), finish_first() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert interrupted()
            done.append("step")

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run with nohup
    try:
        with pytest.raises(SystemExit) as end:
            step()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert end.value.code == 129
    assert done == ["step"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_with_nohup_the_end_of_the_terminal_ends_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminable(), finish_first() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupted()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("problem", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error")])
def test_the_step_ends_though_nobody_reads_what_is_said(problem: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ``erase ... 2>&1 | tee log`` Ctrl-C ends tee too, and a terminal may be gone."""
    done = []

    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise problem

    def step() -> None:
        with finish_first():
            signal.raise_signal(signal.SIGINT)
            done.append("step")

    monkeypatch.setattr("sys.stderr", Gone())
    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == ["step"]


def test_the_outermost_end_counts() -> None:
    def step() -> None:
        with terminable(), finish_first():
            with finish_first() as interrupted:
                signal.raise_signal(signal.SIGTERM)
            assert interrupted()

    with pytest.raises(SystemExit) as end:
        step()
    assert end.value.code == 143


def test_contexts_may_end_in_any_order() -> None:
    """As those of generators do that are closed one after the other."""
    first, second = finish_first(), finish_first()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    signal.raise_signal(signal.SIGINT)  # still held back
    with pytest.raises(KeyboardInterrupt):
        second.__exit__(None, None, None)


def test_ignored_signals_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with finish_first() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert not interrupted()
    assert signal.signal(signal.SIGINT, signal.default_int_handler) == signal.SIG_IGN


def test_other_threads_have_no_signals() -> None:
    found = []

    def work() -> None:
        with finish_first() as interrupted:
            found.append((interrupted(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, signal.default_int_handler)]
