"""Continue texts with a saved model."""

import dataclasses
from collections.abc import Sequence

import torch
from megatron.core.transformer.module import Float16Module

from megatron_memory.data.tokenizer_hash import hash_of
from megatron_memory.data.tokenizers import (
    check_vocab_size,
    ids_without_token,
    num_ids,
    padded_vocab_size,
)
from megatron_memory.exceptions import CheckpointError, ConfigurationError, DataError
from megatron_memory.inference.engine import InferenceEngine
from megatron_memory.inference.options import ModelSource, Sampling
from megatron_memory.inference.saved_model import SavedModel, find_saved_model
from megatron_memory.model.gpt import build_model
from megatron_memory.reading.panics import panics_as_errors
from megatron_memory.runtime import Backend
from megatron_memory.runtime.distributed import initialize_distributed, world_size
from megatron_memory.runtime.kernels import choose_kernels
from megatron_memory.training.checkpoint.loader import load_weights
from megatron_memory.training.program import tokenizer_of

_DEFAULT_NUM_TOKENS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What the model made of a prompt."""

    prompt: str
    text: str
    """What follows the prompt."""
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    """Those of `text`, without the end of document."""
    reached_end: bool
    """Whether the model ended the document; else the continuation is as long as was asked for."""


def load_generator(source: ModelSource, backend: Backend) -> "Generator":
    """Join the run's processes and load a model; a collective call.

    Megatron must be prepared for `source.device`. `runtime.distributed.shutdown_distributed` is its
    counterpart.

    Raises:
        CheckpointError, ConfigurationError, DataError: on every rank alike.
    """
    saved = find_saved_model(source, backend, world_size())
    initialize_distributed(saved.config, backend)
    return Generator(saved, backend)


class Generator:
    """A saved model and its tokenizer, on one tensor-parallel group. Its methods are collective.

    Args:
        saved: from `find_saved_model`.
        backend: of this rank; Megatron's groups must exist.

    Raises:
        CheckpointError: the checkpoint is damaged, or the tokenizer is not the training's.
        ConfigurationError, DataError: the tokenizer cannot be built.
    """

    def __init__(self, saved: SavedModel, backend: Backend):
        config = saved.config
        self.saved = saved
        self.kernels: str | None = None
        """What computes the memory layers, for the log; None without memory."""
        if config.memory.enabled:
            self.kernels = choose_kernels(config.memory.kernels, backend)
        self.tokenizer = tokenizer_of(config)
        vocab_size = check_vocab_size(self.tokenizer, config.data.vocab_size)
        padded = padded_vocab_size(
            vocab_size,
            config.data.make_vocab_size_divisible_by,
            config.parallel.tensor_model_parallel_size,
        )
        model: torch.nn.Module
        (model,) = build_model(config, backend, padded)
        self.notes: list[str] = []
        """What is to be said of the checkpoint."""
        self._check_tokenizer()
        load_weights([model], config, vocab_size, saved.folder, self.notes.append)
        self.num_tokens = min(vocab_size, num_ids(self.tokenizer), saved.vocab_size or vocab_size)
        """Tokens that a prompt may have, and that may be chosen."""
        if config.precision.bf16:
            model = Float16Module(model.config, model)
        self.model = model.eval().requires_grad_(False)
        # Tokenizers without an end of document answer None, or a negative number (SentencePiece).
        eod = self.tokenizer.eod
        self.end_of_document = None if eod is None or eod < 0 else int(eod)
        self._engine = InferenceEngine(
            self.model,
            vocab_size=self.num_tokens,
            padded_vocab_size=padded,
            stop_tokens=self._stop_tokens(saved.stop_tokens),
            never_chosen=ids_without_token(self.tokenizer),
        )

    def _check_tokenizer(self) -> None:
        """That it is the training's, where the checkpoint says which that was."""
        expected = self.saved.tokenizer_hash
        if expected is None or hash_of(self.tokenizer) == expected:
            return
        problem = (
            f"the tokenizer {self.tokenizer.path} is not the one that {self.saved.folder} was "
            "trained with: its tokens mean something else"
        )
        if not self.saved.tokenizer_is_given:
            raise CheckpointError(
                f"{problem}. It has changed since: name a copy of the training's with "
                "--tokenizer-model, or this one, if you want it all the same"
            )
        self.notes.append(f"warning: {problem}")

    def _stop_tokens(self, more: Sequence[int]) -> tuple[int, ...]:
        """The end of document first, for the engine writes it where several end a text."""
        end = () if self.end_of_document is None else (self.end_of_document,)
        return (*end, *(token for token in more if token not in end))

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        prepend_eod: bool = False,
        max_batch_size: int = 16,
    ) -> list[Completion]:
        """Continue each prompt, in the given order; the prompts may differ in length.

        Args:
            prompts: texts of at least one token.
            sampling: how many tokens, and how they are chosen.
            prepend_eod: begin a document with each prompt.
            max_batch_size: prompts to continue at once.

        Raises:
            ConfigurationError: a prompt is empty or too long, or the tokenizer cannot read it.
            CheckpointError: the model's logits are no numbers.
        """
        if not prompts:
            return []
        self._check_sampling(sampling)
        start = self._start(prepend_eod)
        tokenized = [start + self._tokenize(prompt) for prompt in prompts]
        num_tokens = self._num_tokens(prompts, tokenized, sampling.num_tokens_to_generate)
        try:
            continued = self._engine.run(tokenized, num_tokens, sampling, max_batch_size)
        except CheckpointError as error:
            raise CheckpointError(f"{self.saved.folder}: {error}") from error
        return [
            Completion(
                prompt=prompt,
                text=self._text_after(prompt_tokens, tokens),
                prompt_tokens=tuple(prompt_tokens),
                tokens=tuple(tokens),
                reached_end=len(tokens) < num_tokens,
            )
            for prompt, prompt_tokens, tokens in zip(prompts, tokenized, continued, strict=True)
        ]

    def _check_sampling(self, sampling: Sampling) -> None:
        if sampling.top_k > self.num_tokens:
            raise ConfigurationError(
                f"--top-k {sampling.top_k} exceeds the vocabulary's {self.num_tokens} "
                "tokens: lower it, or give 0 to choose among all."
            )

    def _start(self, prepend_eod: bool) -> list[int]:
        """The tokens before a prompt."""
        if not prepend_eod:
            return []
        if self.end_of_document is None:
            raise ConfigurationError(
                f"--prepend-eod: the tokenizer {self.tokenizer.path} has no end of document. Leave "
                "the flag away."
            )
        return [self.end_of_document]

    def _tokenize(self, prompt: str) -> list[int]:
        shown = f"--prompt {_shorten(prompt)!r}"
        try:
            with panics_as_errors():
                tokens = list(self.tokenizer.tokenize(prompt))
        # Libraries raise nearly anything on a text that they refuse.
        except Exception as error:
            raise ConfigurationError(
                f"{shown}: {self.saved.config.data.tokenizer_type or 'NullTokenizer'} cannot read "
                f"it ({error}). Without a tokenizer, prompts are token numbers with spaces between."
            ) from error
        if not tokens:
            raise ConfigurationError(f"{shown} has no tokens: give at least one to continue.")
        if not 0 <= min(tokens) <= max(tokens) < self.num_tokens:
            raise ConfigurationError(
                f"{shown}: its tokens run from {min(tokens)} to {max(tokens)}, and the vocabulary "
                f"from 0 to {self.num_tokens - 1}. Use the training's tokenizer."
            )
        return tokens

    def _num_tokens(
        self, prompts: Sequence[str], tokenized: list[list[int]], wanted: int | None
    ) -> int:
        """How many tokens to add, so that the longest prompt's continuation has positions."""
        positions = self.saved.config.model.max_position_embeddings
        length, prompt = max(
            (len(tokens), prompt) for prompt, tokens in zip(prompts, tokenized, strict=True)
        )
        shown = f"--prompt {_shorten(prompt)!r} has {length} tokens"
        limit = f"the model's {positions} positions (--max-position-embeddings of the training)"
        if length >= positions:
            raise ConfigurationError(
                f"{shown}, which leaves nothing of {limit}: shorten it to at most {positions - 1} "
                "tokens."
            )
        if wanted is None:
            return min(_DEFAULT_NUM_TOKENS, positions - length)
        if length + wanted > positions:
            raise ConfigurationError(
                f"{shown}, which with --num-tokens-to-generate {wanted} exceeds {limit}: give "
                f"--num-tokens-to-generate {positions - length} at most."
            )
        return wanted

    def _text_after(self, prompt_tokens: list[int], tokens: list[int]) -> str:
        """The continuation's text as it reads behind the prompt's, spaces included."""
        try:
            with panics_as_errors():
                before = self.tokenizer.detokenize(prompt_tokens)
                whole = self.tokenizer.detokenize([*prompt_tokens, *tokens])
                if whole.startswith(before):
                    return whole[len(before) :]
                return self.tokenizer.detokenize(tokens)
        except Exception as error:
            raise DataError(
                f"the tokenizer {self.tokenizer.path} cannot turn the tokens {tokens} into text "
                f"({error}). Use a sound copy of the training's tokenizer"
            ) from error


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
