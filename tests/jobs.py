"""Jobs and workers of tests, apart from the tests: a process that starts one imports nothing heavy."""

import os
import signal
import time
from concurrent.futures import Future

from agents.processes import Worker
from marginroute.errors import InputError


def start_squares(least):
    """Refuses what is less."""

    def square(x):
        if x < least:
            raise InputError(f"{x} is not legal")
        return x * x

    return square


def start_suicide(path):
    """Kills its process over item 3, once (always, if `path` is None); says who did an item."""

    def do(x):
        if x == 3 and (path is None or not path.exists()):
            if path is not None:
                path.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return x, os.getpid()

    return do


def start_hunger():
    """Asks for more memory than there is."""

    def eat(_):
        raise MemoryError

    return eat


class Inside:
    """A member inside this process that dies of its n-th item."""

    def __init__(self, n, did):
        self.left, self.did, self.worker = n, did, Worker()
        self.ready = Future()
        self.ready.set_result("here")

    def submit(self, job, packed, item):
        self.left -= 1
        done = Future()
        try:
            if self.left == 0:
                raise EOFError
            self.did.append(item)
            done.set_result(self.worker.do(job, packed, item))
        except Exception as error:
            done.set_exception(error)
        return done

    def fate(self):
        return "killed by nobody"

    def stop(self, at_once):
        self.left = 0


class Here:
    """Members inside this process; `dies_of` says for those that are hired first of which item they die."""

    def __init__(self, size, dies_of=()):
        self.size, self.dies_of, self.members, self.did = size, list(dies_of), [], []

    def hire(self):
        self.members.append(Inside(self.dies_of.pop(0) if self.dies_of else -1, self.did))
        return self.members[-1]

    def pack(self, job):
        return job

    def welcome(self, arrived):
        assert arrived == "here"

    def meant(self, error):
        return None if isinstance(error, EOFError) else error
