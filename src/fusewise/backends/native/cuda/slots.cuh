// Slots in shared memory between ranks: where they are, how a vector is sent, awaited and taken.
//
// The unit. A warp handles 32 vectors of 16 bytes at a time: 512 bytes, one unit. A row fills whole
// units (the last one may be partly used), row t has units t * units_per_row and following. Each
// unit has its own epoch, a counter in the rank's own memory that every call using the unit raises
// by one; all ranks make the same calls, so they agree on it without ever exchanging it. The slot
// of a unit depends on the unit and on its epoch's parity (the phase), never on the shape of the
// call: so calls of any shapes may follow one another.
//
// The sentinel. An empty word of a slot holds 0xffffffff. Sent words never do: canonical() turns
// this one pattern (a NaN in fp32, two NaNs in bf16 and fp16) into 0xfffffffe, again one or two
// NaNs. Nothing else changes: no zero, subnormal, infinity, number or other NaN is touched. A
// reader has a vector when none of its four words is the sentinel.
//
// Why nothing is overwritten. Rank a reads unit u of call k and puts the sentinel back (R), all
// before its kernel of call k ends. The next store to that same slot is peer b's push of the second
// next call that uses u, k'' (k' between them used the other phase). b starts k'' after its kernel
// of k' ended, hence after it took a's push in k', which a made after its kernel of call k ended.
// So: R, end of a's kernel k, a's push in k', b takes it, end of b's kernel k', b's push in k''.
// Every step is program order, the observation of a push, or the end of a kernel (for a dependent
// launch: griddepcontrol.wait), which orders all its memory operations before the next kernel's.

#ifndef FUSEWISE_SLOTS_CUH
#define FUSEWISE_SLOTS_CUH

#include "primitives.cuh"

namespace fusewise {

constexpr int kMaxRanks = 8;
constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;
constexpr int kUnitBytes = kWarp * kVectorBytes;
constexpr unsigned kSentinel = 0xffffffffu;
constexpr unsigned kCanonicalNan = 0xfffffffeu;
constexpr unsigned kPollsPerCheck = 1024;  // near half a millisecond: one poll is an L2 round trip

// What a rank that waited too long leaves behind, in host memory mapped into the device.
struct Status {
  unsigned state;  // 0: alive, 1: dead. Written last.
  unsigned rank;   // who waited
  unsigned row;
  unsigned phase;  // 0, 1: one_shot and the scatter of two_shot; 2: its gather; 3: its partial sums
  unsigned peer;   // for whom
};

// The part of a kernel's parameters that speaks of the group.
struct GroupParams {
  char* slots[kMaxRanks];  // slots[r]: rank r's slots, as this rank maps them
  unsigned* epochs;        // [unit_capacity], this rank's own memory
  unsigned* dead;          // one word of this rank's own memory: 1 after a time-out
  Status* status;
  unsigned long long timeout_ns;
  long long unit_capacity;  // units per phase and source; equal on all ranks
  int rank;
};

FW_DEVICE unsigned canonical_word(unsigned word) {
  return word == kSentinel ? kCanonicalNan : word;
}

FW_DEVICE Words canonical(Words v) {
  FW_UNROLL
  for (int i = 0; i < 4; ++i) v.word[i] = canonical_word(v.word[i]);
  return v;
}

FW_DEVICE bool complete(Words v) {
  return v.word[0] != kSentinel && v.word[1] != kSentinel && v.word[2] != kSentinel &&
         v.word[3] != kSentinel;
}

FW_DEVICE Words empty_slot() { return Words{{kSentinel, kSentinel, kSentinel, kSentinel}}; }

// Where vector `lane` of `unit` lies behind a rank's slots in `phase`, for its first source. The
// sources of one unit are neighbours, so a reader needs one address. No rank is its own source: own
// data stays in registers.
template <int kWorld>
FW_DEVICE long long slot_offset(const GroupParams& group, unsigned phase, long long unit,
                                int lane) {
  const long long place = (phase * group.unit_capacity + unit) * (kWorld - 1);
  return place * kUnitBytes + lane * kVectorBytes;
}

// Sends a canonical vector to every peer, the next rank first: no rank is everybody's first.
template <int kWorld>
FW_DEVICE void push_to_peers(const GroupParams& group, long long offset, Words v) {
  FW_UNROLL
  for (int i = 1; i < kWorld; ++i) {
    const int peer = (group.rank + i) % kWorld;
    const int source = group.rank - (group.rank > peer ? 1 : 0);
    push_words(group.slots[peer] + offset + source * kUnitBytes, v);
  }
}

// Whether a call before this one timed out. Its rank must then neither send nor take any more: what
// it did not wait for may still be unread at a peer, and what comes late would pass for new. Called
// after dependency_wait(); threads of one call may differ, so nobody skips a barrier because of it.
FW_DEVICE bool is_dead(const GroupParams& group) { return load_word(group.dead) != 0; }

// A bounded wait. Costs one counter until it has polled kPollsPerCheck times in vain.
struct Patience {
  unsigned polls = 0;
  unsigned long long deadline = 0;

  // False once the time is up here, or was up for any thread of this rank: the group is dead.
  FW_DEVICE bool more(const GroupParams& group, int row, int phase, int peer) {
    if (++polls % kPollsPerCheck != 0) return true;
    if (peek_word(group.dead) != 0) return false;
    const unsigned long long now = clock_ns();
    if (deadline == 0) deadline = now + group.timeout_ns;
    if (now < deadline) return true;
    if (claim(group.dead)) {
      push_word(&group.status->rank, static_cast<unsigned>(group.rank));
      push_word(&group.status->row, static_cast<unsigned>(row));
      push_word(&group.status->phase, static_cast<unsigned>(phase));
      push_word(&group.status->peer, static_cast<unsigned>(peer));
      fence_system();  // the host that sees state 1 sees the four words above
      push_word(&group.status->state, 1);
    }
    return false;
  }
};

// Waits for one vector of each peer in each of kCount slots, takes them and empties the slots.
// Slots that are null are left out. Every slot is asked before any is looked at, so that the wait
// costs one round trip, not many. After a time-out the missing words are still the sentinel, a NaN:
// a dead group yields no number.
template <int kWorld, int kCount>
FW_DEVICE void take_from_peers(const GroupParams& group, char* const* slot, int row, int phase,
                               Words (*got)[kWorld - 1]) {
  FW_UNROLL
  for (int i = 0; i < kCount; ++i) {
    FW_UNROLL
    for (int j = 0; j < kWorld - 1; ++j) {
      if (slot[i] != nullptr) got[i][j] = peek_words(slot[i] + j * kUnitBytes);
    }
  }
  Patience patience;
  for (int missing = 0; missing >= 0;) {
    missing = -1;
    FW_UNROLL
    for (int i = 0; i < kCount; ++i) {
      FW_UNROLL
      for (int j = 0; j < kWorld - 1; ++j) {
        if (slot[i] != nullptr && !complete(got[i][j])) {
          missing = j;
          got[i][j] = peek_words(slot[i] + j * kUnitBytes);
        }
      }
    }
    const int peer = missing + (missing >= group.rank ? 1 : 0);
    if (missing >= 0 && !patience.more(group, row, phase, peer)) break;
  }
  FW_UNROLL
  for (int i = 0; i < kCount; ++i) {
    FW_UNROLL
    for (int j = 0; j < kWorld - 1; ++j) {
      if (slot[i] != nullptr) push_words(slot[i] + j * kUnitBytes, empty_slot());
    }
  }
}

// The vector of rank `source` among what was taken and what is this rank's own.
template <int kWorld>
FW_DEVICE Words of_rank(int source, int rank, const Words (&got)[kWorld - 1], Words own) {
  if (source == rank) return own;
  if (source == 0) return got[0];
  if (source == kWorld - 1) return got[kWorld - 2];
  return source < rank ? got[source] : got[source - 1];
}

// The test kernels put delays here; the shipped ones nothing.
struct NoSkew {
  FW_DEVICE static void before_push(int, int) {}
  FW_DEVICE static void before_take(int, int) {}
};

}  // namespace fusewise

#endif  // FUSEWISE_SLOTS_CUH
