"""Qwen3-Next and Qwen3.5: configurations, models, checkpoints.

Imported by itself (`from gdn_jax import models`), so that `import gdn_jax` needs no
Flax.
"""

import pathlib

from gdn_jax.models.checkpoint import load as load
from gdn_jax.models.checkpoint import load_sharded as load_sharded
from gdn_jax.models.checkpoint import save as save
from gdn_jax.models.config import Config as Config
from gdn_jax.models.model import Model as Model
from gdn_jax.models.sharded import ShardedModel as ShardedModel
from gdn_jax.models.state import ModelState as ModelState
from gdn_jax.models.tokenizer import Tokenizer as Tokenizer
from gdn_jax.models.tokenizer import load_tokenizer as load_tokenizer

# The folder of the model that comes with the library: `gdn-jax train` made it.
SMALL = pathlib.Path(__file__).parent / "small"
