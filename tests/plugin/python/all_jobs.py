"""Every test of lowband with torch, on two, four or eight processes; every process runs all of them, in this order.

    LOWBAND_PROGRAM=build/release/bin/lowband torchrun --nproc-per-node 2 tests/plugin/python/all_jobs.py [name ...]
"""

import os

import fsdp_job
import fsdp_tensor_job
import native_job
import torch_job

ON_ANY_NUMBER = {test.__name__: test for test in (
    torch_job.test_ddp_sends_nothing_but_factors, torch_job.test_every_mesh_takes_the_steps_of_one_process_with_all_data,
    native_job.test_one_process_loses_what_the_native_trainer_loses, native_job.test_ddp_loses_what_the_native_trainer_loses)}

if __name__ == "__main__":
    on_two = {**vars(torch_job), **ON_ANY_NUMBER}
    on_four = {**ON_ANY_NUMBER, **vars(native_job), **vars(fsdp_job)}
    on_four.update({f"{name}_over_tensor_parallelism": test for name, test in vars(fsdp_tensor_job).items()
                    if name.startswith("test_")})
    both = fsdp_tensor_job.test_every_replica_of_both_takes_the_steps_of_one_process
    torch_job.main({"2": on_two, "4": on_four, "8": {both.__name__: both}}[os.environ["WORLD_SIZE"]])
