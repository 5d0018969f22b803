"""Values of options that several commands take."""

import enum


class Dtype(enum.StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Decode(enum.StrEnum):
    in_place = "in_place"
    checkpoints = "checkpoints"
    replay = "replay"
