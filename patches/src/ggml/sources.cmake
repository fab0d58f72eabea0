# our part of ggml-base, included by ggml/src/CMakeLists.txt

target_sources(ggml-base PRIVATE ${CMAKE_CURRENT_LIST_DIR}/ggml-expert.c ${CMAKE_CURRENT_LIST_DIR}/ggml-barrier.c ${CMAKE_CURRENT_LIST_DIR}/ggml-precise.c)
