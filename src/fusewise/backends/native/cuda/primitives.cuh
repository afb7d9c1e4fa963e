// Every PTX instruction and every CUDA built-in that the kernels use, behind one name each.
//
// The other .cuh files are plain C++17. A program that defines FUSEWISE_PRIMITIVES_CUH and the same
// names first can run them on a CPU, one thread of control per CUDA thread.
//
// Memory. `push_*` and `peek_*` are relaxed accesses of system scope: they reach a peer's memory through
// NVLink, are never served from L1, and order nothing else. One of 16 bytes counts as four of 4 that have no
// order among them (PTX memory model), so a reader must check all four words. `load_*` and `store_*` are weak
// accesses of this rank's own memory.

#ifndef FUSEWISE_PRIMITIVES_CUH
#define FUSEWISE_PRIMITIVES_CUH

#define FW_DEVICE __device__ __forceinline__
#define FW_UNROLL _Pragma("unroll")
#define FW_KEEP_LOOP _Pragma("unroll 1")

namespace fusewise {

struct alignas(16) Words {
  unsigned word[4];
};

// --- where this thread is

// A division by a power of two is one shift only where the compiler knows that there is no sign.
FW_DEVICE int without_sign(unsigned number) {
  const int same = static_cast<int>(number);
  __builtin_assume(same >= 0);
  return same;
}

FW_DEVICE int thread_index() { return without_sign(threadIdx.x); }
// FW_THREADS: the block's size where it is fixed at compile time, else 0.
FW_DEVICE int thread_count() { return FW_THREADS > 0 ? FW_THREADS : without_sign(blockDim.x); }
FW_DEVICE int block_index() { return without_sign(blockIdx.x); }
FW_DEVICE int block_count() { return without_sign(gridDim.x); }

// Addresses that are computed where they are added, once, and not where they are used; those that
// dependency_wait() is given, before it, while the kernel before ends.
struct Computed {
  unsigned high = 0;  // the upper halves' bits

  template <class T>
  FW_DEVICE void add(T*& address) {
    asm volatile("" : "+l"(address));
    high |= static_cast<unsigned>(reinterpret_cast<unsigned long long>(address) >> 32);
  }

  FW_DEVICE void add(unsigned long long& offset) { asm volatile("" : "+l"(offset)); }
};

// --- this rank's memory

FW_DEVICE Words load_words(const void* at) {
  Words v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(at)
               : "memory");
  return v;
}

FW_DEVICE void store_words(void* at, Words v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

FW_DEVICE void store_word(void* at, unsigned word) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(at), "r"(word) : "memory");
}

FW_DEVICE void store_two_words(void* at, unsigned low, unsigned high) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(low), "r"(high) : "memory");
}

FW_DEVICE unsigned load_word(const void* at) {
  unsigned word;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(word) : "l"(at) : "memory");
  return word;
}

// --- memory shared between ranks

FW_DEVICE Words peek_words(const void* at) {
  Words v;
  asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(at)
               : "memory");
  return v;
}

FW_DEVICE void push_words(void* at, Words v) {
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

FW_DEVICE unsigned peek_word(const void* at) {
  unsigned word;
  asm volatile("ld.relaxed.sys.global.b32 %0, [%1];" : "=r"(word) : "l"(at) : "memory");
  return word;
}

FW_DEVICE void push_word(void* at, unsigned word) {
  asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(at), "r"(word) : "memory");
}

FW_DEVICE void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// True for the one caller, of all that ever call with this word, that finds it 0.
FW_DEVICE bool claim(unsigned* word) { return atomicCAS(word, 0u, 1u) == 0u; }

// --- threads of one block

FW_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Whether all lanes of the warp say so; all of them call it.
FW_DEVICE bool warp_all(bool each) { return __all_sync(0xffffffffu, each) != 0; }

FW_DEVICE void warp_barrier() { __syncwarp(); }

FW_DEVICE void block_barrier() { __syncthreads(); }

FW_DEVICE unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// Of the block's memory; the address is kept where it was computed, as all that assembler is given.
FW_DEVICE Words load_shared(const void* at) {
  Words v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(shared_address(at))
               : "memory");
  return v;
}

// --- the kernel before and the kernel after (programmatic dependent launch; sm_90 and later)

// After it, everything the previous kernel of the stream wrote is visible. Without the launch
// attribute it returns at once.
FW_DEVICE void dependency_wait(const Computed& addresses = {}) {
#if __CUDA_ARCH__ >= 900
  // The assembler would move their arithmetic behind the wait, did nothing before it depend on them. No
  // address has its highest bit set, so nobody exits.
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "setp.lt.s32 p, %0, 0;\n\t"
      "@p exit;\n\t"
      "griddepcontrol.wait;\n\t}" ::"r"(addresses.high)
      : "memory");
#endif
}

// Lets the next kernel's blocks be placed once every block of this grid has said so or ended. One
// thread speaks for its block.
FW_DEVICE void dependents_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- time

FW_DEVICE unsigned long long clock_ns() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

FW_DEVICE void pause_ns(unsigned nanoseconds) { __nanosleep(nanoseconds); }

// --- numbers

FW_DEVICE unsigned bits_of(float value) { return __float_as_uint(value); }
FW_DEVICE float float_of(unsigned bits) { return __uint_as_float(bits); }
FW_DEVICE float reciprocal_sqrt(float value) { return rsqrtf(value); }
// The same of a number that is not subnormal, 60 cycles sooner: nothing is scaled up and down.
FW_DEVICE float reciprocal_sqrt_of_normal(float value) {
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
}
FW_DEVICE float absolute(float value) { return fabsf(value); }

// One instruction, where a comparison and a choice are two.
FW_DEVICE unsigned smaller(unsigned a, unsigned b) {
  unsigned least;
  asm("min.u32 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
  return least;
}

FW_DEVICE unsigned larger(unsigned a, unsigned b) {
  unsigned largest;
  asm("max.u32 %0, %1, %2;" : "=r"(largest) : "r"(a), "r"(b));
  return largest;
}

// The larger; NaN if either is NaN.
FW_DEVICE float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

FW_DEVICE float half_to_float(unsigned half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(half)));
  return value;
}

// Two numbers rounded to nearest even, `low` in the low half of the word.
FW_DEVICE unsigned to_half_pair(float low, float high) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

FW_DEVICE unsigned to_bfloat_pair(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Two numbers as FP8 e4m3, to nearest even, beyond +-448 (infinities too) to +-448, NaN to NaN;
// `low` in the low byte. sm_89 and later.
FW_DEVICE unsigned to_e4m3_pair(float low, float high) {
  unsigned short pair = 0;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}

}  // namespace fusewise

#endif  // FUSEWISE_PRIMITIVES_CUH
