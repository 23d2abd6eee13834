"""Tokens of point clouds and of graphs; see `zoo.models.parts.layers.modalities`.

    points         [B, P, 3]
    nodes          [B, N, F]       features of nodes
    node_ids       [B, N, R]       rows that are orthonormal, see `random_ids`, `laplacian_ids`
    edges          int [B, E, 2]   nodes at both ends
    edge_features  [B, E, F']

Follows: arXiv:2111.14819 (groups of points), arXiv:2207.02505 (graphs as tokens).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.core.types import Array, Batch, take
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.linear import dense, table_init
from zoo.models.parts.layers.modalities import Modality, Sequence
from zoo.models.parts.layers.norms import BatchNorm


@dataclass(frozen=True)
class Points(Modality):
    """Groups of neighbouring points, behind a class token. Places, a small MLP of the centres, are
    added before every layer.

    Attributes:
      points: P that `inputs` describes; others are taken, from `groups` on.
      groups: G, how many.
      size: points of a group.
    """

    points: int = 1024
    groups: int = 256
    size: int = 32

    name: ClassVar[str] = "points"
    reads: ClassVar[tuple[str, ...]] = ("points",)

    def build(self, width: int) -> nn.Module:
        return PointTokens(self, width)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {"points": ((self.points, 3), jnp.float32)}


class PointTokens(nn.Module):
    """Tokens of `Points`, the class token first."""

    config: Points
    width: int

    def setup(self) -> None:
        d = self.width
        self.first = dense(3, 128, bias=True)
        self.first_norm = BatchNorm()
        self.second = dense(128, 256, bias=True)
        self.third = dense(512, 512, bias=True)
        self.third_norm = BatchNorm()
        self.fourth = dense(512, d, bias=True, axes=("mlp", "embed"))
        self.place_up = dense(3, 128, bias=True)
        self.place_down = dense(128, d, bias=True, axes=("mlp", "embed"))
        vector = nn.with_logical_partitioning(table_init(d), ("norm",))
        self.cls = self.param("cls", vector, (d,))
        self.cls_place = self.param("cls_place", vector, (d,))

    def __call__(self, batch: Batch, *, train: bool = False) -> Sequence:
        points, c = batch["points"], self.config
        if points.ndim != 3 or points.shape[-1] != 3 or points.shape[1] < max(c.groups, c.size):
            least = max(c.groups, c.size)
            raise ValueError(f"points: got {points.shape}, want [B, {least} or more, 3]")
        centres = take(points, farthest(points, c.groups))  # [B, G, 3]
        near = nearest(centres, points, c.size)  # [B, G, K]
        groups = take(points, near.reshape(near.shape[0], -1)).reshape(*near.shape, 3)
        x = self.first_norm(self.first(groups - centres[:, :, None]), train=train)
        x = self.second(jax.nn.relu(x))
        whole = jnp.broadcast_to(x.max(2, keepdims=True), x.shape)
        x = self.third_norm(self.third(jnp.concatenate([whole, x], -1)), train=train)
        x = self.fourth(jax.nn.relu(x)).max(2)  # [B, G, D]
        place = self.place_down(ACTIVATIONS["gelu"](self.place_up(centres)))

        def with_first(vector: Array, rows: Array) -> Array:
            lead = jnp.broadcast_to(vector.astype(rows.dtype), (rows.shape[0], 1, self.width))
            return jnp.concatenate([lead, rows], 1)

        return Sequence(with_first(self.cls, x), with_first(self.cls_place, place))


def farthest(points: Array, count: int) -> Array:
    """Indices int32 [B, count] of [B, P, 3]: the first point, and then always the one that is
    farthest from all chosen so far.
    """

    def step(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        distance, last = state
        centre = take(points, last[:, None])
        distance = jnp.minimum(distance, jnp.square(points - centre).sum(-1))
        return (distance, distance.argmax(-1).astype(jnp.int32)), last

    far = jnp.full(points.shape[:2], jnp.inf, points.dtype)
    _, chosen = jax.lax.scan(step, (far, jnp.zeros(len(points), jnp.int32)), length=count)
    return chosen.T


def nearest(centres: Array, points: Array, count: int) -> Array:
    """Indices int32 [B, G, count] of the points [B, P, 3] that are nearest to each centre [B, G,
    3], the nearest first.
    """
    distance = jnp.square(centres[:, :, None] - points[:, None]).sum(-1)
    return jax.lax.top_k(-distance, count)[1].astype(jnp.int32)


@dataclass(frozen=True)
class Graphs(Modality):
    """A token for the graph, one for nothing, and one for each node and edge.

    A node or an edge is known by the identifiers of the nodes at its ends, for a node twice its
    own.

    Attributes:
      nodes: N that `inputs` describes; others are taken.
      edges: E, likewise.
      node_width: features of a node.
      edge_width: features of an edge.
      id_width: R, length of identifiers.
    """

    nodes: int = 16
    edges: int = 32
    node_width: int = 8
    edge_width: int = 4
    id_width: int = 16

    name: ClassVar[str] = "graph"
    reads: ClassVar[tuple[str, ...]] = ("nodes", "node_ids", "edges", "edge_features")

    def build(self, width: int) -> nn.Module:
        return GraphTokens(self, width)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {
            "nodes": ((self.nodes, self.node_width), jnp.float32),
            "node_ids": ((self.nodes, self.id_width), jnp.float32),
            "edges": ((self.edges, 2), jnp.int32),
            "edge_features": ((self.edges, self.edge_width), jnp.float32),
        }


class GraphTokens(nn.Module):
    """Tokens of `Graphs`: graph, nothing, nodes, edges."""

    config: Graphs
    width: int

    def setup(self) -> None:
        c, d, axes = self.config, self.width, ("mlp", "embed")
        self.node = dense(c.node_width, d, bias=True, axes=axes)
        self.edge = dense(c.edge_width, d, bias=True, axes=axes)
        self.ends = dense(2 * c.id_width, d, axes=axes)
        rows = nn.with_logical_partitioning(table_init(d), ("queries", "embed"))
        self.kinds = self.param("kinds", rows, (2, d))
        self.marks = self.param("marks", rows, (2, d))

    def __call__(self, batch: Batch, *, train: bool = False) -> Sequence:
        del train
        ids, edges = batch["node_ids"], batch["edges"]
        own = jnp.concatenate([ids, ids], -1)
        both = jnp.concatenate([take(ids, edges[..., 0]), take(ids, edges[..., 1])], -1)
        nodes = self.node(batch["nodes"]) + self.ends(own)
        arcs = self.edge(batch["edge_features"]) + self.ends(both)
        kinds = self.kinds.astype(nodes.dtype)
        marks = jnp.broadcast_to(self.marks.astype(nodes.dtype), (len(ids), 2, self.width))
        return Sequence(jnp.concatenate([marks, nodes + kinds[0], arcs + kinds[1]], 1))


def random_ids(rng: np.random.Generator, nodes: int, width: int) -> np.ndarray:
    """Orthonormal rows, float32 [nodes, width], drawn anew for each graph.

    Raises:
      ValueError: more nodes than `width`.
    """
    if nodes > width:
        raise ValueError(f"{nodes} nodes: want {width} at most, the length of identifiers")
    return np.linalg.qr(rng.normal(size=(width, width)))[0][:nodes].astype(np.float32)


def laplacian_ids(edges: np.ndarray, nodes: int, width: int) -> np.ndarray:
    """Eigenvectors of the normalised Laplacian as columns, of the smallest eigenvalues first,
    float32 [nodes, width]; zeros where there are fewer. Their signs are arbitrary.

    Args:
      edges: int [E, 2].
      nodes: how many there are.
      width: of the identifiers.
    """
    beside = np.zeros((nodes, nodes))
    beside[edges[:, 0], edges[:, 1]] = beside[edges[:, 1], edges[:, 0]] = 1
    scale = 1 / np.sqrt(np.maximum(beside.sum(1), 1))
    _, vectors = np.linalg.eigh(np.eye(nodes) - scale[:, None] * beside * scale)
    return np.pad(vectors[:, :width], ((0, 0), (0, max(width - nodes, 0)))).astype(np.float32)
