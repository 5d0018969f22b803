"""Cases, inputs, an oracle and tolerances, for tests, benchmarks and notebooks."""

from gdn_jax.testing.cases import CASES as CASES
from gdn_jax.testing.cases import CHUNK_CASES as CHUNK_CASES
from gdn_jax.testing.cases import CHUNK_KDA_CASES as CHUNK_KDA_CASES
from gdn_jax.testing.cases import Case as Case
from gdn_jax.testing.cases import make as make
from gdn_jax.testing.compare import FLOOR as FLOOR
from gdn_jax.testing.compare import MANY as MANY
from gdn_jax.testing.compare import TOLERANCE as TOLERANCE
from gdn_jax.testing.compare import Deviation as Deviation
from gdn_jax.testing.compare import deviation as deviation
from gdn_jax.testing.compare import relative_error as relative_error
from gdn_jax.testing.conv import CONV_CASES as CONV_CASES
from gdn_jax.testing.conv import ConvCase as ConvCase
from gdn_jax.testing.conv import conv_oracle as conv_oracle
from gdn_jax.testing.conv import make_conv as make_conv
from gdn_jax.testing.oracle import oracle as oracle
from gdn_jax.testing.programs import collectives as collectives
from gdn_jax.testing.slots import check_slots as check_slots
