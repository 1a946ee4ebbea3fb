#pragma once

#include "runtime/types.h"

#include <filesystem>
#include <string>
#include <vector>

namespace lowband {

struct PrepareOptions {
  /// Text files, and directories whose regular files are all taken, however deep; links in them are not
  /// followed.
  std::vector<std::filesystem::path> corpus;
  /// Ending of the files taken from directories (".pod"); empty takes every file.
  std::string suffix;
  std::filesystem::path output_dir;
  double validation_fraction = 0.05;
};

struct PrepareReport {
  std::filesystem::path train_shard, validation_shard, manifest;
  Index train_tokens = 0;
  Index validation_tokens = 0;
  Index train_documents = 0;
  Index validation_documents = 0;
  Index duplicates = 0;
  bool reused = false;  // the output was there already, made from the same inputs
};

/// Makes train.bin and val.bin of a byte vocabulary (id = byte), with the byte 0 between documents, and
/// MANIFEST.txtpb that names every document with its size and hash.
///
/// Documents are sorted by real path as the C locale does; a second document of equal content is left out.
/// Whole documents are held out for validation: they are visited in the order of the hash of their file name,
/// and each that fits into the fraction still to fill is taken, the smallest one if none fits. Of a single
/// document the last part is held out, cut behind a line.
/// The same inputs give the same files on every machine. The manifest is written last.
///
/// Throws: IoError for a document that cannot be read or is not a regular file and for an unwritable output;
/// InvalidArgument for an empty corpus, a document that contains the byte 0 (named with its offset), or a
/// fraction outside (0, 0.5].
PrepareReport prepare_corpus(const PrepareOptions& options);

}  // namespace lowband
