// chat-api.cpp - the C API of mobile-chat.h over common/chat.h

#include "mobile-chat.h"
#include "mobile-error.h"

#include "chat.h"
#include "json.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

using json = common_json;

struct mobile_chat_template {
    common_chat_templates_ptr templates;
};

struct mobile_chat_parser {
    common_chat_parser_params params;
};

static void give(const json & value, char ** text) {
    const std::string made = value.dump();
    char * copy = (char *) malloc(made.size() + 1);
    if (!copy) {
        throw std::bad_alloc();
    }
    memcpy(copy, made.c_str(), made.size() + 1);
    *text = copy;
}

static common_chat_templates_inputs read_request(const json & request) {
    common_chat_templates_inputs inputs;
    inputs.messages = common_chat_msgs_parse_oaicompat(request.at("messages"));
    if (request.contains("tools")) {
        inputs.tools = common_chat_tools_parse_oaicompat(request.at("tools"));
    }
    inputs.tool_choice         = common_chat_tool_choice_parse_oaicompat(request.value("tool_choice", std::string("auto")));
    inputs.parallel_tool_calls = request.value("parallel_tool_calls", false);
    inputs.enable_thinking     = request.value("enable_thinking", true);
    inputs.reasoning_format    = COMMON_REASONING_FORMAT_AUTO;
    if (request.contains("json_schema")) {
        inputs.json_schema = request.at("json_schema").dump();
    }
    if (request.contains("values")) {
        for (const auto & [name, value] : request.at("values").items()) {
            inputs.chat_template_kwargs[name] = value.dump();
        }
    }
    return inputs;
}

static const char * trigger_name(common_grammar_trigger_type type) {
    switch (type) {
        case COMMON_GRAMMAR_TRIGGER_TYPE_WORD:         return "word";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN:      return "pattern";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL: return "pattern_full";
        case COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN:        break;
    }
    mobile_throw(MOBILE_ERR_INTERNAL, "the chat parser wants a trigger that is a token, of a vocabulary it does not have");
}

static json triggers_of(const common_chat_params & params) {
    json triggers = json::array();
    for (const auto & trigger : params.grammar_triggers) {
        json one = json::object();
        one["type"]  = trigger_name(trigger.type);
        one["value"] = trigger.value;
        triggers.push_back(one);
    }
    return triggers;
}

struct mobile_chat_template * mobile_chat_template_init(const char * source, const char * bos, const char * eos) {
    return mobile_guard_or((mobile_chat_template *) nullptr, [&] {
        mobile_require(source && *source && bos && eos, "a chat template needs its source and the texts of two tokens");
        auto made = std::make_unique<mobile_chat_template>();
        made->templates = common_chat_templates_init(nullptr, source, bos, eos);
        return made.release();
    });
}

void mobile_chat_template_free(struct mobile_chat_template * chat) {
    delete chat;
}

int32_t mobile_chat_apply(const struct mobile_chat_template * chat, const char * request, char ** answer) {
    return mobile_guard([&] {
        mobile_require(chat && request && answer, "applying a chat template needs it, a request and room for the answer");
        const auto params = common_chat_templates_apply(chat->templates.get(), read_request(json::parse(request)));

        json parser = json::object();
        parser["format"]            = (int) params.format;
        parser["generation_prompt"] = params.generation_prompt;
        parser["arena"]             = params.parser;

        json made = json::object();
        made["prompt"]            = params.prompt;
        made["generation_prompt"] = params.generation_prompt;
        made["grammar"]           = params.grammar;
        made["grammar_lazy"]      = params.grammar_lazy;
        made["triggers"]          = triggers_of(params);
        made["preserved_tokens"]  = params.preserved_tokens;
        made["stops"]             = params.additional_stops;
        made["thinking_start"]    = params.thinking_start_tag;
        made["thinking_ends"]     = params.thinking_end_tags;
        made["supports_thinking"] = params.supports_thinking;
        made["parser"]            = parser.dump();
        give(made, answer);
        return MOBILE_OK;
    });
}

struct mobile_chat_parser * mobile_chat_parser_init(const char * parser) {
    return mobile_guard_or((mobile_chat_parser *) nullptr, [&] {
        mobile_require(parser, "a chat parser needs its text");
        const json given = json::parse(parser);
        auto made = std::make_unique<mobile_chat_parser>();
        made->params.format            = (common_chat_format) given.at("format").get<int>();
        made->params.generation_prompt = given.at("generation_prompt").get<std::string>();
        made->params.reasoning_format  = COMMON_REASONING_FORMAT_AUTO;
        const std::string arena = given.at("arena").get<std::string>();
        if (!arena.empty()) {
            made->params.parser.load(arena);
        }
        return made.release();
    });
}

void mobile_chat_parser_free(struct mobile_chat_parser * parser) {
    delete parser;
}

int32_t mobile_chat_parse(const struct mobile_chat_parser * parser, const char * text, size_t n_text, bool is_partial, char ** message) {
    return mobile_guard([&] {
        mobile_require(parser && text && message, "parsing an answer needs a parser, a text and room for the message");
        const auto parsed = common_chat_parse(std::string(text, n_text), is_partial, parser->params);

        json calls = json::array();
        for (const auto & call : parsed.tool_calls) {
            json one = json::object();
            one["name"]      = call.name;
            one["arguments"] = call.arguments;
            one["id"]        = call.id;
            calls.push_back(one);
        }
        json made = json::object();
        made["content"]           = parsed.render_content();
        made["reasoning_content"] = parsed.reasoning_content;
        made["tool_calls"]        = calls;
        give(made, message);
        return MOBILE_OK;
    });
}

void mobile_chat_text_free(char * text) {
    free(text);
}
