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

#include "vectors.cuh"

namespace fusewise {

constexpr int kMaxRanks = 8;
constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;
constexpr int kUnitBytes = kWarp * kVectorBytes;
constexpr unsigned kSentinel = 0xffffffffu;
constexpr unsigned kCanonicalNan = 0xfffffffeu;
constexpr int kPollsPerCheck = 1024;  // near half a millisecond: one poll is an L2 round trip

// What a rank that waited too long leaves behind, in host memory mapped into the device.
struct Status {
  unsigned state;  // 0: alive, 1: dead. Written last.
  unsigned rank;   // who waited
  unsigned row;
  unsigned phase;  // 0, 1: one_shot and the scatter of two_shot; 2: its gather; 3: its partial sums
  unsigned peer;   // for whom
};

// The word that says "dead", in as many places as blocks would otherwise wait for one line of L2.
constexpr int kDeadCopies = 16;
constexpr int kSectorWords = 8;  // 32 bytes, the unit of an L2 access

// The part of a kernel's parameters that speaks of the group. The order is that of use, here and in the
// structures around it: every 64 bytes of parameters are fetched when they are first read.
struct GroupParams {
  unsigned* epochs;  // [unit_capacity], this rank's own memory
  unsigned* dead;    // [kDeadCopies * kSectorWords], this rank's own memory: 1 after a time-out
  char* slots;       // this rank's own
  int rank;
  unsigned unit_capacity;      // units per phase and source; equal on all ranks
  char* peers[kMaxRanks - 1];  // peers[i]: where rank (rank + 1 + i) % world takes from this rank
  Status* status;
  unsigned long long timeout_ns;
};

FW_DEVICE unsigned canonical_word(unsigned word) {
  return smaller(word, kCanonicalNan);  // the sentinel is the largest number
}

FW_DEVICE Words canonical(Words v) {
  FW_UNROLL
  for (int i = 0; i < 4; ++i) v.word[i] = canonical_word(v.word[i]);
  return v;
}

// The vector, or NaN in every word of it.
FW_DEVICE Words or_nan(Words v, bool nan) {
  FW_UNROLL
  for (int i = 0; i < 4; ++i) v.word[i] |= nan ? kSentinel : 0;
  return v;
}

// The sentinel is the largest number, so one comparison does for any number of words.
FW_DEVICE unsigned largest_word(Words v) {
  return larger(larger(v.word[0], v.word[1]), larger(v.word[2], v.word[3]));
}

FW_DEVICE bool complete(Words v) { return largest_word(v) != kSentinel; }

FW_DEVICE Words empty_slot() { return Words{{kSentinel, kSentinel, kSentinel, kSentinel}}; }

// A unit's slots in one phase: one per rank, neighbours, so that a reader needs one address. Own data stays
// in registers; its slot is left free, so that where a rank's vector arrives does not depend on the reader.
// Of two ranks there is one source only.
template <int kWorld>
constexpr int kSources = kWorld > 2 ? kWorld : 1;

template <int kWorld>
constexpr unsigned kSourcesBytes = kSources<kWorld> * kUnitBytes;

// A rank's number among the sources of its peers.
template <int kWorld>
FW_DEVICE int source_of(int rank) {
  return kWorld > 2 ? rank : 0;
}

// Where vector `lane` of `unit` lies behind a rank's slots in phase 0, for its first source. Phase 1 of
// the unit is right behind: kSourcesBytes further.
template <int kWorld>
FW_DEVICE unsigned long long slot_offset(unsigned unit, int lane) {
  return static_cast<unsigned long long>(unit) * (2 * kSourcesBytes<kWorld>) +
         lane * kVectorBytes;
}

// Sends a canonical vector to every peer, the next rank first: no rank is everybody's first.
template <int kWorld>
FW_DEVICE void push_to_peers(const GroupParams& group, unsigned long long offset, Words v) {
  FW_UNROLL
  for (int i = 0; i < kWorld - 1; ++i) push_words(group.peers[i] + offset, v);
}

// Whether a call before this one timed out. Its rank must then neither send nor take any more: what
// it did not wait for may still be unread at a peer, and what comes late would pass for new. Called
// after dependency_wait(); threads of one call may differ, so nobody skips a barrier because of it.
FW_DEVICE bool is_dead(const unsigned* copy) { return load_word(copy) != 0; }

// The copy that this thread looks at. Differs from lane to lane: what is the same for all goes to a
// uniform register, and then everything behind it waits for this load.
FW_DEVICE const unsigned* copy_of_dead(const GroupParams& group) {
  const int sector = block_index() % kDeadCopies * kSectorWords;
  return group.dead + sector + thread_index() % kSectorWords;
}

// A bounded wait: asked once in kPollsPerCheck vain polls.
struct Patience {
  unsigned long long deadline = 0;

  // True once the time is up, here or for any thread of this rank: the group is dead. Who comes
  // `second` leaves it for a while to others of its rank, who know better who is missing.
  FW_DEVICE bool is_over(const GroupParams& group, bool second = false) {
    if (peek_word(group.dead) != 0) return true;
    const unsigned long long now = clock_ns();
    if (deadline == 0) deadline = now + group.timeout_ns + (second ? group.timeout_ns / 4 : 0);
    return now >= deadline;
  }
};

// Says who waited for whom, once per rank, and that the group is dead.
FW_DEVICE void give_up(const GroupParams& group, int row, unsigned phase, int peer) {
  if (!claim(group.dead)) return;
  FW_KEEP_LOOP
  for (int i = 1; i < kDeadCopies * kSectorWords; ++i) push_word(group.dead + i, 1);
  push_word(&group.status->rank, static_cast<unsigned>(group.rank));
  push_word(&group.status->row, static_cast<unsigned>(row));
  push_word(&group.status->phase, phase);
  push_word(&group.status->peer, static_cast<unsigned>(peer));
  fence_system();  // the host that sees state 1 sees the four words above
  push_word(&group.status->state, 1);
}

// All ranks' vectors of one place, in the order in which they are added: this rank's own, there from the
// start, and the peers', as they arrive. The own one is put among them before the wait, because which is its
// place is known at run time only, and behind the wait choosing would take longer than adding.
//
// Ask for all that a thread needs before awaiting any: the wait then costs one round trip, not many. All lanes
// of a warp await, also those that need nothing, and leave together, by a vote: gathering lanes that leave one
// by one takes longer. After a time-out the missing words are still the sentinel, a NaN: a dead group yields
// no number.
template <int kWorld>
struct Arrival {
  char* slot;  // of the first source
  Words of[kWorld];

  // The peers' are where their source is. Of two ranks the own one is the second on either: two numbers are
  // the same sum in either order.
  FW_DEVICE static int own_place(const GroupParams& group) { return kWorld > 2 ? group.rank : 1; }

  FW_DEVICE void ask(const GroupParams& group, Words own) {
    FW_UNROLL
    for (int i = 0; i < kWorld; ++i) {
      of[i] = own;
      if (i != own_place(group)) of[i] = peek_words(slot + i * kUnitBytes);
    }
  }

  FW_DEVICE bool is_complete() const {
    unsigned largest = largest_word(of[0]);
    FW_UNROLL
    for (int i = 1; i < kSources<kWorld>; ++i) largest = larger(largest, largest_word(of[i]));
    return largest != kSentinel;
  }

  // `needs` is false where nothing is awaited, whatever lies in `of`: a dead rank's own words are the
  // sentinel and would be, in vain.
  FW_DEVICE void await(const GroupParams& group, int row, unsigned phase, bool needs) {
    Patience patience;
    bool is_over;
    do {
      FW_KEEP_LOOP
      for (int polls = 0; polls < kPollsPerCheck; ++polls) {
        if (warp_all(!needs | is_complete())) return;
        FW_UNROLL
        for (int i = 0; i < kSources<kWorld>; ++i) {
          if (needs & !complete(of[i])) of[i] = peek_words(slot + i * kUnitBytes);
        }
      }
      is_over = patience.is_over(group);
    } while (warp_all(!is_over));
    if (!needs || is_complete()) return;  // others wait in vain
    int missing = 0;
    while (missing < kSources<kWorld> - 1 && complete(of[missing])) ++missing;
    give_up(group, row, phase, kWorld > 2 ? missing : 1 - group.rank);
  }

  // Puts the sentinel back where the peers' vectors were. Leaving out the free slot takes a branch for each and
  // saves a store: one-shot gains by it (benchmarks/results/one_gpu/virtual_node_slots.json), two-shot does not.
  FW_DEVICE void empty(const GroupParams& group) const {
    FW_UNROLL
    for (int i = 0; i < kSources<kWorld>; ++i) {
      if (i != own_place(group)) push_words(slot + i * kUnitBytes, empty_slot());
    }
  }

  // The same with the free slot.
  FW_DEVICE void empty_all() const {
    FW_UNROLL
    for (int i = 0; i < kSources<kWorld>; ++i) push_words(slot + i * kUnitBytes, empty_slot());
  }

  template <class Type>
  FW_DEVICE Floats<Type> sum() const {
    Floats<Type> total = unpack<Type>(of[0]);
    FW_UNROLL
    for (int i = 1; i < kWorld; ++i) add<Type>(total, of[i]);
    return total;
  }
};

// The test kernels put delays here; the shipped ones nothing.
struct NoSkew {
  FW_DEVICE static void before_push(int, int) {}
  FW_DEVICE static void before_take(int, int) {}
};

}  // namespace fusewise

#endif  // FUSEWISE_SLOTS_CUH
