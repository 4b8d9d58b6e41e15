"""megatron-core's inference: its scheduler, and its controller of a static batch with a KV cache.

They are the parts of its `StaticInferenceEngine` that generate; the engine itself adds a progress
bar and seeds torch's own generator. The dynamic engine needs flash-attn and a GPU.
"""

from collections.abc import Sequence

import torch
from megatron.core.inference.inference_request import InferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.scheduler import Scheduler
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from torch import Tensor

from megatron_memory.exceptions import CheckpointError
from megatron_memory.inference.options import Sampling
from megatron_memory.upstream import core

_SMALL_TEMPERATURE = 1e-3
# Its reciprocal is finite in fp32; any smaller one gives the same choice.
_SMALLEST_TEMPERATURE = 1e-30


class InferenceEngine:
    """Continues token sequences; every rank of the tensor-parallel group calls it alike.

    Args:
        model: on this rank, in Megatron's bf16 wrapper or not; built without sequence parallelism.
        vocab_size: tokens that may be chosen; the embedding's padding is beyond them.
        padded_vocab_size: rows of the embedding.
        stop_tokens: each ends a continuation; (): nothing but its length does.
        never_chosen: ids below `vocab_size` that are no tokens.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        vocab_size: int,
        padded_vocab_size: int,
        stop_tokens: Sequence[int],
        never_chosen: Sequence[int] = (),
    ):
        self._model = model
        self._vocab_size = vocab_size
        self._padded_vocab_size = padded_vocab_size
        self._stop_tokens = tuple(stop_tokens)
        self._never_chosen = [number for number in never_chosen if number < vocab_size]

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        sampling: Sampling,
        max_batch_size: int,
    ) -> list[list[int]]:
        """Continue each prompt by at most `num_tokens` tokens.

        Prompts of similar length share a batch, because a batch's cache is filled token by token
        from its shortest prompt's end on.

        Args:
            prompts: one token or more each.
            num_tokens: to add.
            sampling: how tokens are chosen; its number of them is not read.
            max_batch_size: sequences in the cache at once.

        Returns:
            the new tokens of each prompt, without the end of document; fewer than asked for where
            there was one.

        Raises:
            CheckpointError: the model's logits are no numbers.
        """
        longest = max(map(len, prompts)) + num_tokens
        batch_size = min(len(prompts), max_batch_size)
        controller = self._controller(batch_size, longest)
        controller.sampling_rng.manual_seed(sampling.seed)
        scheduler = Scheduler(max_batch_size=batch_size)
        by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        for number in by_length:
            request = InferenceRequest(
                request_id=number,
                prompt="",
                prompt_tokens=list(prompts[number]),
                sampling_params=self._parameters(sampling, num_tokens),
            )
            scheduler.add_request(inference_request=request)
        while scheduler.have_requests_pending():
            active = scheduler.active_request_pool.copy()
            scheduler.update_requests_pools(
                result_dict=controller.generate_all_output_tokens_static_batch(active)
            )
        if controller.is_without_numbers():
            raise CheckpointError(
                "the model's logits are no finite numbers (NaN or infinity), from which no token "
                "can be chosen. tools/inspect_checkpoint.py names the tensors with such values; "
                "without any, bf16 overflows: convert the checkpoint with --dtype fp32"
            )
        done = scheduler.completed_request_pool
        return [done[number].generated_tokens.tolist() for number in range(len(prompts))]

    def _controller(self, batch_size: int, num_positions: int) -> "_Controller":
        wrapper = core.inference_wrapper(
            self._model, batch_size, num_positions, self._padded_vocab_size
        )
        return _Controller(wrapper, self._stop_tokens, self._vocab_size, self._never_chosen)

    def _parameters(self, sampling: Sampling, num_tokens: int) -> SamplingParams:
        parameters = SamplingParams(
            temperature=max(sampling.temperature, _SMALLEST_TEMPERATURE),
            top_k=1 if sampling.is_greedy else sampling.top_k,
            top_p=float(sampling.top_p),
            num_tokens_to_generate=num_tokens,
        )
        parameters.add_attributes({"no_early_termination": not self._stop_tokens})
        return parameters


class _Controller(TextGenerationController):
    """Chooses in fp32, and never the vocabulary's padding, which megatron-core takes for tokens."""

    def __init__(
        self,
        wrapper: GPTInferenceWrapper,
        stop_tokens: Sequence[int],
        vocab_size: int,
        never_chosen: list[int],
    ):
        super().__init__(wrapper, _EndOfDocument(stop_tokens[0] if stop_tokens else None))
        self._stop_tokens = stop_tokens
        self._vocab_size = vocab_size
        self._never_chosen = never_chosen
        self._is_without_numbers: Tensor | None = None

    def is_without_numbers(self) -> bool:
        """Whether any token had logits that were not finite."""
        return self._is_without_numbers is not None and bool(self._is_without_numbers)

    def _numbers_of(self, logits: Tensor) -> Tensor:
        """Remember on the device, without waiting for it, that a row has no largest number."""
        is_bad = ~logits.amax(dim=-1, keepdim=True).isfinite()
        seen = self._is_without_numbers
        self._is_without_numbers = is_bad.any() if seen is None else seen | is_bad.any()
        # Draws from NaN would be an error of another kind, on GPUs a fatal one.
        return logits.masked_fill(is_bad, 0.0)

    def sample_from_logits(
        self, last_token_logits: Tensor, sampling_params: SamplingParams, *args, **kwargs
    ) -> Tensor:
        logits = last_token_logits[:, : self._vocab_size].float()
        if self._never_chosen:
            logits = logits.clone()
            logits[:, self._never_chosen] = float("-inf")
        logits = self._numbers_of(logits)
        if sampling_params.temperature < _SMALL_TEMPERATURE:
            # The quotient of the largest would be infinite. The distribution stays the same.
            logits = logits - logits.amax(dim=-1, keepdim=True)
        chosen = super().sample_from_logits(logits, sampling_params)
        # megatron-core knows one token that ends a text: the others become it.
        for token in self._stop_tokens[1:]:
            chosen = chosen.masked_fill(chosen == token, self._stop_tokens[0])
        return chosen


class _EndOfDocument:
    """As much of a tokenizer as the controller needs; its text would be wrong for prompts that a
    tokenizer changes."""

    def __init__(self, end_of_document: int | None):
        # The controller fills the places that are yet to be generated with it.
        self.eod = 0 if end_of_document is None else end_of_document

    def detokenize(self, tokens: list[int]) -> str:
        return ""
