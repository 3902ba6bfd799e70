from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttle.actuation.messages import (
    REQUEST_BYTES,
    Ask,
    Reply,
    Request,
    Say,
    Status,
    read_request,
)
from throttle.errors import InvalidInputError

GPUS_COUNT = 3
GOOD = (
    Request(Ask.CLAIM, 1, gpus=0b101, owner="engine é"),
    Request(Ask.SET, 2, epoch=7, clock_mhz=1200, why="cruise"),
    Request(Ask.SET, 3, epoch=7, clock_mhz=0),
    Request(Ask.RELEASE, 4, epoch=7),
    Request(Ask.RESET_ALL, 5),
    Request(Ask.RENEW),
)


@pytest.mark.parametrize("request_", GOOD, ids=lambda each: each.kind.name)
def test_a_request_comes_out_as_it_went_in(request_):
    packet = request_.pack()
    assert len(packet) == REQUEST_BYTES
    assert read_request(packet, GPUS_COUNT) == request_


def test_a_reply_comes_out_as_it_went_in():
    reply = Reply(Say.GPU, Status.DONE, 2, 1, 4, 0, 0, -1, 900, 0.25, 3, "why")
    assert Reply.unpack(reply.pack()) == reply
    with pytest.raises(InvalidInputError, match="allowed"):
        Reply.unpack(reply.pack()[:-1])


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (Request(Ask.CLAIM, 0, gpus=1, owner="x"), "number"),
        (Request(Ask.CLAIM, 1, gpus=0, owner="x"), "gpus"),
        (Request(Ask.CLAIM, 1, gpus=0b1000, owner="x"), "gpus"),
        (Request(Ask.CLAIM, 1, gpus=1, owner=""), "owner"),
        (Request(Ask.CLAIM, 1, gpus=1, owner="a\nb"), "owner"),
        (Request(Ask.CLAIM, 1, epoch=3, gpus=1, owner="x"), "epoch"),
        (Request(Ask.SET, 1, epoch=0, clock_mhz=900), "epoch"),
        (Request(Ask.SET, 1, epoch=1, clock_mhz=-1), "clock_mhz"),
        (Request(Ask.SET, 1, epoch=1, clock_mhz=100_001), "clock_mhz"),
        (Request(Ask.SET, 1, epoch=1, clock_mhz=900, owner="x"), "owner"),
        (Request(Ask.RELEASE, 1, epoch=1, clock_mhz=900), "clock_mhz"),
        (Request(Ask.RESET_ALL, 1, why="x"), "why"),
        (Request(Ask.RENEW, 1), "number"),
    ],
)
def test_what_does_not_fit_its_kind_is_refused_by_name(wrong, field):
    with pytest.raises(InvalidInputError) as raised:
        read_request(wrong.pack(), GPUS_COUNT)
    assert raised.value.field == f"request.{field}"


@pytest.mark.parametrize("length", [0, 1, REQUEST_BYTES - 1, REQUEST_BYTES + 1])
def test_another_length_is_refused(length):
    with pytest.raises(InvalidInputError, match=f"allowed: {REQUEST_BYTES} bytes"):
        read_request(bytes(length), GPUS_COUNT)


def test_padding_must_be_zero():
    packet = bytearray(GOOD[1].pack())
    packet[5] = 1
    with pytest.raises(InvalidInputError, match="padding"):
        read_request(bytes(packet), GPUS_COUNT)


@given(st.binary(min_size=REQUEST_BYTES, max_size=REQUEST_BYTES))
def test_noise_is_refused(noise):
    with pytest.raises(InvalidInputError):
        read_request(noise, GPUS_COUNT)


@given(st.sampled_from(GOOD), st.integers(0, REQUEST_BYTES - 1), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_means_another_whole_request(good, place, value):
    packet = bytearray(good.pack())
    packet[place] = value
    try:
        read = read_request(bytes(packet), GPUS_COUNT)
    except InvalidInputError:
        return
    assert read.pack() == bytes(packet)
    assert struct.unpack_from("<I", packet) == struct.unpack_from("<I", good.pack())
