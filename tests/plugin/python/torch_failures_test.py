"""How a DDP job of three processes with `lowband.torch` ends when one of them does not go on; what needs torch.distributed.

    python3 tests/plugin/python/torch_failures_test.py
"""

import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import unittest

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

import lowband
import lowband.checkpoint
import lowband.torch

PROCESSES, SILENT, KILLED, DEADLINE_SECONDS = 3, 2, 1, 2.0

# ---- One process of the job: it says what happens, and trains until it fails ----


def say_what_fails(action):
    begin = time.monotonic()
    try:
        action()
        print("nothing failed", flush=True)
    except lowband.Error as error:
        print(f"after {time.monotonic() - begin:.3f} s: {type(error).__name__}: {error}", flush=True)


def train(process, port):
    torch.set_num_threads(1)
    lowband.set_compute_threads(1)
    parameters = lambda: [torch.nn.Parameter(torch.ones(3, 2))]
    say_what_fails(lambda: lowband.torch.Optimizer(parameters(), profile=lowband.uniform(1)))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=process, world_size=PROCESSES)
    say_what_fails(lambda: lowband.torch.Optimizer(parameters(), profile=lowband.uniform(1), deadline_seconds=0.0))

    # A gradient that one of two processes refuses, which then does nothing for a while. Of more than two, some wait for one
    # that waits itself, and name that.
    pair = dist.new_group([0, SILENT])
    if process != KILLED:
        weight = torch.nn.Parameter(torch.ones(8, 12))
        optimizer = lowband.torch.Optimizer([weight], profile=lowband.uniform(2), process_group=pair,
                                            deadline_seconds=DEADLINE_SECONDS)
        optimizer.step()
        weight.grad = torch.ones(8, 12)
        if process == SILENT:
            weight.grad = weight.grad.to_sparse()
        say_what_fails(optimizer.step)
        if process == SILENT:
            time.sleep(2 * DEADLINE_SECONDS)
        optimizer.close()

    torch.manual_seed(7)
    model = DistributedDataParallel(torch.nn.Linear(12, 8))
    optimizer = lowband.torch.Optimizer(model.parameters(), lr=0.02, profile=lowband.uniform(2), deadline_seconds=600)
    lowband.torch.attach_ddp(model, optimizer)
    for step in range(10**9):
        optimizer.zero_grad()
        model(torch.randn(4, 12)).square().mean().backward()
        optimizer.step()
        if step == 3:  # DDP has sent its last, so that nobody waits in gloo
            print("trains", flush=True)


# ---- Their parent ----


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Failures(unittest.TestCase):

    def test_every_process_ends_and_names_the_one_that_failed(self):
        with tempfile.TemporaryDirectory() as folder:
            said = [pathlib.Path(folder) / str(process) for process in range(PROCESSES)]
            port, jobs = free_port(), []
            try:
                for process, path in enumerate(said):
                    with path.open("w") as file:
                        jobs.append(subprocess.Popen([sys.executable, __file__, str(process), str(port)], stdout=file,
                                                     stderr=subprocess.STDOUT))
                deadline = time.monotonic() + 60
                while not all("trains" in path.read_text() for path in said):
                    self.assertLess(time.monotonic(), deadline, [path.read_text() for path in said])
                    self.assertEqual([job.poll() for job in jobs], [None] * PROCESSES, [path.read_text() for path in said])
                    time.sleep(0.05)
                jobs[KILLED].kill()
                begin = time.monotonic()
                codes = [job.wait(timeout=20) for job in jobs]
                seconds = time.monotonic() - begin
            finally:
                for job in jobs:
                    job.kill()
                    job.wait()
            self.check([path.read_text() for path in said], codes)
            print(f"ended {seconds:.2f} s after the kill")

    def check(self, said, codes):
        for process, text in enumerate(said):
            failures = re.findall(r"after ([\d.]+) s: (.*)", text)
            self.assertRegex(failures[0][1], "InvalidArgument: process group: found torch.distributed not initialised")
            self.assertRegex(failures[1][1], "InvalidArgument: deadline_seconds: found 0.0, expected a positive number")
            if process == SILENT:
                self.assertRegex(failures[2][1], "InvalidArgument: gradient of param0: found torch.sparse_coo, .*expected a dense")
            elif process != KILLED:
                seconds, message = failures[2]
                self.assertRegex(message, "PeerFailed: .*process 1 did not answer within 2000 ms")
                self.assertGreaterEqual(float(seconds), DEADLINE_SECONDS)
                self.assertLess(float(seconds), 2 * DEADLINE_SECONDS)
            if process != KILLED:
                self.assertRegex(text, f"PeerFailed: .*process {KILLED}.*is gone")
        self.assertEqual(codes, [1, -9, 1])


class WithoutProcessGroup(unittest.TestCase):

    def test_a_checkpoint_is_refused(self):
        """Every process would take itself for the only one."""
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
            optimizer = lowband.torch.Optimizer([torch.nn.Parameter(torch.ones(3, 2))], profile=lowband.uniform(1))
            state = {"optimizer": lowband.checkpoint.State(optimizer)}
            dcp.save(state, checkpoint_id=f"{folder}/checkpoint")
            dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
            dist.destroy_process_group()
            for action in (dcp.save, dcp.load):
                with self.assertRaisesRegex(lowband.InvalidArgument, "process group: found torch.distributed not initialised, "
                                            "expected init_process_group before a checkpoint"):
                    action(state, checkpoint_id=f"{folder}/checkpoint")
            optimizer.close()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        train(*map(int, sys.argv[1:]))
    else:
        unittest.main()
