// chat-links.cpp - what the chat parser calls of the rest of llama.cpp's common library, which is not built: a log, in which
// nothing is said, and work on strings

#include "common.h"
#include "log.h"

#include "mobile-error.h"

#include <string>
#include <vector>

// below every level: the macros ask before they write
int common_log_get_verbosity_thold(void) {
    return -1;
}

struct common_log * common_log_main() {
    return nullptr;
}

void common_log_add(struct common_log * /* log */, enum ggml_log_level /* level */, const char * /* fmt */, ...) {
}

std::string string_join(const std::vector<std::string> & values, const std::string & separator) {
    std::string joined;
    for (size_t i = 0; i < values.size(); ++i) {
        joined += i > 0 ? separator + values[i] : values[i];
    }
    return joined;
}

std::vector<std::string> string_split(const std::string & str, const std::string & delimiter) {
    std::vector<std::string> parts;
    size_t begin = 0;
    for (size_t end; (end = str.find(delimiter, begin)) != std::string::npos; begin = end + delimiter.size()) {
        parts.push_back(str.substr(begin, end - begin));
    }
    parts.push_back(str.substr(begin));
    return parts;
}

std::string string_repeat(const std::string & str, size_t n) {
    std::string repeated;
    repeated.reserve(n * str.size());
    for (size_t i = 0; i < n; ++i) {
        repeated += str;
    }
    return repeated;
}

void string_replace_all(std::string & s, const std::string & search, const std::string & replace) {
    for (size_t at = 0; !search.empty() && (at = s.find(search, at)) != std::string::npos; at += replace.size()) {
        s.replace(at, search.size(), replace);
    }
}

// of a model's vocabulary: there is no model here

[[noreturn]] static void refuse_vocabulary() {
    mobile_throw(MOBILE_ERR_INTERNAL, "the chat parser asks for the tokens of a model, and there is none");
}

std::string common_token_to_piece(const struct llama_vocab * /* vocab */, llama_token /* token */, bool /* special */) {
    refuse_vocabulary();
}

std::vector<llama_token> common_tokenize(const struct llama_vocab * /* vocab */, const std::string & /* text */, bool /* add_special */, bool /* parse_special */) {
    refuse_vocabulary();
}
