# our part of ggml-base and of the CPU backend in all its variants, included by ggml/src/CMakeLists.txt

target_sources(ggml-base PRIVATE ${CMAKE_CURRENT_LIST_DIR}/ggml-expert.c ${CMAKE_CURRENT_LIST_DIR}/ggml-barrier.c ${CMAKE_CURRENT_LIST_DIR}/ggml-precise.c ${CMAKE_CURRENT_LIST_DIR}/ggml-idle.c)
list(APPEND GGML_CPU_SOURCES ${CMAKE_CURRENT_LIST_DIR}/ggml-expert-matmul.c) # which the variants begin with
