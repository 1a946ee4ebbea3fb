#include "launcher/commands.h"
#include "runtime/error.h"
#include "runtime/json.h"
#include "trainer/data/prepare.h"

#include <cstdlib>
#include <iostream>

namespace lowband {

int data_command(Arguments arguments) {
  const bool json = arguments.flag("json");
  PrepareOptions options;
  options.output_dir = arguments.option("out");
  options.suffix = arguments.option("suffix");
  const std::string fraction = arguments.option("validation-fraction", "0.05");
  char* end = nullptr;
  options.validation_fraction = std::strtod(fraction.c_str(), &end);
  LB_EXPECTS(*end == '\0' && !fraction.empty(), "--validation-fraction: found ", fraction,
             ", expected a number");
  auto words = arguments.positional();
  LB_EXPECTS(!words.empty() && words[0] == "prepare", "data: found '", words.empty() ? "" : words[0],
             "', expected prepare");
  LB_EXPECTS(!options.output_dir.empty(), "--out: found nothing, expected a folder");
  options.corpus.assign(words.begin() + 1, words.end());

  const PrepareReport report = prepare_corpus(options);
  if (json) {
    std::cout << "{\"train\":" << json_string(report.train_shard.string())
              << ",\"validation\":" << json_string(report.validation_shard.string())
              << ",\"train_tokens\":" << report.train_tokens
              << ",\"validation_tokens\":" << report.validation_tokens
              << ",\"train_documents\":" << report.train_documents
              << ",\"validation_documents\":" << report.validation_documents
              << ",\"duplicates\":" << report.duplicates
              << ",\"reused\":" << (report.reused ? "true" : "false") << "}\n";
    return 0;
  }
  std::cout << (report.reused ? "reused " : "wrote ") << report.train_shard.string() << ": "
            << report.train_tokens << " tokens of " << report.train_documents << " documents\n"
            << (report.reused ? "reused " : "wrote ") << report.validation_shard.string() << ": "
            << report.validation_tokens << " tokens of " << report.validation_documents
            << " documents held out\n";
  if (report.duplicates > 0)
    std::cout << report.duplicates << " documents left out: same content as another\n";
  return 0;
}

}  // namespace lowband
