"""A model whose heads, columns and experts devices share out, and its sequences."""

from __future__ import annotations  # so that help() names types and expands none

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gdn_jax.models import parameters
from gdn_jax.models.config import Config
from gdn_jax.models.cover import Target
from gdn_jax.models.model import Model
from gdn_jax.models.parameters import Params
from gdn_jax.models.shares import find_split
from gdn_jax.models.state import ModelState
from gdn_jax.nn.attention import KVCache
from gdn_jax.nn.projections import Heads
from gdn_jax.nn.shares import Read, Shares, is_traced
from gdn_jax.nn.split import Split
from gdn_jax.nn.state import GatedDeltaNetState
from gdn_jax.ops import checks
from gdn_jax.sharding.compiling import options_of
from gdn_jax.sharding.grid import AXES, Axis, Grid, MeshAxes

METHODS = ("__call__", "hidden", "logits", "draft")
LAYER_STATES = (KVCache, GatedDeltaNetState)


@dataclasses.dataclass(frozen=True)
class ShardedModel:
    """A model on a mesh: the kernels run on every device, each on its heads.

        >>> import jax, jax.numpy as jnp
        >>> from gdn_jax import generate, models, sharding
        >>> mesh = sharding.make_mesh(model=1)     # of data * model devices
        >>> model, params = models.load_sharded(models.SMALL, mesh, progress=False)
        >>> tokens = jnp.array([[100, 101, 102]])
        >>> jax.jit(model.apply)({"params": params}, tokens).shape
        (1, 3, 256)
        >>> [text] = generate(model, params, [[100, 101]], max_tokens=8)

    It has what of `Model` calls and `generate` need. What is sent: the sums behind each
    layer's mixer and behind its MLP, an all-reduce each, and, of a vocabulary that is
    shared out, one for the embedding and an all-gather of logits; nothing around the
    rule, and nothing between groups of `data`.

    Gradients are those of one device. Where several devices have a head, its parameters
    are there as often, and each copy has the gradient of all: an optimiser of single
    numbers keeps them alike, and a norm over all counts each.

    Attributes:
      model: what is shared out.
      mesh: with axes of type Auto.
      axes: which logical axis is split over which of the mesh's; see `sharding.AXES`.
      compiler_options: of XLA, with which an engine compiles its decoding. None: those
        with which sums were measured to be fastest on such devices
        (`gdn_jax/sharding/compiling.py`), else XLA's own choice, as {}.

    Raises:
      ValueError: the devices cannot share it out; the text names the sizes that could.
    """

    model: Model
    mesh: Mesh
    axes: Mapping[str, MeshAxes] = dataclasses.field(default_factory=lambda: AXES)
    compiler_options: Mapping[str, Any] | None = None

    def __post_init__(self):
        if self.model.split is not None:
            remedy = "Give the whole model."
            checks.fail("model", "a part of one", "whole", remedy)
        _ = self.part  # so that what cannot be shared out is told here

    def __hash__(self) -> int:
        axes = tuple(sorted(self.axes.items()))
        return hash((self.model, self.mesh, axes, self.decoding_options))

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def dtype(self) -> Any:
        return self.model.dtype

    @functools.cached_property
    def grid(self) -> Grid:
        return Grid(self.mesh, self.axes)

    @functools.cached_property
    def decoding_options(self) -> tuple[tuple[str, Any], ...]:
        """XLA's, by name."""
        options = self.compiler_options
        if options is None:
            has_sums = self.mesh.size > self.groups
            options = options_of(self.mesh) if has_sums else {}
        return tuple(sorted(options.items()))

    @functools.cached_property
    def part(self) -> Model:
        """What a device runs."""
        return self.model.clone(split=find_split(self.config, self.grid))

    @property
    def split(self) -> Split | None:
        return self.part.split

    @property
    def groups(self) -> int:
        """Between how many the sequences are shared out."""
        return self.grid.parts("rows")

    @functools.cached_property
    def targets(self) -> dict[str, Target]:
        """Each parameter as it lies on the mesh, by its path."""
        return {
            path: target._replace(
                shape=self.shares.shape(path, target.names, target.shape)
            )
            for path, target in parameters.find_targets(self.model).items()
        }

    @functools.cached_property
    def param_specs(self) -> Params:
        return unflatten_dict({path: self.spec_of(path) for path in self.targets}, "/")

    def apply(
        self, variables: Any, *args: Any, method: str = "__call__", **keywords: Any
    ) -> Any:
        """As `Model.apply`, of "__call__", "hidden", "logits" and "draft".

        Several groups share a call's sequences out in order: of n groups the first has
        the first N / n, whose `rows` of the state are among its first P / n. A row of
        another group's part is null: the state stays as it is, and what comes back for
        the sequence is of no use.

        Parameters are as `load_sharded` or `shard` give them. The whole model's may be
        of the same shapes, with columns in another order: they are refused where they
        are there to look at, and under `jax.jit`, which does not say where its
        arguments lie, give wrong numbers.

        Raises:
          ValueError: the method is another one, the groups cannot share the sequences
            out, or the parameters do not lie where the model's do.
        """
        params = check_params(self, dict(variables).get("params"))
        if method not in METHODS:
            wanted = f"one of {', '.join(METHODS)}"
            checks.fail("method", method, wanted, "Others are not shared out.")
        static = {k: v for k, v in keywords.items() if v is None or type(v) is int}
        arrays = args, {k: v for k, v in keywords.items() if k not in static}
        arrays = jax.tree.map(jnp.asarray, arrays)
        named = {f"argument {i}": x for i, x in enumerate(arrays[0])} | arrays[1]
        self.grid.check(
            *(
                Axis("rows", f"{what.key}'s axis 0", leaf.shape[0])
                for [what, *_], leaf in jax.tree_util.tree_leaves_with_path(named)
                if jnp.ndim(leaf)
            )
        )

        def run(variables: Any, args: Any, tables: Any) -> Any:
            if "rows" in tables:
                tables = tables | dict(
                    rows=self.own_rows(tables["rows"], (args, tables))
                )
            call: dict[str, Any] = static | tables
            return self.part.apply(variables, *args, method=method, **call)

        # the state or cache, which comes back
        carried = [x for x in (*arrays[0], *arrays[1].values()) if isinstance(x, tuple)]
        back: Any = self.specs(carried[0]) if carried else None
        results: Any = self.specs(jax.ShapeDtypeStruct((1,), jnp.int32))
        if method in ("hidden", "draft") or (method == "__call__" and carried):
            results = results, back
        specs = dict(params=self.param_specs), *map(self.specs, arrays)
        targets = parameters.find_targets(self.model)
        boxes = {path: (target.names, target.shape) for path, target in targets.items()}
        variables = dict(params=unflatten_dict(self.shares.tied(params, boxes), "/"))
        return self.grid.run(run, specs, results)(variables, *arrays)

    def own_rows(self, rows: Array, state: Any) -> Array:
        """Rows of all groups' state as this group counts them, inside of shard_map."""
        of_states = [x.length for x in _leaves(state, ModelState)]
        num_rows = (of_states or [x.k for x in _leaves(state, KVCache)])[0].shape[0]
        own = rows - self.grid.index("rows") * num_rows
        return jnp.where(own < 0, num_rows, own)  # another group's are not its last

    def specs(self, tree: Any) -> Any:
        """Of states and tables: all have a row for each sequence, and states of layers
        heads, if any, behind it."""
        axes = None if self.split is None else self.split.axes
        rows = self.grid.over("rows") or None

        def spec(x: Any) -> Any:
            if isinstance(x, LAYER_STATES):
                of_heads = PartitionSpec(rows, axes), PartitionSpec(rows)
                return jax.tree.map(lambda leaf: of_heads[leaf.ndim == 1], x)
            return PartitionSpec(*[rows][: len(x.shape)])

        return jax.tree.map(spec, tree, is_leaf=lambda x: isinstance(x, LAYER_STATES))

    def make(self, function: Callable[[int], Any], num_rows: int) -> Any:
        """What `function` makes for so many rows, each device its own part of it."""
        self.grid.check(Axis("rows", "num_rows", num_rows))
        make = functools.partial(function, num_rows // self.groups)
        specs = self.specs(jax.eval_shape(make))
        return jax.jit(self.grid.run(make, (), specs))()

    def init_state(self, num_rows: int, *args: Any, **keywords: Any) -> ModelState:
        """As `Model.init_state`; every device makes its own part."""
        checks.count("num_rows", num_rows, "It is a count of sequences.")
        init = self.part.init_state
        return self.make(lambda rows: init(rows, *args, **keywords), num_rows)

    def init_draft_cache(
        self, num_rows: int, num_positions: int
    ) -> tuple[KVCache, ...]:
        """As `Model.init_draft_cache`."""
        init = self.part.init_draft_cache
        return self.make(lambda rows: init(rows, num_positions), num_rows)

    def shardings(self, tree: Any) -> Any:
        """Of states and tables: where each array lies."""
        return jax.tree.map(
            functools.partial(NamedSharding, self.mesh), self.specs(tree)
        )

    def shard(self, params: Any) -> Params:
        """Parameters of the whole model, put where they belong on the mesh.

        Raises:
          ValueError: they are not the model's.
        """
        arrays = parameters.check_params(self.model, params)
        targets = parameters.find_targets(self.model)

        def read(path: str) -> Read:
            return lambda index: np.asarray(arrays[path][index])

        placed = {path: self.place(path, targets[path], read(path)) for path in targets}
        return unflatten_dict(placed, "/")

    def place(self, path: str, target: Target, read: Read) -> Array:
        """A parameter on the mesh, of which each process reads its devices' parts."""
        return self.shares.place(path, target.names, target.shape, read)

    @functools.cached_property
    def shares(self) -> Shares:
        config = self.config
        heads = Heads(
            config.linear_num_key_heads,
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )
        return Shares(self.mesh, self.split, heads, config.num_key_value_heads)

    def spec_of(self, path: str) -> PartitionSpec:
        """How a parameter lies on the mesh."""
        return self.shares.spec(path, self.targets[path].names)


AnyModel = Model | ShardedModel


def groups_of(model: AnyModel) -> int:
    """Between how many groups of devices sequences are shared out."""
    return model.groups if isinstance(model, ShardedModel) else 1


def check_params(model: AnyModel, params: Any) -> dict[str, Array]:
    """As `parameters.check_params`, of a shared model's parameters on its mesh too,
    where that is known: not of traced ones.

    Raises:
      ValueError: as that.
    """
    if not isinstance(model, ShardedModel):
        return parameters.check_params(model, params)
    remedy = (
        "Give model and params as models.load_sharded does, or model.shard(params)."
    )
    arrays = parameters.check_arrays(params, model.targets, remedy)
    if not is_traced(params):
        names = {path: target.names for path, target in model.targets.items()}
        model.shares.check_places(arrays, names, remedy)
    return arrays


def _leaves(tree: Any, kind: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in leaves if isinstance(x, kind)]
