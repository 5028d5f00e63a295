#pragma once
// `pith tokenize`: text in, a token corpus (data/corpus.h) out. Parallel, deterministic, resumable.

#include "core/error.h"

namespace pith {

struct TokenizeOptions {
  std::string tokenizer;            // tokenizer.json, or a directory holding one
  std::vector<std::string> inputs;  // files, directories, or "-" for stdin
  std::vector<std::string> globs;   // fnmatch patterns on file name or path, inside directories
  std::string text_key = "text";    // of .jsonl, .jsonl.gz, .jsonl.zst: one document per line
  bool eos = true;                  // append the end-of-text id to every document
  int workers = 0;                  // threads; 0 = all cores
  std::string output;               // prefix: PREFIX.bin, PREFIX.idx, PREFIX.tokenize.json
};

struct TokenizeResult {
  std::string output;
  int64_t chunks = 0, documents = 0, tokens = 0, bytes = 0;  // bytes of document text
  int64_t continued = 0;    // documents that an interrupted run had done
  double seconds = 0;       // of this run
  bool up_to_date = false;  // the output was there and nothing was done
  std::string str() const;  // one line for the user
};

// A file is one document, but for .jsonl, .jsonl.gz and .jsonl.zst, which have one per line; stdin
// is .jsonl if its first character that is not white is "{", else one document. Documents without a
// token are left out. Directories are walked in order of path, each once (no cycles), without names
// that begin with a dot; where no glob is given, files that look binary are left out too.
//
// The output is the same for every number of workers. After a kill, a rerun with the same options
// and inputs (by size and time) continues where PREFIX.tokenize.partial says; with others it says
// so on stderr and starts again. Progress goes to stderr. Bad input (a malformed JSON line, no
// documents, ...) is an InputError and leaves nothing under the final names.
TokenizeResult tokenize_corpus(const TokenizeOptions& options);

}  // namespace pith
