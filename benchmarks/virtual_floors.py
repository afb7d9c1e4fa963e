"""The floors of the virtual node: what a call costs that does nothing, or only exchanges.

Written against our kernels' own names, in our launch, so that they share its costs: one vector per
lane of one warp, or all of the message by as many warps as ours has.
"""

from __future__ import annotations

from fusewise.backends.native.cuda.build import SOURCES

_BODY = "one_shot<OneShotConfig"  # where the floors replace one_shot.cu's only statement
# What ours reads before the wait for the kernel before, these must too: 64 bytes of parameters take
# some 300 cycles when they are first read.
_EXCHANGE = """
  const GroupParams& group = params.group;
  const unsigned lane = thread_index() % kWarp;
  {place}
  const char* x = (const char*)params.x + vector * kVectorBytes;
  char* out = (char*)params.output.out + vector * kVectorBytes;
  Computed addresses;
  addresses.add(x);
  addresses.add(out);
  dependency_wait(addresses);
  {early}
  do {{
    Words own = {{}};
    if (used) own = canonical(load_words(x));
    const unsigned epoch = load_word(group.epochs + unit);
    const auto offset = slot_offset<FW_WORLD>(unit, lane) + epoch % 2 * kSourcesBytes<FW_WORLD>;
    warp_barrier();
    if (used) push_to_peers<FW_WORLD>(group, offset, own);
    if (used && lane == 0) store_word(group.epochs + unit, epoch + 1);
    Arrival<FW_WORLD> peers;
    peers.slot = group.slots + offset;
    if (used) peers.ask(group, own);
    peers.await(group, 0, epoch & 1u, used);
    if (used) peers.empty(group);
    if (used) store_words(out, peers.of[0]);
  }} while ({more});
  {late}
"""
_TRIGGER = "dependents_launch();"
_WARP = {
    "place": "unsigned unit = 0; const unsigned vector = lane; const bool used = true;",
    "more": "false",
}
_ALL = {
    "place": """constexpr unsigned kVectors = FW_ROW_VECTORS, kUnits = (kVectors + 31) / 32;
  unsigned row = block_index() / FW_BLOCKS;
  const unsigned column = block_index() % FW_BLOCKS * FW_THREADS + thread_index();
  const bool used = FW_BLOCKS * FW_THREADS == kVectors || column < kVectors;
  unsigned unit = row * kUnits + column / kWarp;
  const unsigned vector = row * kVectors + column, workers = block_count() / FW_BLOCKS;""",
    "more": """!FW_ONE_PASS && (x += workers * kVectors * kVectorBytes, unit += workers * kUnits,
             out += workers * kVectors * kVectorBytes, row += workers, row < params.num_tokens)""",
}
FLOORS = {
    "empty": f"dependency_wait(); {_TRIGGER}",
    "exchange": _EXCHANGE.format(**_WARP, early=_TRIGGER, late=""),
    "exchange:late": _EXCHANGE.format(**_WARP, early="", late=f"warp_barrier(); {_TRIGGER}"),
    "exchange:all": _EXCHANGE.format(**_ALL, early=_TRIGGER, late=""),
    "exchange:all:late": _EXCHANGE.format(**_ALL, early="", late=f"block_barrier(); {_TRIGGER}"),
}


def floor_edit(name: str) -> tuple[str, str, str]:
    """The edit of our sources (file, old text, new text) that makes them the floor of that name."""
    text = (SOURCES / "one_shot.cu").read_text()
    return "one_shot.cu", text[text.index(_BODY) : text.index("}", text.index(_BODY))], FLOORS[name]
