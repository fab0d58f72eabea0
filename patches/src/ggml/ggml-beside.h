// ggml-beside.h - where the backends are that are loaded when the program runs.
//
// Mechanism: a backend that is a library of its own lies in the folder of the library that looks for it, wherever a
// package was installed to; the program is somebody's Python. The current directory, where upstream looks as well, would
// be anybody's: what is loaded from there runs as this process.
// Limits: included once, by ggml's registry.

#pragma once

#include <filesystem>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <dlfcn.h>
#endif

// the folder of the library that this function is compiled into; empty if the system does not say
static std::filesystem::path ggml_beside() {
#ifdef _WIN32
    HMODULE own = nullptr;
    wchar_t path[32768];
    const DWORD flags = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
    if (!GetModuleHandleExW(flags, (LPCWSTR) &ggml_beside, &own) || !GetModuleFileNameW(own, path, 32768)) {
        return {};
    }
    return std::filesystem::path(path).parent_path();
#else
    Dl_info own;
    if (!dladdr((void *) &ggml_beside, &own) || !own.dli_fname) {
        return {};
    }
    return std::filesystem::path(own.dli_fname).parent_path();
#endif
}
