# llama.cpp's chat parser, without the rest of its common library, as part of libllama. Nothing of it is seen from outside
# but what mobile-chat.h exports: a program may load llama.cpp's own common library beside

set(MOBILE_COMMON ${CMAKE_CURRENT_SOURCE_DIR}/../common)
file(GLOB MOBILE_CHAT_JINJA   ${MOBILE_COMMON}/jinja/*.cpp)
file(GLOB MOBILE_CHAT_PARSERS ${MOBILE_COMMON}/parsers/*.cpp)
set(MOBILE_CHAT_CORE
    ${MOBILE_COMMON}/chat.cpp
    ${MOBILE_COMMON}/chat-auto-parser-generator.cpp
    ${MOBILE_COMMON}/chat-auto-parser-helpers.cpp
    ${MOBILE_COMMON}/chat-diff-analyzer.cpp
    ${MOBILE_COMMON}/chat-peg-parser.cpp
)
set(MOBILE_CHAT_GRAMMAR
    ${MOBILE_COMMON}/json-schema-to-grammar.cpp
    ${MOBILE_COMMON}/json-schema.cpp
    ${MOBILE_COMMON}/peg-parser.cpp
    ${MOBILE_COMMON}/trie.cpp
    ${MOBILE_COMMON}/unicode.cpp
)

add_library(mobile-chat OBJECT
    ${CMAKE_CURRENT_LIST_DIR}/chat-api.cpp
    ${CMAKE_CURRENT_LIST_DIR}/chat-links.cpp
    ${MOBILE_CHAT_CORE}
    ${MOBILE_CHAT_GRAMMAR}
    ${MOBILE_CHAT_JINJA}
    ${MOBILE_CHAT_PARSERS}
    ${MOBILE_COMMON}/json.cpp
)
# most of the time goes into headers: files that can be compiled together are
set_source_files_properties(${MOBILE_CHAT_CORE}    PROPERTIES UNITY_GROUP core)
set_source_files_properties(${MOBILE_CHAT_GRAMMAR} PROPERTIES UNITY_GROUP grammar)
set_source_files_properties(${MOBILE_CHAT_PARSERS} PROPERTIES UNITY_GROUP parsers)
set_target_properties(mobile-chat PROPERTIES
    CXX_VISIBILITY_PRESET     hidden
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ${BUILD_SHARED_LIBS}
    UNITY_BUILD               ON
    UNITY_BUILD_MODE          GROUP
)
target_compile_features(mobile-chat PRIVATE cxx_std_17)
# as libllama's own files have it: what is exported is marked
if (BUILD_SHARED_LIBS)
    target_compile_definitions(mobile-chat PRIVATE LLAMA_SHARED LLAMA_BUILD GGML_SHARED)
endif()
# parsing text needs no vectors: half of the time to compile
if (CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    target_compile_options(mobile-chat PRIVATE -O1)
endif()
target_include_directories(mobile-chat PRIVATE
    ${CMAKE_CURRENT_LIST_DIR}
    ${CMAKE_CURRENT_LIST_DIR}/..
    ${MOBILE_COMMON}
    ${CMAKE_CURRENT_SOURCE_DIR}/../include
    ${CMAKE_CURRENT_SOURCE_DIR}/../ggml/include
    ${CMAKE_CURRENT_SOURCE_DIR}/../vendor
)
target_sources(llama PRIVATE $<TARGET_OBJECTS:mobile-chat>)
