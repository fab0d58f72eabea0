# included by llama.cpp's project: its CPU backend computes with same_math.h
set(SAME_MATH ${CMAKE_CURRENT_LIST_DIR}/same_math.h)
cmake_language(DEFER CALL target_compile_options ggml-cpu PRIVATE -include ${SAME_MATH})
