"""The kernels' parameter structures, field by field as the .cuh files declare them.

A test compares every offset with the compiler's. Holds no logic.
"""

from __future__ import annotations

import ctypes

_POINTER = ctypes.c_uint64
MAX_RANKS = 8  # kMaxRanks in slots.cuh
DEAD_WORDS = 128  # kDeadCopies * kSectorWords there


class Status(ctypes.Structure):
    """What a rank that waited too long left behind; slots.cuh."""

    _fields_ = [
        ("state", ctypes.c_uint32),
        ("rank", ctypes.c_uint32),
        ("row", ctypes.c_uint32),
        ("phase", ctypes.c_uint32),
        ("peer", ctypes.c_uint32),
    ]


class GroupParams(ctypes.Structure):
    """The group's part; slots.cuh."""

    _fields_ = [
        ("epochs", _POINTER),
        ("dead", _POINTER),
        ("slots", _POINTER),
        ("rank", ctypes.c_int32),
        ("unit_capacity", ctypes.c_uint32),
        ("peers", _POINTER * (MAX_RANKS - 1)),
        ("status", _POINTER),
        ("timeout_ns", ctypes.c_uint64),
    ]


class OutputParams(ctypes.Structure):
    """Where the norm goes; outputs.cuh."""

    _fields_ = [
        ("out", _POINTER),
        ("quantised", _POINTER),
        ("scales", _POINTER),
        ("static_scale", _POINTER),
    ]


class OneShotParams(ctypes.Structure):
    """The one-shot kernel's only parameter; one_shot_row.cuh."""

    _fields_ = [
        ("x", _POINTER),
        ("group", GroupParams),
        ("residual", _POINTER),
        ("weight", _POINTER),
        ("residual_out", _POINTER),
        ("inverse_hidden_size", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("weight_bias", ctypes.c_float),
        ("num_tokens", ctypes.c_int32),
        ("output", OutputParams),
        ("row_vectors", ctypes.c_int32),
        ("row_units", ctypes.c_int32),
    ]


class TwoShotParams(ctypes.Structure):
    """The two-shot kernel's only parameter; two_shot_tile.cuh."""

    _fields_ = [
        ("x", _POINTER),
        ("num_tokens", ctypes.c_int32),
        ("rows_per_tile", ctypes.c_int32),
        ("group", GroupParams),
        ("residual", _POINTER),
        ("weight", _POINTER),
        ("residual_out", _POINTER),
        ("inverse_hidden_size", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("weight_bias", ctypes.c_float),
        ("row_vectors", ctypes.c_int32),
        ("output", OutputParams),
        ("shard_vectors", ctypes.c_int32),
        ("shard_units", ctypes.c_int32),
    ]
