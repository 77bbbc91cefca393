"""Processes of tests: forked from one server that has imported everything, so that each starts in a tenth of a second.

The server is multiprocessing's: one for a session, of one thread, in which nothing was computed but digests of the code
(preloaded.py). A process forked from it is fresh.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from functional_sam.cli import main

# What a run, alone or on several ranks, imports sooner or later; torch imports the first by itself when an optimizer is made.
PRELOAD = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "pytest"]
PRELOAD += ["functional_sam.commands.runs", "functional_sam.training.attempt", "preloaded"]
PATIENCE = 200  # seconds that a process may take


def command(arguments, log, before):
    """The life of a process: perhaps something that goes wrong in it, then the command line, or a script."""
    os.environ["COLUMNS"] = "1000"
    os.setsid()  # as a terminal gives its foreground job a process group of its own
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if before is not None:
        before()
    if str(arguments[0]).endswith(".py"):
        runpy.run_path(str(arguments[0]), run_name="__main__")
        code = 0
    else:
        code = main([str(argument) for argument in arguments])
    sys.stdout.flush()
    os._exit(code)


class Process:
    """A process of the command line, or of a script, and what it said. (Needs the fixture `server`, as gloo() does.)"""

    def __init__(self, log, *arguments, before=None):
        self.log = log
        self.process = multiprocessing.get_context("forkserver").Process(target=command, args=(arguments, log, before))
        self.process.start()
        self.pid = self.process.pid

    @property
    def code(self):
        """Its exit code; None while it is at work."""
        return self.process.exitcode

    def wait(self):
        """Its exit code, once it has ended."""
        self.process.join(PATIENCE)
        assert self.code is not None, f"still running: {self.said}"
        return self.code

    def wait_until(self, condition):
        """Wait for something that comes while it is at work."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.code is None, f"ended with {self.code}: {self.said}"
            assert time.monotonic() < deadline, f"waited for {PATIENCE} s: {self.said}"
            time.sleep(0.004)

    def send(self, number):
        os.kill(self.pid, number)

    def end(self):
        self.process.kill()
        self.process.join()

    @property
    def said(self):
        return self.log.read_text() if self.log.exists() else ""


def gloo(world, function, *arguments):
    """Call function(rank, *arguments) in `world` processes that are a gloo group; an assertion in one fails the test."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "rendezvous")
        torch.multiprocessing.start_processes(_rank, (world, path, function, arguments), nprocs=world, start_method="forkserver")


def _rank(rank, world, path, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    function(rank, *arguments)
    dist.destroy_process_group()
