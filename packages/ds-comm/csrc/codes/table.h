// What each instruction set provides for the codes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ds_comm {

struct E8Layout {
    std::size_t numel;
    std::size_t block;     // elements that share a scale: a multiple of 64, at most 1024
    const float* vectors;  // [8, 256]: for each byte its vector
};

struct BlockLayout {
    std::size_t numel;
    std::size_t block;   // as above
    unsigned code;       // of kBlockCodes
    bool float16_scales;  // else float32
};

// By name; an index into these is what Python gives.
constexpr const char* kBlockCodes[] = {"sign", "ternary", "int4", "int8"};

template <class Layout>
struct Codes {
    void (*encode)(const float* x, float* error, std::uint8_t* payload, const Layout& layout);
    void (*decode)(float* out, const std::uint8_t* payload, const Layout& layout, float factor);
    void (*accumulate)(float* out, const std::uint8_t* payload, const Layout& layout, float factor);
};

struct Table {
    Codes<E8Layout> e8;
    Codes<BlockLayout> blocks;
};

extern const Table kBase;
#if defined(__x86_64__) && defined(__GNUC__)
#define DS_COMM_X86 1
extern const Table kAvx2;
#endif

inline const Table& best() {
#if defined(DS_COMM_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
        return kAvx2;
    }
#endif
    return kBase;
}

}  // namespace ds_comm
