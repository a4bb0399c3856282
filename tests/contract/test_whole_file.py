"""Files are written completely or not at all, as an ordinary open would make them."""

import os
from pathlib import Path

import pytest

from marginroute.errors import InputError
from marginroute.whole_file import replacing, write_whole


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, OSError, ValueError])
def test_an_interruption_leaves_the_old_file_and_no_scrap(tmp_path, interruption):
    path = tmp_path / "report.json"
    path.write_text("old")

    def half():
        with replacing(path) as partial, open(partial, "w") as file:
            file.write("ne")
            file.flush()
            assert sorted(os.listdir(tmp_path)) == sorted([partial.name, "report.json"]) and path.read_text() == "old"
            raise interruption

    with pytest.raises(interruption):
        half()
    assert os.listdir(tmp_path) == ["report.json"] and path.read_text() == "old"


def test_at_the_end_the_new_file_is_there_alone(tmp_path):
    path = tmp_path / "model.zip"
    for content in (b"first\r\n", b"second\x00"):
        write_whole(path, content)
        assert path.read_bytes() == content and os.listdir(tmp_path) == ["model.zip"]
    with replacing(path) as partial:
        assert (partial.parent, partial.suffix) == (tmp_path, ".zip")
        partial.write_text("third")
    assert path.read_text() == "third" and os.listdir(tmp_path) == ["model.zip"]
    write_whole(path, "\u20ac\n")
    assert path.read_bytes() == b"\xe2\x82\xac\n"


def test_a_link_is_followed_and_a_pipe_is_written_to(tmp_path):
    """As root `--json /dev/stdout` would else leave a file where the device was."""
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "x"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(tmp_path / "pipe", "y")
        assert (tmp_path / "pipe").is_fifo() and os.read(reader, 9) == b"y"
    finally:
        os.close(reader)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o000])
def test_permissions_are_those_of_an_ordinary_open(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "whole", "x")
        open(tmp_path / "ordinary", "w").close()
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("whole", "ordinary")]
    assert modes == [0o666 & ~mask] * 2


def test_what_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "missing" / "file", Path()):
        with pytest.raises(InputError, match=r"cannot be written \(.+\); legal is a file in a folder you own"):
            write_whole(path, "x")
    assert os.listdir(tmp_path) == ["folder"]
