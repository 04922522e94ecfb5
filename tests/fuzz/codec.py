"""Bytes of the wire: whatever comes is a message that may be said again, or the sender's error."""

from random import Random

from kvray.core.codec import decode, encode
from kvray.core.layout import FORMAT_VERSION
from kvray.core.messages import MAX_CALL_BYTES, Message
from kvray.errors import RemoteProtocolError
from tests.fuzz.outcome import Outcome, mutant, rounds
from tests.unit.test_codec import MESSAGES

OWN_VERSION_SHARE = 0.9  # with another first byte nothing behind it is read


def run(random: Random, seconds: float) -> Outcome:
    outcome = Outcome()
    examples = [encode(message) for message in MESSAGES]
    for _ in rounds(outcome, seconds):
        data = mutant(random, examples)
        if random.random() < OWN_VERSION_SHARE:
            data = bytes([FORMAT_VERSION]) + data[1:]
        try:
            encode(decode(data, max_bytes=MAX_CALL_BYTES, expect=Message))
        except RemoteProtocolError:
            continue
        except Exception as exc:  # noqa: BLE001 (that is what is looked for)
            outcome.fail(f"{type(exc).__name__}: {str(exc)[:120]}: {data.hex()[:400]}")
    return outcome
