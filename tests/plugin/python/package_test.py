"""The Python package without torch: two processes that meet over TCP, parameters in arrays of the standard library.

    python3 tests/plugin/python/package_test.py
"""

import array
import multiprocessing
import random
import sys
import unittest

import lowband

ROWS, COLS, FACTOR_RANK = 9, 5, 2


def address(values):
    return values.buffer_info()[0]


class Memory:
    """A matrix (ROWS, COLS) and a vector (COLS), with gradients."""

    def __init__(self):
        self.weights = [array.array("d", [1.0] * (ROWS * COLS)), array.array("d", [2.0] * COLS)]
        self.gradients = [array.array("d", [0.0] * (ROWS * COLS)), array.array("d", [0.0] * COLS)]

    def fill(self, value):
        for gradient in self.gradients:
            for i in range(len(gradient)):
                gradient[i] = value + i

    def described(self, cols=COLS):
        shapes = [("matrix", "matrix", ROWS, cols), ("bias", "norm", 1, COLS)]
        return [lowband.Parameter(name, role, rows, columns, address(weight), address(gradient))
                for (name, role, rows, columns), weight, gradient in zip(shapes, self.weights, self.gradients)]


def plain_sgd(world):
    memory = Memory()
    options = lowband.Options(kind="sgd", dtype="float64", sgd_momentum=0.0, weight_decay=0.0)
    optimizer = lowband.Optimizer(world, memory.described(), options)
    assert optimizer.planned_bytes() == (0, 8 * (ROWS * COLS + COLS))
    memory.fill(world.process)  # the mean over processes 0 and 1 is 0.5 + i
    report = optimizer.step(0, learning_rate=0.25, scalar_learning_rate=0.5)
    assert list(memory.weights[0]) == [1 - 0.25 * (0.5 + i) for i in range(ROWS * COLS)]
    assert list(memory.weights[1]) == [2 - 0.5 * (0.5 + i) for i in range(COLS)]
    assert report.clip_scale == 1 and report.skipped_matrices == 0
    assert optimizer.step_bytes("dense", "replica").payload_bytes == 8 * (ROWS * COLS + COLS)
    assert optimizer.step_bytes("factor").payload_bytes == 0
    optimizer.close()


def dion_counts_and_shows_its_state(world):
    memory = Memory()
    optimizer = lowband.Optimizer(world, memory.described(),
                                  lowband.Options(dtype="float64", profile=lowband.explicit({"matrix": FACTOR_RANK})))
    assert optimizer.planned_bytes() == (8 * FACTOR_RANK * (ROWS + COLS), 8 * COLS)
    assert [optimizer.factor_rank(i) for i in range(2)] == [FACTOR_RANK, 0]
    generator = random.Random(world.process)
    for step in range(3):
        for gradient in memory.gradients:
            for i in range(len(gradient)):
                gradient[i] = generator.uniform(-1, 1)
        if step == 1:
            optimizer.gradient_ready(1)
        optimizer.step(step, 0.02, 0.002, diagnose=step == 2)
        assert optimizer.step_bytes("factor", "replica").payload_bytes == 8 * FACTOR_RANK * (ROWS + COLS)
    assert 0 < optimizer.diagnosis(0).captured_energy < 1
    assert optimizer.total_bytes("factor", "replica").payload_bytes == 3 * 8 * FACTOR_RANK * (ROWS + COLS)
    pieces = {piece.name: (piece.rows, piece.cols) for piece in optimizer.state()}
    assert pieces == {"matrix.M": (ROWS, COLS), "matrix.Q": (COLS, FACTOR_RANK), "bias.m": (1, COLS),
                      "bias.v": (1, COLS), "bias.t": (1, 1)}, pieces
    optimizer.close()
    try:
        optimizer.step(3, 0.02, 0.002)
        raise AssertionError("expected a closed optimizer to be refused")
    except lowband.InvalidArgument as error:
        assert "found it closed" in str(error)


def every_kind_takes_the_steps_that_it_plans(world):
    for kind in lowband.optimizer.KINDS:
        memory = Memory()
        profile = lowband.uniform(FACTOR_RANK) if kind in lowband.optimizer.WITH_FACTOR_RANKS else None
        options = lowband.Options(kind=kind, profile=profile, dtype="float64", sign="polar_express_8", dion2_fraction=(1, 2),
                                  muonbp_period=2, galore_interval=2)
        optimizer = lowband.Optimizer(world, memory.described(), options)
        for step in range(3):
            before = list(memory.weights[0])
            for gradient in memory.gradients:
                for i in range(len(gradient)):
                    gradient[i] = 0.5 - (i + step + world.process) % 7 / 6
            planned = optimizer.planned_bytes()
            optimizer.step(step, 0.02, 0.002)
            counted = tuple(optimizer.step_bytes(why, "replica").payload_bytes for why in ("factor", "dense"))
            assert counted == planned, (kind, step, counted, planned)
            assert list(memory.weights[0]) != before, (kind, step)
        optimizer.close()


def blocks_are_matrices_of_their_own(world):
    blocks = (lowband.Block("query", 2), lowband.Block("value", 1))  # by turns

    def trained(name, rows, role, blocks=(), **options):
        options = lowband.Options(dtype="float64", **options)
        weights, gradients = array.array("d", [1.0] * (len(rows) * COLS)), array.array("d", [0.0] * (len(rows) * COLS))
        described = lowband.Parameter(name, role, len(rows), COLS, address(weights), address(gradients), blocks=blocks)
        optimizer = lowband.Optimizer(world, [described], options)
        for step in range(3):
            for i, row in enumerate(rows):
                for j in range(COLS):
                    gradients[i * COLS + j] = (7 * row * row + 3 * j * j + row * j + step * (world.process + 1)) % 11 - 5
            optimizer.step(step, 0.02, 0.002)
            ranks = [optimizer.factor_rank(0, i) for i in range(len(blocks) or 1)]
        optimizer.close()
        assert ranks == [options.profile.ranks[of] if options.profile else 0 for of in described.matrices], ranks
        return {row: list(weights[i * COLS:(i + 1) * COLS]) for i, row in enumerate(rows)}

    for options in (lambda _: {"kind": "muon"}, lambda ranks: {"kind": "dion", "profile": lowband.explicit(ranks)}):
        alone = trained("fused[0]", [row for row in range(ROWS) if row % 3 < 2], "query", **options({"fused[0]": 3}))
        alone.update(trained("fused[1]", list(range(2, ROWS, 3)), "value", **options({"fused[1]": 2})))
        assert trained("fused", list(range(ROWS)), "matrix", blocks, **options({"fused[0]": 3, "fused[1]": 2})) == alone


def unequal_descriptions_are_refused(world):
    try:
        lowband.Optimizer(world, Memory().described(COLS - world.process), lowband.Options(kind="adamw", dtype="float64"))
        raise AssertionError("expected a refusal")
    except lowband.InvalidArgument as error:
        assert "[process 1 of 2] found parameters[0] matrix: matrix, 9 x 4" in str(error), error


def a_process_that_gives_up_is_named(world):
    memory = Memory()
    optimizer = lowband.Optimizer(world, memory.described(), lowband.Options(kind="adamw", dtype="float64"))
    if world.process == 0:
        try:
            optimizer.step(0, 0.1, 0.1)
            raise AssertionError("expected a failure")
        except lowband.PeerFailed as error:
            assert "no more data" in str(error), error
    else:
        world.abort("no more data")
    optimizer.close()


def run(process, port, results):
    try:
        lowband.set_compute_threads(1)
        with lowband.World.from_tcp(process, 2, "localhost", port, token="test", deadline_seconds=30) as world:
            assert (world.process, world.processes) == (process, 2)
            for scenario in (plain_sgd, dion_counts_and_shows_its_state, every_kind_takes_the_steps_that_it_plans,
                             blocks_are_matrices_of_their_own, unequal_descriptions_are_refused, a_process_that_gives_up_is_named):  # the last: it breaks the world
                scenario(world)
        results.put("")
    except BaseException as error:
        results.put(f"process {process}: {type(error).__name__}: {error}")
        raise


class Package(unittest.TestCase):

    def test_needs_no_torch(self):
        self.assertNotIn("torch", sys.modules)
        self.assertEqual(sorted(lowband.features()), ["cuda", "mpi", "ucx"])
        self.assertRegex(lowband.__version__, r"^\d+\.\d+\.\d+$")

    @unittest.skipUnless(lowband.features()["ucx"], "built without UCX")
    def test_two_processes(self):
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        port = 20000 + random.SystemRandom().randrange(10000)
        processes = [context.Process(target=run, args=(process, port, results)) for process in range(2)]
        for process in processes:
            process.start()
        self.assertEqual([results.get(timeout=60) for _ in processes], ["", ""])
        for process in processes:
            process.join(30)
            self.assertEqual(process.exitcode, 0)

    @unittest.skipUnless(lowband.features()["ucx"], "built without UCX")
    def test_a_failing_all_gather_keeps_its_reason(self):

        def fails(_own):
            raise KeyError("no such store")

        with self.assertRaises(lowband.Error) as caught:
            lowband.World.from_all_gather(0, 2, fails)
        self.assertIsInstance(caught.exception.__cause__, KeyError)

    def test_fields_are_checked_before_anything_is_called(self):
        for field, options in {"kind": dict(kind="adam"), "exchange": dict(exchange="some", profile=lowband.uniform(1)),
                               "profile": dict(profile=None), "budget_bytes": dict(budget_bytes=-1, kind="sgd")}.items():
            with self.assertRaisesRegex(lowband.InvalidArgument, f"{field}: found .*expected"):
                lowband.Options(**options)._as_struct()


if __name__ == "__main__":
    unittest.main()
