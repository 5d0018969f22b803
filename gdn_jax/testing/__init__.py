"""Cases, inputs, an oracle and tolerances, for tests, benchmarks and notebooks."""

from gdn_jax.testing.cases import CASES as CASES
from gdn_jax.testing.cases import Case as Case
from gdn_jax.testing.cases import make as make
from gdn_jax.testing.compare import TOLERANCE as TOLERANCE
from gdn_jax.testing.compare import relative_error as relative_error
from gdn_jax.testing.oracle import oracle as oracle
from gdn_jax.testing.slots import check_slots as check_slots
