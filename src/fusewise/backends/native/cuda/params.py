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
        ("slots", _POINTER),
        ("peers", _POINTER * (MAX_RANKS - 1)),
        ("epochs", _POINTER),
        ("dead", _POINTER),
        ("status", _POINTER),
        ("timeout_ns", ctypes.c_uint64),
        ("unit_capacity", ctypes.c_int64),
        ("rank", ctypes.c_int32),
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
        ("group", GroupParams),
        ("output", OutputParams),
        ("x", _POINTER),
        ("residual", _POINTER),
        ("weight", _POINTER),
        ("residual_out", _POINTER),
        ("num_tokens", ctypes.c_int32),
        ("row_vectors", ctypes.c_int32),
        ("row_units", ctypes.c_int32),
        ("inverse_hidden_size", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("weight_bias", ctypes.c_float),
    ]


class TwoShotParams(ctypes.Structure):
    """The two-shot kernel's only parameter; two_shot_tile.cuh."""

    _fields_ = [
        ("group", GroupParams),
        ("output", OutputParams),
        ("x", _POINTER),
        ("residual", _POINTER),
        ("weight", _POINTER),
        ("residual_out", _POINTER),
        ("num_tokens", ctypes.c_int32),
        ("row_vectors", ctypes.c_int32),
        ("shard_vectors", ctypes.c_int32),
        ("shard_units", ctypes.c_int32),
        ("rows_per_tile", ctypes.c_int32),
        ("inverse_hidden_size", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("weight_bias", ctypes.c_float),
    ]
