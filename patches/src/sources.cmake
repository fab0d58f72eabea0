# our part of libllama, included by its CMakeLists.txt

file(GLOB_RECURSE MOBILE_SOURCES ${CMAKE_CURRENT_LIST_DIR}/mobile-*.cpp)
set_source_files_properties(${MOBILE_SOURCES} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
target_sources(llama PRIVATE ${MOBILE_SOURCES})
# not LIST_DIR: in a tree for editing it is a link, and what lies above it is elsewhere
target_include_directories(llama PRIVATE ${CMAKE_CURRENT_LIST_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/../ggml/src)

include(${CMAKE_CURRENT_LIST_DIR}/chat/sources.cmake)
