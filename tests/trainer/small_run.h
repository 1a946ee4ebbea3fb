#pragma once

#include "runtime/random.h"
#include "trainer/config/run_config.h"
#include "trainer/data/token_shards.h"

#include <filesystem>
#include <string>

namespace lowband {

/// Writes a shard of text-like tokens: a Markov chain on 32 letters in which each letter has four likely
/// successors, so that a model has something to learn within a few steps. A pure function of `seed`.
inline void write_markov_shard(const std::filesystem::path& path, Index tokens, std::uint64_t seed) {
  const RandomStream successors(1, "successors"), draws(seed, "draws");
  std::vector<std::uint16_t> ids(static_cast<std::size_t>(tokens));
  std::uint64_t letter = 0;
  for (Index i = 0; i < tokens; ++i) {
    const std::uint64_t bits = draws.bits(i);
    const bool likely = bits % 10 != 0;
    letter = likely ? successors.bits(static_cast<Index>(letter * 4 + bits / 10 % 4)) % 32 : bits / 10 % 32;
    ids[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>('A' + letter);
  }
  TokenShardWriter writer(path);
  writer.append(ids);
  writer.commit();
}

/// A run of a few steps on a model of 25,000 parameters, whose odd sizes divide by none of the meshes below:
/// feed-forward 35, width 20, vocabulary 128; heads 6 for tensor axes of 1, 2, 3.
inline RunConfig small_run(const std::filesystem::path& folder, const MeshShape& mesh) {
  std::filesystem::create_directories(folder);
  write_markov_shard(folder / "train.bin", 20000, 7);
  write_markov_shard(folder / "val.bin", 2000, 8);
  RunConfig config = parse_run_config(R"(
    model { vocabulary: 128 width: 20 layers: 2 heads: 6 head_dim: 4 ffn_width: 35 sequence: 12 }
    batch { sequences_per_step: 12 }
    optimizer { learning_rate: 0.01 scalar_learning_rate: 0.005 }
    profile { kind: UNIFORM rank: 5 }
    schedule { steps: 20 warmup_steps: 4 }
    validation { interval_steps: 10 sequences: 20 }
    hash_interval_steps: 1
    threads: 1)",
                                      "small_run");
  config.mutable_mesh()->set_replica(mesh.replica);
  config.mutable_mesh()->set_shard(mesh.shard);
  config.mutable_mesh()->set_tensor(mesh.tensor);
  config.mutable_data()->add_train((folder / "train.bin").string());
  config.mutable_data()->add_validation((folder / "val.bin").string());
  config.set_output_dir((folder / "runs").string());
  return config;
}

}  // namespace lowband
