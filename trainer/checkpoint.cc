#include "trainer/checkpoint.h"

#include "collectives/agreement.h"
#include "trainer/checkpoint.pb.h"
#include "trainer/data/content_hash.h"
#include "trainer/data/files.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include <google/protobuf/text_format.h>

namespace lowband {
namespace {

using std::filesystem::path;

constexpr int kFormatVersion = 1;
constexpr std::string_view kManifestName = "manifest.txtpb";
constexpr std::string_view kStepPrefix = "step-";
constexpr std::string_view kPartialSuffix = ".partial";

std::string numbered(std::string_view prefix, Index number, int digits) {
  char text[32];
  std::snprintf(text, sizeof text, "%0*lld", digits, static_cast<long long>(number));
  return cat(prefix, text);
}

std::string step_name(Index step) { return numbered(kStepPrefix, step, 6); }
std::string file_name(int process) { return numbered("process-", process, 4) + ".bin"; }

// The step of a directory name "step-000100"; nothing for any other name.
std::optional<Index> step_of(const path& directory) {
  const std::string name = directory.filename().string();
  if (!name.starts_with(kStepPrefix)) return std::nullopt;
  const std::string digits = name.substr(kStepPrefix.size());
  if (digits.empty() || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos) {
    return std::nullopt;
  }
  return std::stoll(digits);
}

// May differ where the mesh does: a share of a step that is another has other micro-batches.
constexpr std::string_view kFieldOfTheMesh = "batch.sequences_per_micro_batch";

std::string mesh_text(const MeshShape& mesh) {
  return cat("replica ", mesh.replica, " x shard ", mesh.shard, " x tensor ", mesh.tensor);
}

MeshShape mesh_of(const CheckpointManifest& manifest) {
  return {manifest.mesh().replica(), manifest.mesh().shard(), manifest.mesh().tensor()};
}

CheckpointManifest make_manifest(const CheckpointIdentity& identity, const std::string& config_text,
                                 const CheckpointProgress& progress) {
  CheckpointManifest manifest;
  manifest.set_format_version(kFormatVersion);
  manifest.set_step(progress.step);
  manifest.mutable_mesh()->set_replica(identity.mesh.replica);
  manifest.mutable_mesh()->set_shard(identity.mesh.shard);
  manifest.mutable_mesh()->set_tensor(identity.mesh.tensor);
  manifest.mutable_identity()->insert(identity.fields.begin(), identity.fields.end());
  manifest.mutable_scalars()->insert(progress.scalars.begin(), progress.scalars.end());
  for (const ParameterInfo& info : identity.parameters) {
    auto& parameter = *manifest.add_parameters();
    parameter.set_name(info.name);
    parameter.set_rows(info.rows);
    parameter.set_cols(info.cols);
  }
  manifest.set_config_text(config_text);
  return manifest;
}

// The manifest's first line is a comment that carries the hash of the rest.
std::string hash_line(std::string_view text) { return cat("# XXH64 ", hash_text(content_hash(text)), "\n"); }

void write_manifest(const path& name, const CheckpointManifest& manifest) {
  std::string text;
  google::protobuf::TextFormat::PrintToString(manifest, &text);
  DurableFile file(name);
  file.append(hash_line(text));
  file.append(text);
  file.commit();
}

// Gives the finished directory its name. Between the two renames a previous checkpoint of the same step has
// none, but every older one stands.
void publish(const path& partial, const path& final) {
  const path replaced = final.string() + ".replaced" + std::string(kPartialSuffix);
  std::filesystem::remove_all(replaced);
  if (std::filesystem::exists(final)) std::filesystem::rename(final, replaced);
  std::filesystem::rename(partial, final);
  flush_directory(final.parent_path());
  std::filesystem::remove_all(replaced);
}

CheckpointManifest read_manifest(const path& checkpoint) {
  const path file = checkpoint / kManifestName;
  if (!std::filesystem::is_directory(checkpoint)) {
    throw IoError(cat("checkpoint ", checkpoint.string(), ": found no such directory"));
  }
  if (!std::filesystem::is_regular_file(file)) {
    throw IoError(cat("checkpoint ", checkpoint.string(), ": incomplete: found no ", kManifestName));
  }
  const std::string content(MappedFile(file).text());
  const std::string text = content.substr(std::min(content.size(), content.find('\n') + 1));
  CheckpointManifest manifest;
  if (!content.starts_with(hash_line(text)) ||
      !google::protobuf::TextFormat::ParseFromString(text, &manifest)) {
    throw IoError(cat("checkpoint ", file.string(), ": damaged: does not match its hash"));
  }
  return manifest;
}

void check_identity(const CheckpointManifest& manifest, const CheckpointIdentity& expected,
                    const std::optional<TensorPlaces>& places) {
  LB_EXPECTS(manifest.format_version() == kFormatVersion, "checkpoint format_version: found ",
             manifest.format_version(), ", expected ", kFormatVersion);
  const MeshShape mesh = mesh_of(manifest);
  const bool resharded = places && places->accept(mesh, expected.mesh);
  LB_EXPECTS(resharded || mesh == expected.mesh, "checkpoint mesh: found ", mesh_text(mesh), ", expected ",
             mesh_text(expected.mesh));
  LB_EXPECTS(manifest.files_size() == mesh.processes(), "checkpoint files: found ", manifest.files_size(),
             ", expected ", mesh.processes());

  std::map<std::string, std::string> found(manifest.identity().begin(), manifest.identity().end());
  std::map<std::string, std::string> wanted = expected.fields;
  if (mesh != expected.mesh) {
    found.erase(std::string(kFieldOfTheMesh));
    wanted.erase(std::string(kFieldOfTheMesh));
  }
  for (const auto& [name, value] : wanted) {
    const auto field = found.find(name);
    LB_EXPECTS(field != found.end(), "checkpoint ", name, ": found no such field, expected ", value);
    LB_EXPECTS(field->second == value, "checkpoint ", name, ": found ", field->second, ", expected ", value);
  }
  for (const auto& [name, value] : found) {
    LB_EXPECTS(wanted.contains(name), "checkpoint ", name, ": found ", value, ", expected no such field");
  }

  for (std::size_t i = 0; i < expected.parameters.size(); ++i) {
    const ParameterInfo& info = expected.parameters[i];
    LB_EXPECTS(static_cast<int>(i) < manifest.parameters_size(), "checkpoint parameter ", info.name,
               ": found only ", manifest.parameters_size(), " parameters, expected ",
               expected.parameters.size());
    const auto& parameter = manifest.parameters(static_cast<int>(i));
    LB_EXPECTS(parameter.name() == info.name, "checkpoint parameter ", i, ": found ", parameter.name(),
               ", expected ", info.name);
    LB_EXPECTS(parameter.rows() == info.rows && parameter.cols() == info.cols, "checkpoint parameter ",
               info.name, ": found shape (", parameter.rows(), ", ", parameter.cols(), "), expected (",
               info.rows, ", ", info.cols, ")");
  }
  LB_EXPECTS(manifest.parameters_size() == std::ssize(expected.parameters), "checkpoint parameters: found ",
             manifest.parameters_size(), ", expected ", expected.parameters.size());
}

bool is_complete(const path& checkpoint) {
  try {
    const CheckpointManifest manifest = read_manifest(checkpoint);
    return std::ranges::all_of(manifest.files(), [&checkpoint](const auto& listed) {
      std::error_code missing;
      return static_cast<Index>(std::filesystem::file_size(checkpoint / listed.name(), missing)) ==
             listed.bytes();
    });
  } catch (const IoError&) {
    return false;  // the question was whether it can be read
  }
}

// Complete checkpoints by step.
std::map<Index, path> complete_checkpoints(const path& directory) {
  std::map<Index, path> found;
  std::error_code missing;
  for (const auto& entry : std::filesystem::directory_iterator(directory, missing)) {
    const auto step = step_of(entry.path());
    if (step && is_complete(entry.path())) found.emplace(*step, entry.path());
  }
  return found;
}

}  // namespace

path save_checkpoint(Communicator& world, const path& directory, const CheckpointIdentity& identity,
                     const std::string& config_text, const CheckpointProgress& progress,
                     std::span<const NamedTensor> tensors) {
  LB_EXPECTS(identity.mesh.processes() == world.size(), "checkpoint mesh: found ", identity.mesh.processes(),
             " processes, expected ", world.size());
  path final = directory / step_name(progress.step);
  const path partial = final.string() + std::string(kPartialSuffix);
  const bool first = world.process() == 0;

  agree(world, [&] {
    if (!first) return;
    require_writable_directory(directory);
    std::filesystem::remove_all(partial);
    std::filesystem::create_directory(partial);
  });

  TensorFileReceipt own;
  agree(world, [&] { own = write_tensor_file(partial / file_name(world.process()), tensors); });
  const auto processes = static_cast<std::size_t>(world.size());
  const std::array<std::int64_t, 2> send{own.size_bytes, static_cast<std::int64_t>(own.header_hash)};
  std::vector<std::int64_t> receipts(2 * processes);
  world.all_gather<std::int64_t>(send, receipts, std::vector<Index>(processes, 2), Tag{Purpose::kControl});

  agree(world, [&] {
    if (!first) return;
    CheckpointManifest manifest = make_manifest(identity, config_text, progress);
    for (std::size_t p = 0; p < processes; ++p) {
      auto& file = *manifest.add_files();
      file.set_name(file_name(static_cast<int>(p)));
      file.set_bytes(receipts[2 * p]);
      file.set_header_hash(static_cast<std::uint64_t>(receipts[2 * p + 1]));
    }
    write_manifest(partial / kManifestName, manifest);
    publish(partial, final);
  });
  return final;
}

CheckpointProgress load_checkpoint(Communicator& world, const path& checkpoint,
                                   const CheckpointIdentity& expected, std::span<const NamedTensor> tensors,
                                   const std::optional<TensorPlaces>& places) {
  // Verify everything, agree, then change memory.
  const MeshPosition position = mesh_position(expected.mesh, world.process());
  CheckpointManifest manifest;
  const auto open = [&](int process) {
    const auto& listed = manifest.files(process);
    return std::make_unique<TensorFile>(checkpoint / listed.name(),
                                        TensorFileReceipt{listed.bytes(), listed.header_hash()});
  };
  std::unique_ptr<TensorFile> file;
  std::optional<ReshardedFiles> resharded;
  agree(world, [&] {
    manifest = read_manifest(checkpoint);
    check_identity(manifest, expected, places);
    LB_EXPECTS(world.size() == expected.mesh.processes(), "checkpoint mesh: found ",
               expected.mesh.processes(), " processes, expected ", world.size());
    if (mesh_of(manifest) == expected.mesh) {
      file = open(world.process());
      return file->check(tensors);
    }
    std::vector<std::unique_ptr<TensorFile>> files;
    files.reserve(static_cast<std::size_t>(manifest.files_size()));
    for (int process = 0; process < manifest.files_size(); ++process) files.push_back(open(process));
    resharded.emplace(mesh_of(manifest), std::move(files), *places);
    resharded->check(tensors, expected.mesh, position);
  });

  // A path that names another checkpoint on another machine would pass all of the above.
  std::array<std::int64_t, 2> of_first{manifest.step(),
                                       static_cast<std::int64_t>(manifest.files(0).header_hash())};
  const auto own = of_first;
  world.broadcast<std::int64_t>(of_first, 0, Tag{Purpose::kControl});
  agree(world, [&] {
    LB_EXPECTS(own == of_first, "checkpoint ", checkpoint.string(), ": found step ", own[0],
               " with other content, expected the checkpoint of process 0, step ", of_first[0]);
  });

  resharded ? resharded->copy_to(tensors, expected.mesh, position) : file->copy_to(tensors);
  CheckpointProgress progress;
  progress.mesh = mesh_of(manifest);
  progress.step = manifest.step();
  progress.scalars.insert(manifest.scalars().begin(), manifest.scalars().end());
  return progress;
}

std::optional<path> latest_complete(const path& directory) {
  const auto found = complete_checkpoints(directory);
  if (found.empty()) return std::nullopt;
  return found.rbegin()->second;
}

void keep_latest(const path& directory, Index count) {
  LB_EXPECTS(count >= 1, "checkpoints to keep: found ", count, ", expected at least 1");
  auto found = complete_checkpoints(directory);
  while (std::ssize(found) > count) {
    // The manifest goes first: what is half removed must not look complete.
    const path oldest = found.begin()->second;
    std::filesystem::remove(oldest / kManifestName);
    std::filesystem::remove_all(oldest);
    found.erase(found.begin());
  }
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(kStepPrefix) && name.ends_with(kPartialSuffix)) std::filesystem::remove_all(entry);
  }
}

std::string checkpoint_config_text(const path& checkpoint) { return read_manifest(checkpoint).config_text(); }

}  // namespace lowband
