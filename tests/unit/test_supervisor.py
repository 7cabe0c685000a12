"""What the supervisor does without a process: sizes, and lines of any length."""

import asyncio

from nodeserve.coordinator.supervisor import MAX_LINE_BYTES, ring_bytes, short_lines


async def test_a_long_line_is_cut_and_the_next_ones_are_whole() -> None:
    """asyncio's own line reader raises above 64 KiB, and that ended the node."""
    stream = asyncio.StreamReader()
    stream.feed_data(b"first\n" + b"x" * 200_000 + b"\nsecond\nno newline")
    stream.feed_eof()
    lines = [line async for line in short_lines(stream)]
    assert [lines[0], *lines[2:]] == ["first", "second", "no newline"]
    assert set(lines[1]) == {"x"} and len(lines[1]) <= MAX_LINE_BYTES


def test_rings_hold_the_largest_record_several_times() -> None:
    for max_model_len, max_num_seqs in ((512, 16), (131_072, 64), (4096, 20_000)):
        room = ring_bytes(max_model_len, max_num_seqs)
        assert room >= 4 * max(4 * max_model_len + 32 * 1024, 512 * max_num_seqs)
