#include "trainer/checkpoint.h"

#include "collectives/local/local_world.h"
#include "runtime/buffer.h"
#include "tests/trainer/scratch_directory.h"

#include <cstdint>
#include <functional>

#include <gmock/gmock.h>

namespace lowband {
namespace {

using std::filesystem::path;
using testing::HasSubstr;

// What one process of a run would save: tensors of three types, one of them empty, with values that tell the
// process and the element.
struct ProcessState {
  Buffer<float> weight{15};
  Buffer<double> momentum{6};
  Buffer<std::int64_t> counters{3};
  Buffer<float> nothing{0};

  explicit ProcessState(int process) { set(process); }

  void set(int process) {
    for (Index i = 0; i < 15; ++i)
      weight[i] = static_cast<float>(process * 1000) + 0.1F * static_cast<float>(i);
    for (Index i = 0; i < 6; ++i) momentum[i] = process * 1000 - 1.0 / static_cast<double>(i + 1);
    for (Index i = 0; i < 3; ++i) counters[i] = (std::int64_t{1} << 60) + process * 1000 + i;
  }

  std::vector<NamedTensor> tensors() {
    return {named_tensor("model.a.weight", weight.matrix(0, 5, 3)),
            named_tensor("model.a.weight.M", momentum.matrix(0, 2, 3)),
            named_tensor("counters", counters.matrix(0, 1, 3)),
            named_tensor("empty", nothing.matrix(0, 0, 4))};
  }

  std::string bytes() {
    std::string all;
    for (const NamedTensor& tensor : tensors()) {
      all.append(reinterpret_cast<const char*>(tensor.data), static_cast<std::size_t>(tensor.size_bytes()));
    }
    return all;
  }
};

CheckpointIdentity identity_of(MeshShape mesh) {
  return {mesh,
          {{"model.width", "64"}, {"optimizer.kind", "DION"}},
          {{"model.a.weight", Role::kQuery, 10, 3, TensorCut::kRows}, {"model.norm", Role::kNorm, 1, 3}}};
}

constexpr MeshShape kTwoByTwo{2, 1, 2};
constexpr const char* kConfig = "model { width: 64 }  # a comment stays\n";

path save(const path& directory, Index step, MeshShape mesh = kTwoByTwo) {
  path saved;
  run_world(mesh.processes(), [&](Communicator& world) {
    ProcessState state(world.process());
    const path result = save_checkpoint(world, directory, identity_of(mesh), kConfig,
                                        {step, {{"tokens", 1e15 + 1}, {"best_loss", 0.1}}}, state.tensors());
    if (world.process() == 0) saved = result;
  });
  return saved;
}

// Loads on every process of `kTwoByTwo`, expects `Exception` on all of them with equal messages, and that no
// process has changed a byte. Returns the message.
template <class Exception>
std::string refused(const path& checkpoint, const CheckpointIdentity& expected,
                    const std::function<void(std::vector<NamedTensor>&, int process)>& change = {}) {
  std::vector<std::string> messages(4);
  run_world(4, [&](Communicator& world) {
    ProcessState state(77);
    const std::string before = state.bytes();
    auto tensors = state.tensors();
    if (change) change(tensors, world.process());
    messages[static_cast<std::size_t>(world.process())] =
        thrown_message<Exception>([&] { load_checkpoint(world, checkpoint, expected, tensors); });
    EXPECT_EQ(state.bytes(), before);
  });
  EXPECT_THAT(messages, testing::Each(messages.front()));
  return messages.front();
}

std::string refused_io(const path& checkpoint) {
  return refused<InvalidArgument>(checkpoint, identity_of(kTwoByTwo));
}

void flip_bit(const path& file, Index offset) {
  std::string bytes = read_text(file);
  bytes.at(static_cast<std::size_t>(offset)) ^= 4;
  std::ofstream(file, std::ios::binary) << bytes;
}

class Checkpoint : public testing::Test {
 protected:
  const ScratchDirectory scratch_;
  const path directory_ = scratch_.path() / "run" / "checkpoints";
};

TEST_F(Checkpoint, ReturnsEveryBitToEveryProcess) {
  for (const MeshShape mesh : {MeshShape{1, 1, 1}, MeshShape{1, 3, 1}, kTwoByTwo, MeshShape{7, 1, 1}}) {
    const path saved = save(directory_, 100, mesh);
    EXPECT_EQ(saved, directory_ / "step-000100");
    run_world(mesh.processes(), [&](Communicator& world) {
      ProcessState loaded(77);
      const CheckpointProgress progress = load_checkpoint(world, saved, identity_of(mesh), loaded.tensors());
      EXPECT_EQ(loaded.bytes(), ProcessState(world.process()).bytes());
      EXPECT_EQ(progress.step, 100);
      EXPECT_EQ(progress.scalars, (std::map<std::string, double>{{"tokens", 1e15 + 1}, {"best_loss", 0.1}}));
    });
    EXPECT_EQ(checkpoint_config_text(saved), kConfig);
  }
}

TEST_F(Checkpoint, LeavesNothingBesideTheCheckpoint) {
  save(directory_, 5);
  const path saved = save(directory_, 5);  // replaces
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory_), {}), 1);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(saved), {}), 5);
}

TEST_F(Checkpoint, EveryDamagedByteIsFound) {
  const path saved = save(directory_, 5, {1, 1, 1});
  const auto loads = [&saved] {
    run_world(1, [&saved](Communicator& world) {
      ProcessState state(77);
      load_checkpoint(world, saved, identity_of({1, 1, 1}), state.tensors());
    });
  };
  loads();
  const path file = saved / "process-0000.bin";
  const Index size = std::ssize(read_text(file));
  // Bytes of padding carry nothing; the 60 + 48 + 24 bytes of elements and the header do. Data begins at the
  // last multiple of 64 that leaves room for three tensors of one line each (the empty one takes none).
  const Index data_begin = size - 3 * 64;
  const Index header_bytes = static_cast<Index>(static_cast<std::uint8_t>(read_text(file)[8]));
  std::vector<Index> offsets;
  for (Index i = 0; i < 24 + header_bytes; ++i) offsets.push_back(i);
  for (Index i = 0; i < 60; ++i) offsets.push_back(data_begin + i);
  for (Index i = 0; i < 48; ++i) offsets.push_back(data_begin + 64 + i);
  for (Index i = 0; i < 24; ++i) offsets.push_back(data_begin + 128 + i);
  for (const Index offset : offsets) {
    flip_bit(file, offset);
    EXPECT_THROW(loads(), InvalidArgument) << "byte " << offset << " of " << size;
    flip_bit(file, offset);
  }
  loads();
  const path manifest = saved / "manifest.txtpb";
  for (Index offset = 0; offset < std::ssize(read_text(manifest)); offset += 7) {
    flip_bit(manifest, offset);
    EXPECT_THROW(loads(), InvalidArgument) << "manifest byte " << offset;
    flip_bit(manifest, offset);
  }
}

TEST_F(Checkpoint, DamageOnOneProcessStopsAllAndNamesIt) {
  const path saved = save(directory_, 5);
  flip_bit(saved / "process-0002.bin", std::ssize(read_text(saved / "process-0002.bin")) - 64);
  EXPECT_THAT(refused_io(saved), testing::AllOf(HasSubstr("[process 2 of 4] "),
                                                HasSubstr("process-0002.bin: counters: damaged")));
}

TEST_F(Checkpoint, NamesWhatIsMissingOrTruncated) {
  const path saved = save(directory_, 5);
  const path file = saved / "process-0003.bin";
  const std::string bytes = read_text(file);
  std::filesystem::resize_file(file, bytes.size() - 1);
  EXPECT_THAT(refused_io(saved), HasSubstr(cat("process-0003.bin: file size: found ", bytes.size() - 1,
                                               " bytes, expected ", bytes.size())));
  std::filesystem::remove(file);
  EXPECT_THAT(refused_io(saved), HasSubstr("process-0003.bin: cannot open: No such file"));
  std::filesystem::remove(saved / "manifest.txtpb");
  EXPECT_THAT(refused_io(saved), HasSubstr("incomplete: found no manifest.txtpb"));
  EXPECT_THAT(refused_io(directory_ / "step-000006"), HasSubstr("found no such directory"));
}

TEST_F(Checkpoint, RefusesAnotherMeshOrModelNamingTheField) {
  const path saved = save(directory_, 5);
  const auto message = [&saved](const std::function<void(CheckpointIdentity&)>& change) {
    CheckpointIdentity expected = identity_of(kTwoByTwo);
    change(expected);
    return refused<InvalidArgument>(saved, expected);
  };
  EXPECT_EQ(message([](auto& expected) {
              expected.mesh = {2, 2, 1};
            }),
            "checkpoint mesh: found replica 2 x shard 1 x tensor 2, expected replica 2 x shard 2 x tensor 1");
  EXPECT_EQ(message([](auto& expected) { expected.fields["model.width"] = "128"; }),
            "checkpoint model.width: found 64, expected 128");
  EXPECT_EQ(message([](auto& expected) { expected.fields["model.layers"] = "2"; }),
            "checkpoint model.layers: found no such field, expected 2");
  EXPECT_EQ(message([](auto& expected) { expected.fields.erase("optimizer.kind"); }),
            "checkpoint optimizer.kind: found DION, expected no such field");
  EXPECT_EQ(message([](auto& expected) { expected.parameters[1].name = "model.norm2"; }),
            "checkpoint parameter 1: found model.norm, expected model.norm2");
  EXPECT_EQ(message([](auto& expected) { expected.parameters[0].rows = 12; }),
            "checkpoint parameter model.a.weight: found shape (10, 3), expected (12, 3)");
  EXPECT_EQ(message([](auto& expected) { expected.parameters.pop_back(); }),
            "checkpoint parameters: found 2, expected 1");
  EXPECT_EQ(message([](auto& expected) { expected.parameters.push_back(expected.parameters[0]); }),
            "checkpoint parameter model.a.weight: found only 2 parameters, expected 3");
}

TEST_F(Checkpoint, RefusesOtherTensorsEvenOnOneProcess) {
  const path saved = save(directory_, 5);
  const auto message = [&saved](const std::function<void(std::vector<NamedTensor>&)>& change) {
    return refused<InvalidArgument>(saved, identity_of(kTwoByTwo), [&change](auto& tensors, int process) {
      if (process == 1) change(tensors);
    });
  };
  EXPECT_THAT(message([](auto& tensors) { tensors[1].name = "model.a.weight.Q"; }),
              HasSubstr("process-0001.bin: tensor 1: found model.a.weight.M, expected model.a.weight.Q"));
  EXPECT_THAT(message([](auto& tensors) { tensors[2].dtype = DType::kF64; }),
              HasSubstr("counters: dtype: found i64, expected f64"));
  EXPECT_THAT(message([](auto& tensors) { std::swap(tensors[0].rows, tensors[0].cols); }),
              HasSubstr("model.a.weight: shape: found (5, 3), expected (3, 5)"));
  EXPECT_THAT(message([](auto& tensors) { tensors.pop_back(); }), HasSubstr("found 4 tensors, expected 3"));
  EXPECT_THAT(message([](auto& tensors) { tensors.pop_back(); }), testing::StartsWith("[process 1 of 4] "));
}

TEST_F(Checkpoint, LatestIsTheHighestCompleteStep) {
  EXPECT_EQ(latest_complete(directory_), std::nullopt);
  save(directory_, 5, {1, 1, 1});
  save(directory_, 1000000, {1, 1, 1});  // one digit more than the name is padded to
  save(directory_, 20, {1, 1, 1});
  EXPECT_EQ(latest_complete(directory_), directory_ / "step-1000000");
  std::filesystem::remove(directory_ / "step-1000000" / "manifest.txtpb");
  EXPECT_EQ(latest_complete(directory_), directory_ / "step-000020");
  std::filesystem::resize_file(directory_ / "step-000020" / "process-0000.bin", 10);
  EXPECT_EQ(latest_complete(directory_), directory_ / "step-000005");
}

TEST_F(Checkpoint, InterruptedSavesAreIgnoredAndCleanedUp) {
  const path saved = save(directory_, 5, {1, 1, 1});
  const path partial = directory_ / "step-000009.partial";
  std::filesystem::copy(saved, partial);
  EXPECT_EQ(latest_complete(directory_), saved);
  save(directory_, 9, {1, 1, 1});
  EXPECT_FALSE(std::filesystem::exists(partial));
  EXPECT_EQ(latest_complete(directory_), directory_ / "step-000009");
  std::filesystem::copy(saved, directory_ / "step-000010.partial");
  keep_latest(directory_, 5);
  EXPECT_FALSE(std::filesystem::exists(directory_ / "step-000010.partial"));
}

TEST_F(Checkpoint, KeepsTheNewest) {
  for (const Index step : {10, 20, 30, 40}) save(directory_, step, {1, 1, 1});
  keep_latest(directory_, 2);
  EXPECT_FALSE(std::filesystem::exists(directory_ / "step-000010"));
  EXPECT_FALSE(std::filesystem::exists(directory_ / "step-000020"));
  EXPECT_TRUE(std::filesystem::exists(directory_ / "step-000030"));
  EXPECT_TRUE(std::filesystem::exists(directory_ / "step-000040"));
}

TEST_F(Checkpoint, UnwritableDirectoryStopsAllProcesses) {
  scratch_.write("run", "a file in the way");
  run_world(4, [&](Communicator& world) {
    ProcessState state(world.process());
    EXPECT_THAT(thrown_message<InvalidArgument>([&] {
                  save_checkpoint(world, directory_, identity_of(kTwoByTwo), kConfig, {}, state.tensors());
                }),
                testing::AllOf(testing::StartsWith("[process 0 of 4] "),
                               HasSubstr("run/checkpoints: cannot create")));
  });
}

TEST_F(Checkpoint, ModelAndOptimizerStateKeepTheirNames) {
  Buffer<float> memory(12);
  std::vector<Parameter<float>> parameters(1);
  parameters[0].info.name = "model.norm.weight";
  parameters[0].weight = memory.matrix(0, 1, 4);
  const auto weights = checkpoint_tensors<float>(parameters);
  EXPECT_EQ(weights.at(0).name, "model.norm.weight");
  EXPECT_EQ(weights.at(0).size_bytes(), 16);
  const std::vector<StateTensor<float>> state{{"model.norm.weight.m", memory.matrix(4, 2, 4)}};
  EXPECT_EQ(checkpoint_tensors<float>(state).at(0).rows, 2);
  const std::vector<StateTensor<float>> strided{{"x.Q", MatrixView<float>(memory.data(), 2, 3, 4)}};
  EXPECT_THAT(thrown_message<InvalidArgument>([&] { checkpoint_tensors<float>(strided); }),
              HasSubstr("x.Q: found a row stride of 4, expected 3"));
}

}  // namespace
}  // namespace lowband
