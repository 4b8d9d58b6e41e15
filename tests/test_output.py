"""Output that nobody can take: the kernel's full device, and a pipe that nobody reads."""

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from megatron_memory.entry import EXIT_ERROR, run_entry
from megatron_memory.exceptions import ConfigurationError, DataError
from megatron_memory.output import let_go_of_output, try_print
from megatron_memory.training.progress import Console
from megatron_memory.training.tensorboard import Curves

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")


@pytest.fixture
def full():
    stream = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    yield stream
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
    stream.close()


def test_a_line_that_is_lost_is_an_answer_and_no_error(full):
    assert try_print("a line", full).errno == errno.ENOSPC
    seen = io.StringIO()
    assert try_print("a line", seen) is None and seen.getvalue() == "a line\n"


def test_a_training_goes_on_and_says_so_where_it_can(full, monkeypatch):
    errors, later = io.StringIO(), io.StringIO()
    console = Console(is_speaker=True)
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr(sys, "stdout", full)
    console.say("one")
    console.say("two")
    (told,) = errors.getvalue().splitlines()
    assert "No space left on device. The training goes on" in told
    monkeypatch.setattr(sys, "stdout", later)
    console.say("three")
    console.say("four")
    three, missing, four = later.getvalue().splitlines()
    assert (three, four) == ("three", "four") and missing.startswith("lines before this one may be")


def test_an_error_keeps_its_exit_code_and_python_does_not_replace_it(full, monkeypatch):
    def fail() -> int:
        raise DataError("what nobody reads")

    def interrupt() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stderr", full)
    assert run_entry(fail) == EXIT_ERROR
    assert run_entry(interrupt) == 130
    # What Python does at the end of the process; its own exit code is 120 where this fails.
    full.flush()
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert try_print("a line", closed).errno == errno.EPIPE
        let_go_of_output()


# TensorBoard's thread ends by the error, which `Curves` hears of.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_curves_on_a_disk_that_is_full_end_and_nothing_else(tmp_path: Path):
    said: list[str] = []
    curves = Curves(str(tmp_path), first_iteration=1, is_writer=True, say=said.append)
    curves.add(1, {"loss": 1.0})
    (file,) = tmp_path.iterdir()
    # TensorBoard opens it anew for every flush.
    file.unlink()
    file.symlink_to("/dev/full")
    for iteration in range(2, 5):
        curves.add(iteration, {"loss": 1.0})
    curves.close()
    assert len(said) == 1 and "The training goes on without curves" in said[0], said
    (tmp_path / "a file").touch()
    with pytest.raises(ConfigurationError, match="--tensorboard-dir .* cannot be written to"):
        Curves(str(tmp_path / "a file" / "curves"), first_iteration=1, is_writer=True)


def test_names_that_are_no_text_and_characters_that_the_terminal_lacks(monkeypatch):
    for encoding, text, shown in (
        ("utf-8", "caf\udce9", b"caf\xe9\n"),
        ("ascii", "\u4e2d\ud800", b"\\u4e2d\\ud800\n"),
        ("utf-8", "\u4e2d", b"\xe4\xb8\xad\n"),
    ):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        assert run_entry(lambda text=text: print(text) or 0) == 0
        assert written.getvalue() == shown


def test_a_path_that_cannot_be_asked_about_is_named(capsys):
    assert run_entry(lambda: Path("x" * 300).is_dir()) == EXIT_ERROR
    error = capsys.readouterr().err
    assert error.startswith("xxx") and "File name too long. Check the path" in error
    with pytest.raises(OSError, match="of no file"):
        run_entry(lambda: (_ for _ in ()).throw(OSError(errno.EIO, "of no file")))
