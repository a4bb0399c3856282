"""The gateway's log: rotation, moved files, fsync, and a disk that is full."""

import json
import multiprocessing
import os
import resource

import pytest

from marginroute.record_log import AuditLog, RecordLog


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def lines(path):
    return [json.loads(line)["i"] for line in path.read_text().splitlines()]


def test_rotation_keeps_every_line_in_order(tmp_path):
    path = tmp_path / "log.jsonl"
    audit = AuditLog(path, max_bytes=100, keep=3, clock=Clock())
    for i in range(40):
        assert audit.write({"i": i, "text": "x" * 10})
    audit.close()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["log.jsonl", "log.jsonl.1", "log.jsonl.2", "log.jsonl.3"]
    kept = [i for name in reversed(names) for i in lines(tmp_path / name)]
    assert kept == list(range(kept[0], 40)) and len(kept) == 3 * 3 + len(lines(path))
    assert all(p.stat().st_size <= 100 for p in tmp_path.iterdir())


def test_a_line_longer_than_a_file_is_written_whole(tmp_path):
    audit = AuditLog(tmp_path / "log.jsonl", max_bytes=50, clock=Clock())
    for i in range(3):
        assert audit.write({"i": i, "text": "x" * 100})
    assert lines(tmp_path / "log.jsonl") == [2] and lines(tmp_path / "log.jsonl.2") == [0]


def test_a_file_that_logrotate_moved_is_left_within_a_second(tmp_path):
    path, clock = tmp_path / "log.jsonl", Clock()
    audit = AuditLog(path, clock=clock)
    audit.write({"i": 0})
    os.rename(path, tmp_path / "moved")
    clock.now_s = 1.5
    audit.write({"i": 1})
    assert lines(tmp_path / "moved") == [0] and lines(path) == [1]


def _writer(path, k, count):
    audit = AuditLog(path, max_bytes=4000, keep=100)
    for i in range(count):
        audit.write({"i": k * count + i})


def test_several_processes_share_a_log_and_lose_nothing(tmp_path):
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=_writer, args=(tmp_path / "log.jsonl", k, 2000)) for k in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = [i for path in tmp_path.iterdir() for i in lines(path)]
    assert sorted(found) == list(range(6000))
    assert len(list(tmp_path.iterdir())) > 10


def test_fsync_policy(tmp_path, monkeypatch):
    forced, clock = [], Clock()
    monkeypatch.setattr(os, "fsync", lambda fd: forced.append(clock.now_s))
    for policy, expected in ((None, []), (0.0, [0.0, 1.0, 2.0, 3.0, 4.0]), (2.0, [2.0, 4.0])):
        forced.clear()
        clock.now_s = 0.0
        audit = AuditLog(tmp_path / "log.jsonl", fsync_s=policy, clock=clock)
        for i in range(5):
            clock.now_s = float(i)
            audit.write({"i": i})
        assert forced == expected


def test_full_disk_drops_counts_and_goes_on(tmp_path, caplog):
    """/dev/full fails every write as a full disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    clock = Clock()
    audit = AuditLog("/dev/full", clock=clock)
    assert [audit.write({"i": i}) for i in range(3)] == [False] * 3
    assert audit.dropped == 3
    assert sum("No space left on device" in r.message for r in caplog.records) == 1
    audit.path = tmp_path / "log.jsonl"  # there is room again: as if the file had been moved
    clock.now_s = 2.0
    assert audit.write({"i": 3})
    assert "written again; 3 records were dropped" in caplog.text
    assert lines(audit.path) == [3]


def test_half_a_line_is_taken_back(tmp_path):
    """A limit on the file's size cuts a write short, as the last blocks of a disk do."""
    path, child = tmp_path / "log.jsonl", os.fork()
    if child == 0:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        audit = AuditLog(path)
        audit.write({"i": 0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        os._exit(0 if not audit.write({"i": 1, "text": "x" * 50}) and audit.dropped == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lines(path) == [0]


def test_the_plain_log_raises(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with pytest.raises(OSError, match="No space left"):
        RecordLog("/dev/full").write({"i": 0})


def test_closed_logs_drop(tmp_path):
    audit = AuditLog(tmp_path / "log.jsonl", fsync_s=1.0)
    audit.close()
    audit.close()
    assert not audit.write({"i": 0}) and audit.dropped == 1
