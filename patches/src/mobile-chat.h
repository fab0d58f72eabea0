// mobile-chat.h - the C API to llama.cpp's own knowledge of chat templates: how a model writes tool calls and thoughts.
//
// Mechanism: the chat parser of llama.cpp's common library (common/chat.h) is compiled into libllama with hidden symbols. A
// template with messages and tools becomes a prompt, a grammar with its triggers, and a parser of the answer.
// What goes in and comes out is JSON in UTF-8.
// Invariant: needs no model, and changes none of the engine's state.
// Limits: a template is a program out of a file: it may loop, recurse and grow without an end, and a fault of the parser's
// own (GGML_ASSERT) ends the process. So these are called in a process of their own, which has limits.

#pragma once

#include "mobile.h"

#ifdef __cplusplus
extern "C" {
#endif

struct mobile_chat_template; // compiled
struct mobile_chat_parser;   // of the answers to one prompt

// NULL: an error. bos and eos are those tokens' texts
LLAMA_API struct mobile_chat_template * mobile_chat_template_init(const char * source, const char * bos, const char * eos);
LLAMA_API void                          mobile_chat_template_free(struct mobile_chat_template * chat);

// request: {messages, tools, tool_choice: auto | required | none, parallel_tool_calls, enable_thinking, json_schema, values}
// in OpenAI's form, all but messages may be missing. values: what else the template may use.
// answer: {prompt, generation_prompt, grammar, grammar_lazy, triggers: [{type: word | pattern | pattern_full, value}],
// preserved_tokens, stops, thinking_start, thinking_ends, supports_thinking, parser}; freed by mobile_chat_text_free.
// parser is text for mobile_chat_parser_init
LLAMA_API int32_t mobile_chat_apply(const struct mobile_chat_template * chat, const char * request, char ** answer);

// NULL: an error
LLAMA_API struct mobile_chat_parser * mobile_chat_parser_init(const char * parser);
LLAMA_API void                        mobile_chat_parser_free(struct mobile_chat_parser * parser);

// text: what the model has said behind the prompt, [n_text] bytes of whole characters, the preserved tokens among it.
// message: {content, reasoning_content, tool_calls: [{name, arguments, id}]}; freed by mobile_chat_text_free
LLAMA_API int32_t mobile_chat_parse(const struct mobile_chat_parser * parser, const char * text, size_t n_text, bool is_partial, char ** message);

LLAMA_API void mobile_chat_text_free(char * text);

#ifdef __cplusplus
}
#endif
