// What blocks of one cluster say to each other: primitives, as those of primitives.cuh.
//
// A thread writes a variable of another block and counts it in that block's inbox; who waits for the
// inbox waits for nothing else. All of it is of sm_90 and later.

#ifndef FUSEWISE_CLUSTER_CUH
#define FUSEWISE_CLUSTER_CUH

#include "primitives.cuh"

namespace fusewise {

// Counts the bytes that blocks of the cluster send to this one, round by round: an mbarrier.
struct Inbox {
  alignas(8) unsigned long long state;
};

// A variable of another block and its inbox, as that block's shared memory is addressed from here.
struct ClusterPlace {
  unsigned word;
  unsigned inbox;
};

#if __CUDA_ARCH__ >= 900
FW_DEVICE int cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// A barrier in two halves that waits for no store. What inboxes_opened() stands behind is seen by all
// behind cluster_wait().
FW_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
FW_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Where block number `block` of the cluster has what lies at `here` in this one.
FW_DEVICE unsigned address_in_cluster(unsigned here, int block) {
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
  return there;
}

FW_DEVICE void inbox_open(Inbox& inbox) {
  const unsigned at = shared_address(&inbox);
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(at) : "memory");
}

// By the thread that opened them, before cluster_arrive().
FW_DEVICE void inboxes_opened() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// How much comes in this round; by one thread. Some of it may have come.
FW_DEVICE void inbox_expect(Inbox& inbox, unsigned bytes) {
  const unsigned at = shared_address(&inbox);
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
}

// Waits for the end of a round of that parity; all that was sent in it is visible then.
FW_DEVICE void inbox_await(Inbox& inbox, unsigned parity) {
  const unsigned at = shared_address(&inbox);
  unsigned done;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(at), "r"(parity)
        : "memory");
  } while (done == 0);
}

// The variable `at` of the cluster's block number `block`, and its `inbox`.
FW_DEVICE ClusterPlace place_in_cluster(float* at, Inbox& inbox, int block) {
  return {address_in_cluster(shared_address(at), block),
          address_in_cluster(shared_address(&inbox), block)};
}

// Writes the variable there and counts it in the inbox.
FW_DEVICE void send_in_cluster(ClusterPlace place, float value) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
                   place.word),
               "f"(value), "r"(place.inbox)
               : "memory");
}
#else  // blocks of one row never form a cluster below sm_90
FW_DEVICE int cluster_rank() { return 0; }
FW_DEVICE void cluster_arrive() {}
FW_DEVICE void cluster_wait() {}
FW_DEVICE void inbox_open(Inbox&) {}
FW_DEVICE void inboxes_opened() {}
FW_DEVICE void inbox_expect(Inbox&, unsigned) {}
FW_DEVICE void inbox_await(Inbox&, unsigned) {}
FW_DEVICE ClusterPlace place_in_cluster(float*, Inbox&, int) { return {}; }
FW_DEVICE void send_in_cluster(ClusterPlace, float) {}
#endif

}  // namespace fusewise

#endif  // FUSEWISE_CLUSTER_CUH
