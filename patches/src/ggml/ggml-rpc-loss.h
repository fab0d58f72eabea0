// ggml-rpc-loss.h - a lost RPC server as an error instead of an abort.
//
// Mechanism: the connection that failed first is marked lost, with a text that says which server, what it
// was asked and why. From then on every message of that connection is answered at once, with zeros; its
// graphs return GGML_STATUS_FAILED, and mobile_rpc_error makes every decode of its contexts fail.
// Invariant: zeros are never results; whoever reads them checks get() before using what they led to.
// Limits: a lost connection never recovers, since the server freed its buffers. A loss is found by
// reading or writing, so the time limit below is what finds a server that is silent but not gone.

#pragma once

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#ifdef _WIN32
#  define WIN32_LEAN_AND_MEAN
#  ifndef NOMINMAX
#     define NOMINMAX
#  endif
#  include <winsock2.h>
#else
#  include <netinet/in.h>
#  include <netinet/tcp.h>
#  include <sys/socket.h>
#  include <sys/time.h>
#endif

// seconds that a server may be silent while it is waited for; 0: for ever
inline int ggml_rpc_timeout_s() {
    const char * text = std::getenv("MOBILE_GGUF_RPC_TIMEOUT");
    return text && *text ? std::atoi(text) : 300;
}

// before connect(): limits for a silent server, and keep-alive probes for a host that vanished
template <typename socket> void ggml_rpc_set_timeouts(socket fd) {
#ifdef _WIN32
    uint32_t limit = (uint32_t) ggml_rpc_timeout_s() * 1000;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, (const char *) &limit, sizeof(limit));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, (const char *) &limit, sizeof(limit));
#else
    struct timeval limit = {};
    limit.tv_sec = ggml_rpc_timeout_s();
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
    int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
#  ifdef TCP_KEEPIDLE
    int idle = 15, interval = 5, count = 3;
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE,  &idle,     sizeof(idle));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT,   &count,    sizeof(count));
#  endif
#endif
}

// errno of this thread's last failed send or recv, kept because logging may change errno
inline int & ggml_rpc_errno() {
    thread_local int code = 0;
    return code;
}

// after send and recv: whether a signal handler cut it short; then it is called again
template <typename count> bool ggml_rpc_interrupted(count n) {
    if (n >= 0) {
        return false;
    }
    ggml_rpc_errno() = errno;
    return errno == EINTR;
}

struct ggml_rpc_last {
    std::mutex  mutex;
    std::string text;
};

inline ggml_rpc_last & ggml_rpc_last_state() {
    static ggml_rpc_last * last = new ggml_rpc_last; // not destroyed: a thread may set it while the process exits
    return *last;
}

// copies the text of the last loss of this process and forgets it; false if there was none
inline bool ggml_rpc_last_loss(char * text, size_t size) {
    ggml_rpc_last & last = ggml_rpc_last_state();
    std::lock_guard<std::mutex> lock(last.mutex);
    if (last.text.empty()) {
        return false;
    }
    strncpy(text, last.text.c_str(), size - 1);
    text[size - 1] = 0;
    last.text.clear();
    return true;
}

// for get_proc_address: the functions of this file and of_backend, the loss of a backend's server; nullptr: others
inline void * ggml_rpc_loss_function(const char * name, const char * (*of_backend)(struct ggml_backend * backend)) {
    return std::strcmp(name, "ggml_backend_rpc_loss") == 0 ? (void *) of_backend :
           std::strcmp(name, "ggml_rpc_last_loss")    == 0 ? (void *) ggml_rpc_last_loss : nullptr;
}

// set once, by the thread that talks to the server; read by any
class ggml_rpc_loss {
public:
    static constexpr size_t alignment = 128; // of a buffer type whose server is gone

    // a base for a buffer whose server is gone; never dereferenced, as no base of this backend is
    static void * base() { return reinterpret_cast<void *>((uintptr_t) 1 << 20); }

    void begin(const std::string & server) {
        endpoint = server;
        ggml_rpc_errno() = errno = 0;
    }

    // before a message: whether it is worth sending
    bool attempt() {
        ggml_rpc_errno() = errno = 0;
        return !lost.load(std::memory_order_acquire);
    }

    // a message was not answered: the first time this is the loss, and always the answer is zeros
    void answer(int command, void * output, size_t size) {
        set(command);
        if (output) {
            memset(output, 0, size);
        }
    }

    void set(int command) {
        if (lost.load(std::memory_order_acquire)) {
            return;
        }
        const int code = ggml_rpc_errno() ? ggml_rpc_errno() : errno;
        const std::string limit = std::to_string(ggml_rpc_timeout_s());
        const std::string why =
            code == EAGAIN || code == EWOULDBLOCK || code == EINPROGRESS ? "no answer within " + limit + " s" :
            code != 0 ? std::string(strerror(code)) : "it closed the connection";
        text = "the RPC server " + endpoint + " was lost while " + doing(command) + " (" + why + ")";
        {
            ggml_rpc_last & last = ggml_rpc_last_state();
            std::lock_guard<std::mutex> lock(last.mutex);
            last.text = text;
        }
        lost.store(true, std::memory_order_release);
    }

    bool is_set() const { return lost.load(std::memory_order_acquire); }

    // nullptr while the server is there
    const char * get() const { return is_set() ? text.c_str() : nullptr; }

private:
    std::atomic_bool lost{false};
    std::string      endpoint;
    std::string      text; // written before `lost` is set, never after

    static const char * doing(int command) { // enum rpc_cmd of ggml-rpc.cpp
        static const char * const names[] = {
            "allocating memory", "asking for its alignment", "asking for its largest buffer", "asking for a buffer",
            "freeing memory", "clearing memory", "sending a tensor", "sending a tensor's hash", "reading a tensor",
            "copying a tensor", "computing", "asking for its memory", "preparing a tensor", "asking for a size",
            "connecting", "asking for its devices", "computing", "clearing a tensor",
        };
        const size_t n = sizeof(names)/sizeof(names[0]);
        return command >= 0 && (size_t) command < n ? names[command] : "talking to it";
    }
};
