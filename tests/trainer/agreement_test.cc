#include "trainer/agreement.h"

#include "collectives/local/local_world.h"
#include "tests/trainer/scratch_directory.h"

#include <gmock/gmock.h>

namespace lowband {
namespace {

TEST(RunAgreed, RunsTheActionOnceEverywhere) {
  run_world(3, [](Communicator& world) {
    int runs = 0;
    run_agreed(world, [&runs] { ++runs; });
    EXPECT_EQ(runs, 1);
  });
}

TEST(RunAgreed, AllProcessesThrowTheErrorOfTheLowestThatFailed) {
  run_world(4, [](Communicator& world) {
    const int process = world.process();
    const std::string message = thrown_message<IoError>([&world, process] {
      run_agreed(world, [process] {
        if (process == 1) throw IoError("disk of 1");
        if (process == 3) throw InvalidArgument("argument of 3");
      });
    });
    EXPECT_EQ(message, "process 1: disk of 1");
    run_agreed(world, [] {});  // the group still works
  });
}

TEST(RunAgreed, WhatFailsEverywhereNamesNobody) {
  for (const int processes : {1, 3}) {
    run_world(processes, [](Communicator& world) {
      const std::string message = thrown_message<InvalidArgument>(
          [&world] { run_agreed(world, [] { throw InvalidArgument("model.width: found 0"); }); });
      EXPECT_EQ(message, "model.width: found 0");
    });
  }
}

TEST(RunAgreed, FileSystemErrorsAreTranslated) {
  run_world(2, [](Communicator& world) {
    const std::string message = thrown_message<IoError>(
        [&world] { run_agreed(world, [] { std::filesystem::resize_file("/nonexistent/x", 1); }); });
    EXPECT_EQ(message, "/nonexistent/x: No such file or directory");
  });
}

}  // namespace
}  // namespace lowband
