// engine_job.cpp - runs a job on the engine without Python, so that libraries of two systems can be held against each other.
//
//     engine_job JOB OUT
//
// JOB is a text in UTF-8, a line a step, with the step's word first; OUT is a folder for what steps save, numbers as they lie
// in memory. Results are lines on stdout, "NAME VALUE"; a step that fails is a result, too. See `STEPS` at the end.

#include "ggml.h"
#include "llama.h"
#include "mobile-chat.h"
#include "mobile.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#if defined(_WIN32)
#include <fcntl.h>
#include <io.h>
#include <windows.h>
#else
#include <unistd.h>
#endif

static std::string         g_out;
static mobile_load_params  g_params;
static bool                g_has_store = false;
static int                 g_threads   = 1;
static llama_model *       g_model     = nullptr;
static llama_context *     g_ctx       = nullptr;
static int32_t             g_n_vocab   = 0;
static std::string         g_log;     // errors since the last load began

static std::string one_line(std::string text) {
    std::replace(text.begin(), text.end(), '\n', ' ');
    return text;
}

static void say(const std::string & name, const std::string & value) {
    printf("%s %s\n", name.c_str(), one_line(value).c_str());
    fflush(stdout);
}

static void say(const std::string & name, int64_t value) {
    say(name, std::to_string(value));
}

[[noreturn]] static void refuse(const std::string & what) {
    fprintf(stderr, "engine_job: %s\n", what.c_str());
    exit(2);
}

// names are UTF-8 on every system
static FILE * open_file(const std::string & path, const char * mode) {
    FILE * file = ggml_fopen(path.c_str(), mode);
    if (!file) {
        refuse("cannot open " + path);
    }
    return file;
}

static std::string read_file(const std::string & path) {
    FILE * file = open_file(path, "rb");
    std::string text;
    char block[4096];
    for (size_t n; (n = fread(block, 1, sizeof(block), file)) > 0;) {
        text.append(block, n);
    }
    fclose(file);
    return text;
}

static void save(const std::string & name, const void * data, size_t n_bytes) {
    FILE * file = open_file(g_out + "/" + name, "wb");
    if (fwrite(data, 1, n_bytes, file) != n_bytes || fclose(file) != 0) {
        refuse("cannot write " + name);
    }
}

static std::string rest_of(std::istringstream & words) {
    std::string text;
    std::getline(words >> std::ws, text);
    return text;
}

static void unload() {
    llama_free(g_ctx);
    llama_model_free(g_model);
    g_ctx   = nullptr;
    g_model = nullptr;
}

// param NAME VALUE: of the loads to come; store off: they have none
static void do_param(std::istringstream & words) {
    std::string name;
    uint64_t value = 0;
    words >> name >> value;
    g_has_store = true;
    if      (name == "budget_bytes") { g_params.budget_bytes = value; }
    else if (name == "n_io_threads") { g_params.n_io_threads = (int32_t) value; }
    else if (name == "eviction")     { g_params.eviction     = (int32_t) value; }
    else if (name == "io")           { g_params.io           = (int32_t) value; }
    else if (name == "prefault")     { g_params.prefault     = (int32_t) value; }
    else { refuse("no such parameter: " + name); }
}

static void do_plain(std::istringstream &) {
    g_has_store = false;
}

static void do_threads(std::istringstream & words) {
    words >> g_threads;
}

static void say_info() {
    mobile_model_info info = {};
    if (mobile_model_get_info(g_model, &info) != MOBILE_OK) {
        return;
    }
    const std::pair<const char *, uint64_t> fields[] = {
        { "expert_bytes", info.expert_bytes }, { "budget_bytes", info.budget_bytes }, { "budget_min_bytes", info.budget_min_bytes },
        { "budget_all_bytes", info.budget_all_bytes }, { "n_layer", info.n_layer }, { "n_layer_moe", info.n_layer_moe },
        { "n_expert", info.n_expert }, { "n_expert_used", info.n_expert_used }, { "direct_io", info.direct_io },
    };
    for (const auto & [name, value] : fields) {
        say(std::string("info.") + name, (int64_t) value);
    }
}

// load PATH: a model and a context
static void do_load(std::istringstream & words) {
    unload();
    g_log.clear();
    const std::string path = rest_of(words);
    if (g_has_store && mobile_load_set_params(&g_params) != MOBILE_OK) {
        refuse(mobile_last_error());
    }
    llama_model_params params = llama_model_default_params();
    params.load_mode       = LLAMA_LOAD_MODE_NONE;
    params.use_extra_bufts = false; // weights as the file has them
    g_model = llama_model_load_from_file(path.c_str(), params);
    if (!g_model) {
        say("load", "failed");
        say("load.error", *mobile_last_error() ? mobile_last_error() : g_log);
        return;
    }
    llama_context_params context = llama_context_default_params();
    context.n_ctx = context.n_batch = 640;
    context.n_threads = context.n_threads_batch = g_threads;
    g_ctx = llama_init_from_model(g_model, context);
    if (!g_ctx) {
        refuse("no context for " + path);
    }
    g_n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(g_model));
    say("load", "ok");
    say_info();
}

static llama_context * context() {
    if (!g_ctx) {
        refuse("a step needs a model that has been loaded");
    }
    return g_ctx;
}

static std::vector<llama_token> tokens_of(std::istringstream & words) {
    std::vector<llama_token> tokens;
    for (llama_token token; words >> token;) {
        tokens.push_back(token);
    }
    return tokens;
}

static int32_t decode(const llama_token * tokens, int n, int pos, std::vector<float> & logits) {
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = pos + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = true;
    }
    int32_t result = 0;
    const int32_t status = mobile_decode(context(), batch, &result);
    llama_batch_free(batch);
    if (status == MOBILE_OK && result == 0) {
        const float * rows = llama_get_logits(g_ctx);
        logits.insert(logits.end(), rows, rows + (size_t) n*g_n_vocab);
    }
    return status != MOBILE_OK ? status : result;
}

static void finish(const std::string & name, int32_t result, const std::vector<float> & logits) {
    save(name, logits.data(), logits.size()*sizeof(float));
    say(name + ".rc", result);
    say(name + ".error", mobile_context_error(g_ctx));
}

// batch NAME POS TOKEN...: saves float32 [n_tokens][n_vocab]
static void do_batch(std::istringstream & words) {
    std::string name;
    int pos = 0;
    words >> name >> pos;
    const std::vector<llama_token> tokens = tokens_of(words);
    std::vector<float> logits;
    finish(name, decode(tokens.data(), (int) tokens.size(), pos, logits), logits);
}

// steps NAME POS TOKEN...: the same, one decode for each token, until one fails
static void do_steps(std::istringstream & words) {
    std::string name;
    int pos = 0;
    words >> name >> pos;
    int32_t result = 0;
    std::vector<float> logits;
    for (llama_token token : tokens_of(words)) {
        result = decode(&token, 1, pos++, logits);
        if (result != 0) {
            break;
        }
    }
    finish(name, result, logits);
}

static void do_clear(std::istringstream &) {
    llama_memory_clear(llama_get_memory(context()), true);
}

// little K: tokens from now on use K experts at most; 0: all
static void do_little(std::istringstream & words) {
    int32_t k = 0;
    words >> k;
    say("little", mobile_set_n_expert_used(context(), k));
}

// counters NAME: since the last of these
static void do_counters(std::istringstream & words) {
    std::string name;
    words >> name;
    mobile_counters c = {};
    say(name + ".status", mobile_get_counters(context(), &c));
    const std::pair<const char *, uint64_t> fields[] = {
        { "n_tokens", c.n_tokens }, { "n_hits", c.n_hits }, { "n_misses", c.n_misses }, { "n_evictions", c.n_evictions },
        { "bytes_read", c.bytes_read }, { "bytes_routed", c.bytes_routed }, { "resident_bytes", c.resident_bytes },
        { "resident_bytes_peak", c.resident_bytes_peak },
    };
    for (const auto & [field, value] : fields) {
        say(name + "." + field, (int64_t) value);
    }
    mobile_reset_counters(g_ctx);
}

// trace PATH: records until the next `trace`, without a path
static void do_trace(std::istringstream & words) {
    const std::string path = rest_of(words);
    say("trace", path.empty() ? mobile_trace_stop(context()) : mobile_trace_start(context(), path.c_str()));
}

// truncate BYTES PATH
static void do_truncate(std::istringstream & words) {
    uint64_t n_bytes = 0;
    words >> n_bytes;
    FILE * file = open_file(rest_of(words), "r+b");
#if defined(_WIN32)
    const bool ok = _chsize_s(_fileno(file), (int64_t) n_bytes) == 0;
#else
    const bool ok = ftruncate(fileno(file), (off_t) n_bytes) == 0;
#endif
    fclose(file);
    say("truncate", ok ? 0 : 1);
}

// try PATH: as mobile_try_file, with zeros for weights
static void do_try(std::istringstream & words) {
    say("try", mobile_try_file(rest_of(words).c_str()));
    say("try.error", mobile_last_error());
}

// promised NAME: bytes that the system has promised to this process; 0 where it counts what is used, and not what is promised
static void do_promised(std::istringstream & words) {
    std::string name;
    words >> name;
    uint64_t bytes = 0;
#if defined(_WIN32)
    MEMORY_BASIC_INFORMATION info;
    for (char * at = nullptr; VirtualQuery(at, &info, sizeof(info)); at = (char *) info.BaseAddress + info.RegionSize) {
        bytes += info.State == MEM_COMMIT && info.Type == MEM_PRIVATE ? info.RegionSize : 0;
    }
#endif
    say(name, (int64_t) bytes);
}

static void save_text(const std::string & name, char * text) {
    say(name, text ? "" : mobile_last_error());
    save(name, text ? text : "", text ? strlen(text) : 0);
    mobile_chat_text_free(text);
}

// chat NAME TEMPLATE REQUEST, paths without spaces: saves the answer of mobile_chat_apply
static void do_chat(std::istringstream & words) {
    std::string name, source, request;
    words >> name >> source >> request;
    char * answer = nullptr;
    mobile_chat_template * chat = mobile_chat_template_init(read_file(source).c_str(), "<s>", "</s>");
    if (chat) {
        mobile_chat_apply(chat, read_file(request).c_str(), &answer);
    }
    save_text(name, answer);
    mobile_chat_template_free(chat);
}

// parse NAME PARSER TEXT, paths likewise: saves the message of mobile_chat_parse
static void do_parse(std::istringstream & words) {
    std::string name, source, said;
    words >> name >> source >> said;
    const std::string text = read_file(said);
    char * message = nullptr;
    mobile_chat_parser * parser = mobile_chat_parser_init(read_file(source).c_str());
    if (parser) {
        mobile_chat_parse(parser, text.data(), text.size(), false, &message);
    }
    save_text(name, message);
    mobile_chat_parser_free(parser);
}

static void do_unload(std::istringstream &) {
    unload();
}

static const std::map<std::string, void (*)(std::istringstream &)> STEPS = {
    { "param", do_param },     { "plain", do_plain },       { "threads", do_threads },   { "load", do_load },
    { "batch", do_batch },     { "steps", do_steps },       { "clear", do_clear },       { "little", do_little },
    { "counters", do_counters }, { "trace", do_trace },     { "truncate", do_truncate }, { "try", do_try },
    { "promised", do_promised }, { "chat", do_chat },       { "parse", do_parse },
    { "unload", do_unload },
};

int main(int argc, char ** argv) {
    if (argc != 3) {
        refuse("engine_job JOB OUT");
    }
#if defined(_WIN32)
    _setmode(_fileno(stdout), O_BINARY);
#endif
    g_out    = argv[2];
    g_params = mobile_load_default_params();
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            g_log += text;
        }
    }, nullptr);
    llama_backend_init();
    std::istringstream job(read_file(argv[1]));
    for (std::string line; std::getline(job, line);) {
        std::istringstream words(line);
        std::string word;
        if (!(words >> word)) {
            continue;
        }
        const auto step = STEPS.find(word);
        if (step == STEPS.end()) {
            refuse("no such step: " + word);
        }
        step->second(words);
    }
    unload();
    llama_backend_free();
    say("end", mobile_abi_version());
    return 0;
}
