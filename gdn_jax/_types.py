"""The letters of the library, bound once as array types.

N   sequences (rows) in the batch      H    key/query heads
T   tokens of one row, dense           HV   value heads; value head i reads key head
L   tokens of all rows, packed              i // (HV // H)
P   slots of the state pool            K    key head dim
S   columns of a speculative table     V    value head dim
W   width of the convolution           C    its channels, flat: q, k and v
                                       D    a model's hidden size
E   groups of rows, as experts have    F    what their rows are multiplied into
"""

from typing import TypeAlias

from jaxtyping import Array, Bool, Float, Int32

State: TypeAlias = Float[Array, "P HV V K"]
Query: TypeAlias = Float[Array, "L H K"]
Key: TypeAlias = Float[Array, "L H K"]
Value: TypeAlias = Float[Array, "L HV V"]

PerHead: TypeAlias = Float[Array, " HV"]
PerToken: TypeAlias = Float[Array, "L HV"]

Slots: TypeAlias = Int32[Array, " N"] | Int32[Array, "N S"]
Boundaries: TypeAlias = Int32[Array, " N_plus_1"]
Accepted: TypeAlias = Int32[Array, " N"]
HasState: TypeAlias = Bool[Array, " N"]

Ring: TypeAlias = Float[Array, "P C R"]
Start: TypeAlias = Int32[Array, " P"]
Channels: TypeAlias = Float[Array, "L C"]
Filter: TypeAlias = Float[Array, "C W"]
PerChannel: TypeAlias = Float[Array, " C"]

GroupedRows: TypeAlias = Float[Array, "L D"]
GroupWeights: TypeAlias = Float[Array, "E D F"]
GroupSizes: TypeAlias = Int32[Array, " E"]

Hidden: TypeAlias = Float[Array, "N T D"] | Float[Array, "L D"]
