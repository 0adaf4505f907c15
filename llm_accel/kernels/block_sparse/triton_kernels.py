"""Block-sparse attention in Triton: one program per query block and a few query heads of one list, or several among
which its keys are shared out."""

import triton
import triton.language as tl

from llm_accel.kernels.triton_utils import LOG2E, dot, log2_logits, pivot


@triton.jit
def _listed(place, tile, first, last, BK: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Positions at which the pieces of a tile begin, [PIECES], from the list at ``place``; any outside of the pieces
    from ``first`` to before ``last``."""
    SPLIT: tl.constexpr = BK // PIECE
    piece = tile * PIECES + tl.arange(0, PIECES)
    m_piece = (piece >= first) & (piece < last)
    return tl.load(place + piece // SPLIT, mask=m_piece, other=0) * BK + piece % SPLIT * PIECE


@triton.jit(do_not_specialize=["queries", "slots", "blocks", "sink", "window"])
def block_sparse_kernel(
    query,
    key,
    value,
    output,  # [B, T, Hq, Dv], contiguous; with PARTIAL mixed values fp32 [splits, B * Hq * T, Dv]
    lse,  # [B, Hq, T], contiguous; with PARTIAL [splits, B * Hq * T], base-2 units
    start,
    sinks,
    ptr,
    n_full,
    n_listed,
    idx,
    window_start,
    scaling,
    softcap,
    queries,
    slots,
    blocks,
    sink,
    window,
    heads,
    group,
    per_list,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    PACK: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PARTIAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tiles of BN keys come in two loops: those that every query of the block sees whole, and the edges, which are
    masked. A tile is BN // PIECE pieces, from the list or next to each other in the sink or window segment. Programs
    along the last axis share the tiles of both loops out; with PARTIAL they leave what is combined afterwards."""
    BM: tl.constexpr = PACK * ROWS  # ROWS queries of a block, of PACK heads
    PIECE: tl.constexpr = min(BK, BN)
    PIECES: tl.constexpr = BN // PIECE  # in a tile
    SPLIT: tl.constexpr = BK // PIECE  # pieces of a listed block

    i_pack = tl.program_id(1)
    i_part = blocks * (BQ // ROWS) - 1 - tl.program_id(0)  # those that see most start first
    i_block = i_part // (BQ // ROWS)
    packs = heads // PACK
    i_batch = (i_pack // packs).to(tl.int64)
    first_head = (i_pack % packs) * PACK
    i_list = (i_batch * (heads // per_list) + first_head // per_list) * blocks + i_block

    # slot of position 0
    origin = tl.load(start + i_batch).to(tl.int32) if HAS_START else tl.full([], 0, tl.int32)
    first_row = tl.maximum(origin - (slots - queries), 0) + i_part * ROWS
    first = first_row + slots - queries - origin  # position of the first query
    past = tl.minimum(first + ROWS, slots - origin)  # position after the last one
    if past <= first:
        return  # a padded row has fewer queries than the block list has room for

    o_m = tl.arange(0, BM)
    o_row = first_row + o_m % ROWS
    o_head = first_head + o_m // ROWS
    own = first + o_m % ROWS  # [BM]
    m_row = o_row < queries
    o_d = tl.arange(0, BD)
    o_dv = tl.arange(0, BDV)
    o_piece = tl.arange(0, PIECES)
    p_query = query + i_batch * q_b + (o_head.to(tl.int64) * q_h + o_row.to(tl.int64) * q_t)[:, None] + o_d[None, :]
    b_query = tl.load(p_query, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)  # [BM, BD]
    p_key = key + i_batch * k_b + (first_head // group).to(tl.int64) * k_h + origin.to(tl.int64) * k_s
    p_value = value + i_batch * v_b + (first_head // group).to(tl.int64) * v_h + origin.to(tl.int64) * v_s

    # Segments in tiles.
    place = idx + tl.load(ptr + i_list)
    whole_pieces = tl.load(n_full + i_list) * SPLIT
    listed_pieces = tl.load(n_listed + i_list) * SPLIT
    near = tl.minimum(tl.load(window_start + i_list), past)
    sink_end = tl.minimum(sink, near)
    sink_whole = tl.minimum(sink_end, first + 1) // BN
    sink_edge = tl.cdiv(sink_end - sink_whole * BN, BN)
    list_whole = whole_pieces // PIECES
    list_edge = tl.cdiv(listed_pieces - list_whole * PIECES, PIECES)
    # tiles of the window segment that the last query has left behind
    window_left = tl.cdiv(tl.maximum(past - window - near, 0), BN) if HAS_WINDOW else 0
    window_whole = tl.maximum(first + 1 - near - window_left * BN, 0) // BN
    window_right = tl.cdiv(tl.maximum(past - near - (window_left + window_whole) * BN, 0), BN)

    # The share of this program.
    wholes = sink_whole + list_whole + window_whole
    tiles = wholes + sink_edge + list_edge + window_left + window_right
    share = tl.cdiv(tiles, tl.num_programs(2))
    low = tl.minimum(tl.program_id(2) * share, tiles)
    high = tl.minimum(low + share, tiles)

    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    mixed = tl.zeros([BM, BDV], tl.float32)

    # Where the next tile stands in the list is read a tile ahead: what waits for no other load can be pipelined.
    begin = tl.minimum(low, wholes)
    listed = _listed(place, begin - sink_whole, 0, list_whole * PIECES, BK, PIECE, PIECES)
    for tile in range(begin, tl.minimum(high, wholes)):
        rank = tile - sink_whole - list_whole + window_left
        apart = tl.where(tile < sink_whole, tile * BN, near + rank * BN) + o_piece * PIECE
        m_list = (tile >= sink_whole) & (tile < sink_whole + list_whole)
        pieces = tl.where(m_list, listed, apart)
        listed = _listed(place, tile + 1 - sink_whole, 0, list_whole * PIECES, BK, PIECE, PIECES)
        position = tl.reshape(pieces[:, None] + tl.arange(0, PIECE)[None, :], [BN]).to(tl.int64)
        b_key = tl.load(p_key + position[None, :] * k_s + o_d[:, None], mask=(o_d < D)[:, None], other=0.0)
        logits = log2_logits(dot(b_query, b_key, UPCAST), scaling, softcap, HAS_SOFTCAP)  # [BM, BN]
        peak = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - peak[:, None])
        shrink = tl.exp2(largest - peak)
        total = total * shrink + tl.sum(weights, 1)
        b_value = tl.load(p_value + position[:, None] * v_s + o_dv[None, :], mask=(o_dv < DV)[None, :], other=0.0)
        mixed = mixed * shrink[:, None] + dot(weights.to(b_value.dtype), b_value, UPCAST)
        largest = peak

    begin = tl.maximum(low - wholes, 0)
    first_edge = list_whole * PIECES
    listed = _listed(place, begin - sink_edge + list_whole, first_edge, listed_pieces, BK, PIECE, PIECES)
    for tile in range(begin, tl.maximum(high - wholes, 0)):
        piece = (tile - sink_edge + list_whole) * PIECES + o_piece
        m_piece = (piece >= first_edge) & (piece < listed_pieces)
        here = listed
        listed = _listed(place, tile + 1 - sink_edge + list_whole, first_edge, listed_pieces, BK, PIECE, PIECES)
        rank = tile - sink_edge - list_edge  # in the window segment if not negative
        start_at = tl.where(rank < 0, past, near + tl.where(rank < window_left, rank, rank + window_whole) * BN)
        start_at = tl.where(tile < sink_edge, (sink_whole + tile) * BN, start_at)
        end = tl.where(tile < sink_edge, sink_end, past)
        pieces = tl.where(m_piece, here, start_at + o_piece * PIECE)
        position = tl.reshape(pieces[:, None] + tl.arange(0, PIECE)[None, :], [BN])  # [BN]
        m_n = position < end
        seen = m_n[None, :] & (position[None, :] <= own[:, None])
        if HAS_WINDOW:
            seen = seen & (position[None, :] > own[:, None] - tl.where(rank < 0, past, window))
        position = position.to(tl.int64)
        m_key = (o_d < D)[:, None] & m_n[None, :]
        b_key = tl.load(p_key + position[None, :] * k_s + o_d[:, None], mask=m_key, other=0.0)
        logits = log2_logits(dot(b_query, b_key, UPCAST), scaling, softcap, HAS_SOFTCAP)
        logits = tl.where(seen, logits, float("-inf"))
        peak = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - pivot(peak)[:, None])
        shrink = tl.exp2(largest - pivot(peak))
        total = total * shrink + tl.sum(weights, 1)
        m_value = m_n[:, None] & (o_dv < DV)[None, :]
        b_value = tl.load(p_value + position[:, None] * v_s + o_dv[None, :], mask=m_value, other=0.0)
        mixed = mixed * shrink[:, None] + dot(weights.to(b_value.dtype), b_value, UPCAST)
        largest = peak

    nothing = largest == float("-inf")
    if HAS_SINKS:
        b_sink = tl.load(sinks + o_head).to(tl.float32) * LOG2E
        peak = tl.maximum(largest, b_sink)
        shrink = tl.exp2(largest - peak)
        total = total * shrink + tl.exp2(b_sink - peak)
        mixed = mixed * shrink[:, None]
        largest = peak
    total = tl.where(nothing, 1.0, total)
    mixed = mixed / total[:, None]
    b_lse = tl.where(nothing, float("-inf"), largest + tl.log2(total))
    m_output = m_row[:, None] & (o_dv < DV)[None, :]
    row = (i_batch * heads + o_head) * queries + o_row
    if PARTIAL:
        row += tl.program_id(2).to(tl.int64) * tl.num_programs(1) * PACK * queries
        tl.store(output + row[:, None] * DV + o_dv[None, :], mixed, mask=m_output)
        tl.store(lse + row, b_lse, mask=m_row)
    else:
        p_output = output + ((i_batch * queries + o_row) * heads + o_head)[:, None] * DV + o_dv[None, :]
        tl.store(p_output, mixed.to(output.dtype.element_ty), mask=m_output)
        tl.store(lse + row, b_lse / LOG2E, mask=m_row)
