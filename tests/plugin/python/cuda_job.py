"""CUDA tensors in `lowband.torch`, on the two processes of torchrun, which share the first device; gloo carries what torch
itself sends. Run by torch_test.sh where torch has a device.
"""

import torch
from torch.nn.parallel import DistributedDataParallel

import lowband
import lowband.torch
import torch_job
from torch_job import RANK, batch, expect_close, expect_equal_replicas, expect_refused, flat, network

DEVICE = torch.device("cuda", 0)


def train(model, optimizer, steps, begin=0):
    device = next(model.parameters()).device
    for step in range(begin, begin + steps):
        optimizer.zero_grad()
        x, y = (value.to(device) for value in batch(step))
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def make(model, kind):
    profile = lowband.uniform(RANK) if kind in lowband.optimizer.WITH_FACTOR_RANKS else None
    return lowband.torch.Optimizer(model.named_parameters(), kind=kind, profile=profile)


def test_trains_as_on_the_cpu():
    for kind in ("dion", "power_sgd", "muon", "adamw"):
        ends, sent = [], []
        for device in (torch.device("cpu"), DEVICE):
            model = DistributedDataParallel(network().to(device))
            optimizer = make(model, kind)
            lowband.torch.attach_ddp(model, optimizer)
            train(model, optimizer, 10)
            expect_equal_replicas(model.to("cpu"))
            ends.append(flat(model.to("cpu")))
            sent.append([optimizer.step_bytes(purpose, "replica").payload_bytes for purpose in ("factor", "dense")])
            optimizer.close()
        assert sent[0] == sent[1], sent
        # Float sums of up to 32 terms in another order, amplified by the condition of what Dion orthonormalises.
        expect_close(ends[1], ends[0], 10 * 32 * 2.0**-24 * 100)


def test_state_is_on_the_device_and_goes_on_bit_by_bit():
    ends = []
    for stops in (False, True):
        model = network().to(DEVICE)
        optimizer = make(model, "dion")
        train(model, optimizer, 3)
        assert {tensor.device for tensors in optimizer.state.values() for tensor in tensors.values()
                if tensor.numel() > 1} == {DEVICE}  # counts of steps are the host's
        if stops:
            saved = {key: value.clone() for key, value in model.state_dict().items()}, optimizer.state_dict()
            again = network().to(DEVICE)
            again.load_state_dict(saved[0])
            fresh = make(again, "dion")
            fresh.load_state_dict(saved[1])
            optimizer.close()
            model, optimizer = again, fresh
        train(model, optimizer, 3, begin=3)
        ends.append(flat(model))
        optimizer.close()
    assert torch.equal(*ends)


def test_refuses_what_devices_cannot_do():
    on_two = [torch.nn.Parameter(torch.ones(4, 3, device=DEVICE)), torch.nn.Parameter(torch.ones(4, 3))]
    expect_refused(["device of param1: found cpu", "the same for all"], lambda: lowband.torch.Optimizer(on_two, kind="adamw"))
    model = network().to(DEVICE)
    expect_refused(["options.overlap: found 1"], lambda: lowband.torch.Optimizer(model.parameters(), kind="adamw", overlap=True))
    expect_refused(["options.dtype: found float64"],
                   lambda: lowband.torch.Optimizer(model.double().parameters(), kind="adamw"))


if __name__ == "__main__":
    torch_job.main(globals())
