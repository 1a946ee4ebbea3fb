"""Every test of lowband with torch, on two or four processes; every process runs all of them, in this order.

    LOWBAND_PROGRAM=build/release/bin/lowband torchrun --nproc-per-node 2 tests/plugin/python/all_jobs.py [name ...]
"""

import os

import fsdp_job
import native_job
import torch_job

ON_ANY_NUMBER = {test.__name__: test for test in (
    torch_job.test_ddp_sends_nothing_but_factors, torch_job.test_every_mesh_takes_the_steps_of_one_process_with_all_data,
    native_job.test_one_process_loses_what_the_native_trainer_loses, native_job.test_ddp_loses_what_the_native_trainer_loses)}

if __name__ == "__main__":
    on_two = {**vars(torch_job), **ON_ANY_NUMBER}
    on_four = {**ON_ANY_NUMBER, **vars(native_job), **vars(fsdp_job)}
    torch_job.main(on_four if os.environ["WORLD_SIZE"] == "4" else on_two)
