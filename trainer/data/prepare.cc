#include "trainer/data/prepare.h"

#include "runtime/error.h"
#include "trainer/data/content_hash.h"
#include "trainer/data/corpus_manifest.pb.h"
#include "trainer/data/files.h"
#include "trainer/data/token_shards.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>
#include <string_view>

#include <google/protobuf/text_format.h>

namespace lowband {
namespace {

using Document = CorpusManifest::Document;
using std::filesystem::path;

constexpr int kFormatVersion = 1;
constexpr char kSeparator = '\0';  // occurs in no text file; 0xFF would do as well

constexpr std::string_view kManifestName = "MANIFEST.txtpb";
constexpr std::string_view kTrainName = "train.bin";
constexpr std::string_view kValidationName = "val.bin";

// Real paths of all documents, sorted as bytes, each once.
std::set<std::string> find_documents(const PrepareOptions& options) {
  std::set<std::string> documents;
  for (const path& given : options.corpus) {
    std::error_code error;
    const path real = std::filesystem::canonical(given, error);
    if (error) throw IoError(cat("corpus: ", given.string(), ": cannot open: ", error.message()));
    if (!std::filesystem::is_directory(real)) {
      documents.insert(real.string());
      continue;
    }
    // Links are skipped: perl's folder 5.36 is a link to 5.36.0 and would bring every file twice.
    std::filesystem::recursive_directory_iterator entries(real, error);
    if (error) throw IoError(cat("corpus: ", real.string(), ": cannot list: ", error.message()));
    for (const auto& entry : entries) {
      if (entry.is_symlink() || !entry.is_regular_file()) continue;
      if (entry.path().string().ends_with(options.suffix)) documents.insert(entry.path().string());
    }
  }
  return documents;
}

// Reads every document once: size, hash, and whether it is empty or a duplicate.
CorpusManifest survey(const std::set<std::string>& paths) {
  CorpusManifest manifest;
  manifest.set_format_version(kFormatVersion);
  std::set<std::uint64_t> seen;
  for (const std::string& name : paths) {
    const MappedFile file(name);
    const std::size_t separator = file.text().find(kSeparator);
    LB_EXPECTS(separator == std::string_view::npos, "corpus: ", name, ": found the byte 0x00 at offset ",
               separator, ", expected text (0x00 separates documents)");
    const std::uint64_t hash = content_hash(file.bytes());
    Document& document = *manifest.add_documents();
    document.set_path(name);
    document.set_bytes(std::ssize(file.bytes()));
    document.set_hash(hash_text(hash));
    if (file.bytes().empty()) {
      document.set_use(Document::EMPTY);
    } else if (!seen.insert(hash).second) {
      document.set_use(Document::DUPLICATE);
    }
  }
  return manifest;
}

// Decides which documents are held out for validation.
void hold_out(CorpusManifest& manifest) {
  std::vector<Document*> documents;
  double total_bytes = 0;
  for (Document& document : *manifest.mutable_documents()) {
    if (document.use() != Document::TRAIN) continue;
    documents.push_back(&document);
    total_bytes += static_cast<double>(document.bytes());
  }
  LB_EXPECTS(!documents.empty(), "corpus: found no text in ", manifest.documents_size(),
             " files, expected at least one document");
  if (documents.size() == 1) {
    LB_EXPECTS(documents.front()->bytes() >= 2, "corpus: ", documents.front()->path(),
               ": found a single byte, expected at least two to divide");
    documents.front()->set_use(Document::TRAIN_AND_VALIDATION);
    return;
  }
  // The file name without its folder, so that the choice does not depend on where the corpus lies; equal
  // names stay in path order.
  std::ranges::stable_sort(documents, {}, [](const Document* document) {
    return content_hash(path(document->path()).filename().string());
  });
  double left_bytes = manifest.validation_fraction() * total_bytes;
  bool any = false;
  for (Document* document : documents) {
    const auto bytes = static_cast<double>(document->bytes());
    if (bytes > left_bytes) continue;
    document->set_use(Document::VALIDATION);
    left_bytes -= bytes;
    any = true;
  }
  if (!any) {
    (*std::ranges::min_element(documents, {}, &Document::bytes))->set_use(Document::VALIDATION);
  }
}

// Where the held-out end of a single document begins: behind the last line break before it, in mid-line when
// that would more than double it.
std::size_t cut_position(std::string_view text, double validation_fraction) {
  const double part_bytes = std::round(static_cast<double>(text.size()) * validation_fraction);
  const std::size_t held_out = std::max<std::size_t>(1, static_cast<std::size_t>(part_bytes));
  const std::size_t wanted = text.size() - held_out;
  const std::size_t line_break = text.rfind('\n', wanted - 1);
  const bool near = line_break != std::string_view::npos && line_break + 1 + held_out >= wanted;
  return near ? line_break + 1 : wanted;
}

// The part of a document that goes to one of the two shards.
std::string_view part_of(const Document& document, std::string_view text, bool validation,
                         double validation_fraction) {
  switch (document.use()) {
    case Document::TRAIN:
      return validation ? std::string_view() : text;
    case Document::VALIDATION:
      return validation ? text : std::string_view();
    case Document::TRAIN_AND_VALIDATION: {
      const std::size_t cut = cut_position(text, validation_fraction);
      return validation ? text.substr(cut) : text.substr(0, cut);
    }
    default:
      return {};
  }
}

void write_shard(const path& file, const CorpusManifest& manifest, bool validation,
                 CorpusManifest::Shard& shard) {
  TokenShardWriter writer(file);
  for (const Document& document : manifest.documents()) {
    const MappedFile source(document.path());
    const std::string_view text =
        part_of(document, source.text(), validation, manifest.validation_fraction());
    if (text.empty()) continue;
    if (writer.tokens() > 0) writer.append_bytes(std::string_view(&kSeparator, 1));
    writer.append_bytes(text);
  }
  writer.commit();
  shard.set_file(file.filename().string());
  shard.set_tokens(writer.tokens());
  shard.set_hash(hash_text(content_hash(MappedFile(file).bytes())));
}

// The manifest of an earlier run, if it can be read.
std::optional<CorpusManifest> read_manifest(const path& file) {
  if (!std::filesystem::is_regular_file(file)) return std::nullopt;
  CorpusManifest manifest;
  if (!google::protobuf::TextFormat::ParseFromString(std::string(MappedFile(file).text()), &manifest)) {
    return std::nullopt;
  }
  return manifest;
}

bool shard_intact(const path& directory, const CorpusManifest::Shard& shard) {
  const path file = directory / shard.file();
  return std::filesystem::is_regular_file(file) &&
         hash_text(content_hash(MappedFile(file).bytes())) == shard.hash();
}

// True when `earlier` was made from the documents of `planned` and its shards are still what it says.
bool up_to_date(const path& directory, const CorpusManifest& earlier, const CorpusManifest& planned) {
  CorpusManifest inputs = earlier;
  inputs.clear_train();
  inputs.clear_validation();
  return inputs.SerializeAsString() == planned.SerializeAsString() &&
         shard_intact(directory, earlier.train()) && shard_intact(directory, earlier.validation());
}

PrepareReport report_of(const PrepareOptions& options, const CorpusManifest& manifest, bool reused) {
  PrepareReport report;
  report.train_shard = options.output_dir / kTrainName;
  report.validation_shard = options.output_dir / kValidationName;
  report.manifest = options.output_dir / kManifestName;
  report.train_tokens = manifest.train().tokens();
  report.validation_tokens = manifest.validation().tokens();
  report.reused = reused;
  for (const Document& document : manifest.documents()) {
    const bool both = document.use() == Document::TRAIN_AND_VALIDATION;
    report.train_documents += both || document.use() == Document::TRAIN;
    report.validation_documents += both || document.use() == Document::VALIDATION;
    report.duplicates += document.use() == Document::DUPLICATE;
  }
  return report;
}

}  // namespace

PrepareReport prepare_corpus(const PrepareOptions& options) {
  LB_EXPECTS(options.validation_fraction > 0 && options.validation_fraction <= 0.5,
             "validation_fraction: found ", options.validation_fraction, ", expected a number in (0, 0.5]");
  LB_EXPECTS(!options.corpus.empty(), "corpus: found no path, expected files or directories of text");
  LB_EXPECTS(!options.output_dir.empty(), "output: found no path, expected a directory");

  CorpusManifest manifest = survey(find_documents(options));
  manifest.set_validation_fraction(options.validation_fraction);
  hold_out(manifest);

  const path manifest_file = options.output_dir / kManifestName;
  if (const auto earlier = read_manifest(manifest_file);
      earlier && up_to_date(options.output_dir, *earlier, manifest)) {
    return report_of(options, *earlier, true);
  }

  require_writable_directory(options.output_dir);
  // Without a manifest the directory counts as unfinished, whatever shards it holds.
  std::filesystem::remove(manifest_file);
  write_shard(options.output_dir / kTrainName, manifest, false, *manifest.mutable_train());
  write_shard(options.output_dir / kValidationName, manifest, true, *manifest.mutable_validation());

  std::string text;
  google::protobuf::TextFormat::PrintToString(manifest, &text);
  DurableFile file(manifest_file);
  file.append(text);
  file.commit();
  return report_of(options, manifest, false);
}

}  // namespace lowband
