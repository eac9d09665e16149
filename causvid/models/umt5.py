"""The UMT5 text encoder of Wan2.1, on transformers' network and the official weights, with embeddings kept on disk.

A prompt's embedding depends on the prompt and the weights alone. It is stored under a digest of both, so that a sweep
or a second run does not load the encoder (11 GB) again.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causvid import progress
from causvid import weights as files_of
from causvid.errors import UserError
from causvid.models import libraries
from causvid.models.layouts import Link, fill, same, shapes_of
from causvid.models.wan_vae import Work
from causvid.registry import register
from causvid.tensor_files import TensorFiles, open_tensors
from causvid.types import Text

STEM = "models_t5_umt5-xxl-enc-bf16"
TOKENIZERS = ("google/umt5-xxl", "tokenizer")
_INNER = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention": "attn",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}


def clean(prompt: str) -> str:
    """A prompt as the encoder was trained on: broken Unicode mended, HTML entities resolved, one space between words.

    Raises:
        UserError: ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise UserError("text encoder 'umt5' needs ftfy: pip install 'causvid[wan]'") from error
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def official_name(name: str) -> str:
    """The original name of a parameter of transformers' encoder."""
    if name == "shared.weight":
        return "token_embedding.weight"
    if name == "encoder.final_layer_norm.weight":
        return "norm.weight"
    _, _, number, rest = name.split(".", 3)
    inner = next(key for key in _INNER if rest.startswith(f"{key}."))
    return f"blocks.{number}.{_INNER[inner]}{rest.removeprefix(inner)}"


def links(network: torch.nn.Module) -> tuple[Link, ...]:
    """How the official file names the weights of transformers' encoder."""
    return tuple(Link(name, (official_name(name),), s, s) for name, s in shapes_of(network).items())


@register("text_encoder", "umt5")
class Umt5:
    """UMT5-XXL: prompts to ``b 512 4096``, zero after the prompt's end.

    Args:
        dim, layers, heads, ffn_dim, vocabulary_size: the encoder's geometry (as released; tests use less).
        length: tokens per prompt; longer ones are cut.
        weights: folder with the official file and ``google/umt5-xxl/``, or diffusers' folder; read on first use.
        store: folder where embeddings are kept; default none are.
        device, dtype: where and in which type it computes.
    """

    def __init__(
        self,
        dim: int = 4096,
        layers: int = 24,
        heads: int = 64,
        ffn_dim: int = 10240,
        vocabulary_size: int = 256384,
        length: int = 512,
        weights: Path | None = None,
        store: Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if dim % heads:
            raise ValueError(f"dim ({dim}) is not a multiple of heads ({heads})")
        self.dim, self.layers, self.heads, self.ffn_dim = dim, layers, heads, ffn_dim
        self.vocabulary_size, self.length = vocabulary_size, length
        self.weights, self.store, self.device, self.dtype = weights, store, device, dtype
        self._network: Any = None

    def encode(self, prompts: Sequence[str]) -> Text:
        """``b l d`` embeddings in fp32; those that are stored whole are read, the rest computed and stored.

        Raises:
            UserError: weights, tokenizer or packages are missing or do not fit.
        """
        cleaned = [clean(prompt) for prompt in prompts]
        rows = {prompt: self._stored(prompt) for prompt in dict.fromkeys(cleaned)}
        for prompt in [prompt for prompt, row in rows.items() if row is None]:
            rows[prompt] = self._compute(prompt)
            if self.store is not None:
                files_of.write_tensors(self._place(prompt), {"embedding": rows[prompt]})
        out = torch.zeros(len(prompts), self.length, self.dim)
        for index, prompt in enumerate(cleaned):
            row = rows[prompt]
            out[index, : len(row)] = row.float()
        return Text(out)

    @property
    def parameters(self) -> int:
        """How many weights the network has; 32 buckets of relative positions in every layer."""
        per_layer = 4 * self.dim**2 + 3 * self.dim * self.ffn_dim + 2 * self.dim + 32 * self.heads
        return self.vocabulary_size * self.dim + self.layers * per_layer + self.dim

    def encoding(self) -> Work:
        """What a prompt of full length takes; bytes beside the weights, in bf16."""
        length, dim = self.length, self.dim
        flops = self.layers * length * (2 * (4 * dim**2 + 3 * dim * self.ffn_dim) + 4 * length * dim)
        # Attention with its table of positions, or the feed-forward: counted tensor by tensor.
        most = length * max(14 * dim + 4 * self.heads * length, 8 * (dim + self.ffn_dim))
        return Work(float(flops), 0.0, float(most))

    def release(self) -> None:
        """Let go of the network and its file; the next prompt that is not stored opens them again."""
        self._network = None
        self.__dict__.pop("_files", None)

    def tokens(self, prompt: str) -> Tensor:
        """Token numbers of a cleaned prompt, its end included, ``1 l``."""
        return self._tokenizer(
            prompt, truncation=True, max_length=self.length, add_special_tokens=True, return_tensors="pt"
        ).input_ids

    @torch.no_grad()
    def _compute(self, prompt: str) -> Tensor:
        if self._network is None:
            self._network = self._load()
        # One prompt at a time without padding: what the mask would hide is not computed.
        return self._network(self._known_tokens(prompt).to(self.device)).last_hidden_state[0].cpu()

    def _known_tokens(self, prompt: str) -> Tensor:
        """Token numbers that the table of embeddings has, ``1 l``."""
        tokens = self.tokens(prompt)
        largest = max(tokens.flatten().tolist(), default=0)
        if largest >= self.vocabulary_size:
            raise UserError(
                f"the tokenizer in {self._tokenizer_folder} and the text encoder in {self._files.path} do not belong "
                f"together: it gives token {largest}, and the encoder has {self.vocabulary_size} "
                "(world.text_encoder.vocabulary_size); fetch google/umt5-xxl of the same release"
            )
        return tokens

    def _stored(self, prompt: str) -> Any:
        if self.store is None or not self._place(prompt).is_file():
            return None
        place, fault = self._place(prompt), "not the embedding of a prompt"
        try:
            row = files_of.read_tensors(place)[0].get("embedding")
        except UserError as error:
            row, fault = None, str(error).split("\n", 1)[0]
        if row is not None and row.ndim == 2 and row.shape[1] == self.dim and len(row) <= self.length:
            return row
        progress.say(f"stored embedding {place} is left out and computed again: {fault}")
        return None

    def _place(self, prompt: str) -> Path:
        key = hashlib.sha256(f"{self._fingerprint}\n{self.length}\n{self.dtype}\n{prompt}".encode()).hexdigest()
        return (self.store or Path()) / key[:2] / f"{key}.safetensors"

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files of its weights and its tokenizer; none as long as nothing says where they are."""
        if self.weights is None:
            return ()
        tokenizer = self._tokenizer_folder
        beside = sorted(path for path in tokenizer.rglob("*") if path.is_file()) if tokenizer else []
        return (*self._files.sources, *beside)

    @cached_property
    def _files(self) -> TensorFiles:
        if self.weights is None:
            raise UserError(
                "text encoder 'umt5' needs the weights of Wan2.1: say where with --weights, or by runtime.weights"
            )
        folder = self.weights / "text_encoder"
        return open_tensors(folder, "model") if folder.is_dir() else open_tensors(self.weights, STEM)

    @cached_property
    def _fingerprint(self) -> str:
        """The digests of its files; those of large files are computed once and kept (``weights.digest``)."""
        return " ".join(files_of.digest(path) for path in self.sources or self._files.sources)

    @property
    def _tokenizer_folder(self) -> Path | None:
        root = self.weights or Path()
        return next((root / name for name in TOKENIZERS if (root / name).is_dir()), None)

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            with libraries.quiet():
                from transformers import AutoTokenizer
        except ImportError as error:
            raise UserError("text encoder 'umt5' needs transformers: pip install 'causvid[wan]'") from error
        folder = self._tokenizer_folder
        if folder is None:
            looked = " and ".join(TOKENIZERS)
            raise UserError(f"{self.weights or Path()} has no tokenizer: looked for {looked}; fetch google/umt5-xxl")
        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).split("\n", 1)[0]
            raise UserError(f"{folder} holds no tokenizer: {reason}; fetch it again") from error

    def empty(self) -> Any:
        """transformers' encoder with fresh weights."""
        try:
            with libraries.quiet():
                from transformers import UMT5Config, UMT5EncoderModel
        except ImportError as error:
            raise UserError("text encoder 'umt5' needs transformers: pip install 'causvid[wan]'") from error
        return UMT5EncoderModel(
            UMT5Config(
                vocab_size=self.vocabulary_size, d_model=self.dim, d_kv=self.dim // self.heads, d_ff=self.ffn_dim,
                num_layers=self.layers, num_heads=self.heads, feed_forward_proj="gated-gelu", dropout_rate=0.0,
                relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
            )
        )  # fmt: skip

    def _load(self) -> Any:
        with torch.device("meta"):
            network = self.empty()
        original = "token_embedding.weight" in self._files.shapes
        found = links(network) if original else _untied(same(shapes_of(network)), self._files)
        network.encoder.set_input_embeddings(None)  # one table under two names, which would get memory twice
        fill(network, found, self._files, f"UMT5 of width {self.dim}", self.dtype, self.device)
        network.set_input_embeddings(network.shared)
        return network.eval().requires_grad_(False)


def _untied(found: tuple[Link, ...], files: TensorFiles) -> tuple[Link, ...]:
    """A file may hold the one table of embeddings under either of its names."""
    other = "encoder.embed_tokens.weight"
    if "shared.weight" in files.shapes or other not in files.shapes:
        return found
    return tuple(Link(e.ours, (other,), e.shape, e.our_shape) if e.ours == "shared.weight" else e for e in found)
