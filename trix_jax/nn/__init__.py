"""Flax Linen modules: TriX feed-forward layers, blocks around them, and a language
model.
"""

from trix_jax.nn.attention import CausalSelfAttention as CausalSelfAttention
from trix_jax.nn.block import Block as Block
from trix_jax.nn.block import DenseBlock as DenseBlock
from trix_jax.nn.block import DenseFFN as DenseFFN
from trix_jax.nn.block import HierarchicalTriXBlock as HierarchicalTriXBlock
from trix_jax.nn.block import SparseLookupBlock as SparseLookupBlock
from trix_jax.nn.block import SparseTriXBlock as SparseTriXBlock
from trix_jax.nn.hierarchical_ffn import HierarchicalTriXFFN as HierarchicalTriXFFN
from trix_jax.nn.kernel import TernaryKernel as TernaryKernel
from trix_jax.nn.linear import TriXLinear as TriXLinear
from trix_jax.nn.route_table import tabulate_routes as tabulate_routes
from trix_jax.nn.router import Router as Router
from trix_jax.nn.settings import TileSettings as TileSettings
from trix_jax.nn.sparse_ffn import SparseTriXFFN as SparseTriXFFN
from trix_jax.nn.sparse_lookup_ffn import SparseLookupFFN as SparseLookupFFN
from trix_jax.nn.tiles import RoutedTiles as RoutedTiles
from trix_jax.nn.transformer import TransformerConfig as TransformerConfig
from trix_jax.nn.transformer import TransformerLM as TransformerLM
