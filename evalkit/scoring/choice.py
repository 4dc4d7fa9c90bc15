"""Multiple choice from the log-probabilities of the options, given in the options' order.

    logprobs (-2.1, -0.9, -2.6, -4.4), options A B C D  ->  B      a tie goes to the first option

Computed step by step in the originals' number type, where two options may round to a tie or to nothing at all.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

from evalkit.types import Completion, Sample, Score, Switches

PROBS = {"tulu-2023-06": "options", "tulu-2023-11": "vocabulary", "strict": "options"}  # what each rule takes


def _bfloat16(x: float) -> float:
    """To the nearest bfloat16, ties to even: the upper half of a float32."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _packed(code: str) -> Callable[[float], float]:
    return lambda x: float(struct.unpack(code, struct.pack(code, x))[0])


ROUND: dict[str, Callable[[float], float]] = {
    "float32": _packed("<f"), "float16": _packed("<e"), "bfloat16": _bfloat16,
}


def softmax(logits: Sequence[float], dtype: str = "float32") -> list[float]:
    """As torch does it on the CPU: values of `dtype`, each step in float32, the result rounded to `dtype`."""
    single, last = ROUND["float32"], ROUND[dtype]
    given = [last(x) for x in logits]
    top = max(given)
    powers = [single(math.exp(single(x - top))) for x in given]
    total = single(math.fsum(powers))
    return [last(single(power / total)) for power in powers]


def pick(sample: Sample, probabilities: Sequence[float]) -> Score:
    """The most probable option, the first on a tie (also when all are 0), against the target."""
    best = max(range(len(probabilities)), key=lambda i: (probabilities[i], -i))
    label = sample.options[best]
    return Score(sample.id, "scored", float(label in sample.target), label, sample.group)


def score(sample: Sample, completion: Completion, switches: Switches) -> Score:
    """`probs` = `options`: softmax over the options alone. `vocabulary`: over the whole vocabulary, where all
    options may underflow to 0 in float32, and then the first is taken, as in open-instruct of 2023-11.

    `failed` without a usable log-probability for each option; a prompt over the context is `unparsed`, 0.
    """
    logprobs = completion.logprobs
    if completion.finish == "context" and not logprobs:
        return Score(sample.id, "unparsed", 0.0, group=sample.group)
    if len(logprobs) != len(sample.options) or any(map(math.isnan, logprobs)) or max(logprobs) == -math.inf:
        why = f"log-probabilities {list(logprobs)} for options {' '.join(sample.options)}"
        return Score(sample.id, "failed", None, group=sample.group, verdicts=(why,))
    if switches["probs"] == "vocabulary":
        return pick(sample, [ROUND["float32"](math.exp(x)) for x in logprobs])
    return pick(sample, softmax(logprobs))
